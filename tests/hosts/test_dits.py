"""Training diffusion transformers inside real, unmodified sd-scripts checkouts: tiny models of the host's own classes,
on the CPU. What a kind is, its module in `dits` says; here is what must be true of all."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spf_plugin.config import parse
from spf_plugin.core.prompt import Spans, Target, split
from spf_plugin.hosts.kohya import rules, trainers
from tests import tiny
from tests.conftest import MadeOnce
from tests.hosts.conftest import HOSTS, NEWEST, Host, Result
from tests.hosts.dits.kinds import KINDS, VARIANTS, kind
from tests.hosts.dits.places import PROMPTS, by_offsets

TARGET = "spf_target=blonde hair"
EVERY_STEP = (TARGET, "spf_log_every=1", "spf_preview_every=0")
OFF = tuple(f"spf_{name}_multiplier=0" for name in ("text_consistent", "fine_grained", "output", "base_preservation"))
SHAPES = ((128, 192), (192, 128))  # buckets that are not square

contract = pytest.mark.contract
variants = pytest.mark.kinds(*KINDS, *VARIANTS)


class Dit:
    """One kind in one checkout, with its models and a data set of two buckets."""

    def __init__(self, name: str, host: Host, models: Path, images: Path):
        self.name, self.kind = name, kind(name)
        self.host, self.models, self.images = host, models, images

    def command(self, word: str) -> list[str]:
        return [self.host.python, "-m", "tests.hosts.dits", word, self.name, str(self.host.folder), str(self.models)]

    def train(self, *network_args: str, module: str = "spf_plugin.lora", once: bool = False, **flags: Any) -> Result:
        options = {
            "script": self.kind.SCRIPT,
            "train_data_dir": self.images,
            "enable_bucket": True,
            "min_bucket_reso": 64,
            "max_bucket_reso": 256,
            "resolution": 128,
            "learning_rate": 1e-3,
            "mixed_precision": self.kind.PRECISION,
            "sdpa": True,
            **self.kind.options(self.models),
            **flags,
        }
        shared = options["train_data_dir"] == self.images
        if shared and options.get("cache_text_encoder_outputs_to_disk"):  # beside images that others look at meanwhile
            options["train_data_dir"] = Path(tempfile.mkdtemp(dir=self.host.work), "images")
            shutil.copytree(self.images, options["train_data_dir"])
        return (self.host.trained if once else self.host.train)(*network_args, module=module, **options)

    def plain(self, *network_args: str, once: bool = False, **flags: Any) -> Result:
        return self.train(*network_args, module=self.kind.NETWORK, once=once, **flags)


def pictures(folder: Path) -> None:
    for i, size in enumerate(SHAPES):
        tiny.images(folder / str(i), size=size, seed=i)
        (folder / str(i) / "1_set").rename(folder / f"1_set{i}")
        (folder / str(i)).rmdir()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Of the checkouts that have a kind's trainer the first runs everything, each other one the contract: of all kinds,
    or of those that `contract` names."""
    if "dit" not in metafunc.fixturenames:
        return
    shared = metafunc.definition.get_closest_marker("contract")
    everywhere = () if shared is None else shared.args or KINDS
    only = metafunc.definition.get_closest_marker("kinds")
    params = []
    for name in only.args if only else KINDS:
        found = [folder for folder in HOSTS if (folder / kind(name).SCRIPT).is_file()]
        first = NEWEST if NEWEST in found else next(iter(found), None)
        params += [
            pytest.param((name, folder), id=f"{name}-{folder.name}")
            for folder in found
            if name in everywhere or folder == first
        ]
        if not found:
            why = pytest.mark.skip(reason=f"NO sd-scripts CHECKOUT WITH {kind(name).SCRIPT} FOUND (see README, Tests)")
            params.append(pytest.param(None, marks=why, id=name))
    metafunc.parametrize("dit", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def dit(request: pytest.FixtureRequest, host_of: Callable[[Path], Host], made_once: MadeOnce) -> Dit:
    name, folder = request.param
    host = host_of(folder)

    def build(into: Path) -> None:
        command = [host.python, "-m", "tests.hosts.dits", "make", name, str(host.folder), str(into)]
        done = subprocess.run(command, capture_output=True, text=True, env=host.environment())
        assert done.returncode == 0, done.stderr[-3000:]

    def encoded(into: Path) -> None:
        pictures(into)
        made = Dit(name, host, models, into).plain(max_train_steps=1)
        assert made.returncode == 0, made.log[-3000:]

    models = made_once(f"{name}-{host.name}", build)
    if kind(name).options(models).get("cache_latents_to_disk"):  # a slow VAE: once for all runs
        return Dit(name, host, models, made_once(f"encoded-{name}-{host.name}", encoded))
    return Dit(name, host, models, made_once("pictures-of-two-buckets", pictures))


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- training ---------------------------------------------------------------------------------------------------------


@contract
@variants
def test_it_trains_an_ordinary_lora(dit: Dit) -> None:
    plain = dit.plain(once=True)
    result = dit.train(*EVERY_STEP, once=True)
    tensors = result.tensors()
    assert tensors.keys() == plain.tensors().keys()
    assert len(tensors) == dit.kind.TENSORS
    assert relative_error(tensors, plain.tensors()) > 1e-2
    assert "drift=" in result.log
    assert "nothing is applied" not in result.said  # what is known of loaders is of SD and SDXL
    assert set(result.metadata()) - set(plain.metadata()) == {"ss_network_args"}
    # The host's own network takes the file for what it is.
    again = dit.plain(network_weights=result.file, max_train_steps=1, learning_rate=1e-12)
    assert "All keys matched" in again.said
    assert relative_error(again.tensors(), tensors) < 1e-6


def without_weights(dit: Dit, *words: str, **flags: Any) -> None:
    """SPF still runs the reference to measure drift, and disturbs no random state, also not dropout's."""
    flags = {"network_dropout": 0.1, "max_train_steps": 3, **flags}
    measured = dit.train(TARGET, *OFF, "spf_log_every=1", *words, **flags)
    assert "drift=" in measured.log
    assert equal(measured.tensors(), dit.plain(*words, **flags).tensors())


@pytest.mark.parametrize("cached", [False, True], ids=["text", "cached-text"])
def test_without_weights_it_is_the_plain_network_bit_for_bit(dit: Dit, cached: bool) -> None:
    without_weights(dit, gradient_checkpointing=True, **(dit.kind.CACHED if cached else {}))


@pytest.mark.kinds("anima", "sd3", "flux", "lumina")
def test_without_weights_a_text_encoder_is_trained_as_without_spf(dit: Dit) -> None:
    without_weights(dit, "train_t5xxl=True", network_train_unet_only=None)  # a word of SD3's network; Anima's takes any


def spied(result: Result) -> list[dict[str, Any]]:
    assert result.returncode == 0, result.log[-4000:]
    seen = json.loads((result.folder / "spy.json").read_text(encoding="utf-8"))
    assert seen
    return seen


@contract
@variants
def test_the_reference_is_the_base_model_bit_for_bit(dit: Dit) -> None:
    """With cached text, whose encoders are freed: nobody of SPF holds them."""
    flags = {"network_dropout": 0.1, "max_train_steps": 6, "gradient_checkpointing": True, **dit.kind.CACHED}
    seen = spied(dit.train(*EVERY_STEP, module="tests.hosts.spy", **flags))
    assert len(seen) == 3
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)
    assert {pair["encoders"] for pair in seen} == {0}
    assert all(height != width for *_, height, width in (pair["shape"] for pair in seen))


@pytest.mark.contract("sd3", "lumina")
def test_the_reference_in_bf16(dit: Dit) -> None:
    result = dit.train(*EVERY_STEP, "spf_train=cross_attention", module="tests.hosts.spy", mixed_precision="bf16")
    seen = spied(result)
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)
    assert 0 < len(result.tensors()) < dit.kind.TENSORS


@pytest.mark.kinds("anima", "lumina")
def test_the_reference_beside_a_text_encoder_that_is_trained(dit: Dit) -> None:
    seen = spied(dit.train(*EVERY_STEP, module="tests.hosts.spy", network_train_unet_only=None))
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


@pytest.mark.kinds("anima", "sd3", "lumina", "hunyuan_image")
def test_the_reference_of_a_base_in_few_bits(dit: Dit) -> None:
    seen = spied(dit.train(*EVERY_STEP, "spf_base=int8", module="tests.hosts.spy", **dit.kind.CACHED))
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


@pytest.mark.kinds("flux")
@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        pytest.param((), {"network_train_unet_only": None, "gradient_checkpointing": True}, id="clip"),
        pytest.param(("spf_base=int8",), {}, id="int8"),
        pytest.param((), {"fp8_base": True, "mixed_precision": "bf16", "apply_t5_attn_mask": True}, id="fp8,mask"),
    ],
)
def test_the_reference_of_other_runs_with_cached_text(
    dit: Dit, settings: tuple[str, ...], flags: dict[str, object]
) -> None:
    """Where CLIP is trained, T5's states stay those of the cache, in the second step of a pair, too."""
    seen = spied(dit.train(*EVERY_STEP, *settings, module="tests.hosts.spy", **{**dit.kind.CACHED, **flags}))
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


@pytest.mark.kinds("anima")
def test_the_reference_with_blocks_whose_graph_is_offloaded(dit: Dit) -> None:
    flags = {"gradient_checkpointing": True, "unsloth_offload_checkpointing": True, **dit.kind.CACHED}
    seen = spied(dit.train(*EVERY_STEP, *OFF[:2], module="tests.hosts.spy", **flags))
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


@pytest.mark.kinds("flux")
def test_a_lora_of_single_blocks_alone_needs_other_layers(dit: Dit) -> None:
    """Those of `last` lie before it. What is compared is then itself trained."""
    words = ("train_double_block_indices=none", "train_single_block_indices=0")
    refused = dit.train(*EVERY_STEP, *words)
    assert "train_double_block_indices=none: only single blocks are trained" in refused.message
    assert "running training" not in refused.log
    behind = dit.train(*EVERY_STEP, *words, "spf_layers=single_blocks", max_train_steps=2)
    assert behind.tensors().keys() == dit.plain(*words, max_train_steps=2).tensors().keys()
    assert "drift=" in behind.log


@pytest.mark.kinds("flux")
def test_nothing_is_drawn_in_the_reference(dit: Dit) -> None:
    """`networks.lora_flux` draws noise for GGPO in each of its modules, and adds it to their output."""
    drawing = ("ggpo_beta=0.01", "ggpo_sigma=0.03", "rank_dropout=0.1", "module_dropout=0.1")
    flags = {"max_train_steps": 3, "network_train_unet_only": None, **dit.kind.CACHED}
    measured = dit.train(TARGET, *OFF, "spf_log_every=1", *drawing, **flags)
    assert "drift=" in measured.log
    plain = dit.train(*drawing, module=dit.kind.NETWORK, **flags)
    assert equal(measured.tensors(), plain.tensors())
    assert relative_error(plain.tensors(), dit.plain(**flags).tensors()) > 1e-3


@pytest.mark.kinds("anima", "flux")
def test_an_earlier_lora_is_part_of_the_reference(dit: Dit) -> None:
    """`--base_weights` goes through SPF too, and is the kind's own network there."""
    earlier = dit.train(*EVERY_STEP, once=True).file
    result = dit.train(*EVERY_STEP, module="tests.hosts.spy", base_weights=earlier, max_train_steps=2)
    assert "all weights merged" in result.said
    assert all(pair["equal"] and pair["repeats"] for pair in spied(result))


def test_resume_between_the_two_steps_of_a_pair(dit: Dit) -> None:
    """The second step follows first, on what the first one showed, with all that the call takes."""
    first = dit.train(*EVERY_STEP, module="tests.hosts.spy", max_train_steps=3, save_state=True)
    assert len(spied(first)) == 2
    state = next(path for path in first.folder.glob("*-state") if path.is_dir())
    kept = load_file(state / "spf_pair.safetensors")
    assert sum(name.startswith(("args.", "kwargs.")) for name in kept) >= 3  # noise, timesteps, text
    second = dit.train(
        *EVERY_STEP, module="tests.hosts.spy", max_train_steps=6, resume=state, skip_until_initial_step=True
    )
    pairs = spied(second)
    assert len(pairs) == 1  # steps 3 (the second of a pair), 4 and 5
    assert pairs[0]["equal"]


@contract
def test_checkpointing_changes_nothing(dit: Dit) -> None:
    without = dit.train(*EVERY_STEP, once=True, **dit.kind.STEADY).tensors()
    flags = {"gradient_checkpointing": True, **dit.kind.STEADY}
    assert relative_error(dit.train(*EVERY_STEP, **flags).tensors(), without) < 1e-4


def test_cached_text_is_the_text(dit: Dit) -> None:
    """All prompts are encoded before the training starts, and are what they would have been in it. In a batch the host
    pads texts to the longest of the batch, or of what is cached, and bf16 rounds them otherwise then, also without SPF:
    there it is one image a step."""
    flags = {} if dit.kind.PRECISION == "no" else {"train_batch_size": 1}
    without = dit.train(*EVERY_STEP, once=True, **flags).tensors()
    assert relative_error(dit.train(*EVERY_STEP, once=True, **dit.kind.CACHED, **flags).tensors(), without) < 1e-4


@contract  # with how each trainer keeps captions
def test_cached_text_on_the_disk_is_held_against_the_captions(dit: Dit, tmp_path: Path) -> None:
    """An extension that was forgotten when the text was cached leaves the folder's name, newer than every caption."""
    data = tmp_path / "data"
    pictures(data)
    flags = {
        "cache_text_encoder_outputs_to_disk": True,
        "train_data_dir": data,
        "max_train_steps": 1,
        **dit.kind.CACHED,
    }
    flags = {**flags, "cache_latents": None, "cache_latents_to_disk": None}
    forgotten = dit.train(*EVERY_STEP, caption_extension=".caption", **flags)
    assert "occurs in none of the" in forgotten.message
    caches = list(data.rglob(f"*{trainers.DITS[dit.kind.TRAINER].text_cache}"))
    assert caches
    corrected = dit.train(*EVERY_STEP, **flags)
    assert "cached encodings that were looked at are not those of their captions" in corrected.message
    assert "\nsteps:" not in corrected.log
    for cache in caches:
        cache.unlink()
    for _ in range(2):  # makes the files, and finds them
        again = dit.train(*EVERY_STEP, **flags)
        assert again.returncode == 0, again.log[-3000:]


@pytest.mark.contract("anima", "flux", "chroma")
def test_block_swap_changes_nothing(dit: Dit) -> None:
    """The host's copying of blocks is left out (`dits.common`): the order of its calls is what is tested."""
    without = dit.train(*EVERY_STEP, once=True).tensors()
    swapped = dit.train(*EVERY_STEP, blocks_to_swap=1)
    assert "block swap" in swapped.said.lower()
    assert equal(swapped.tensors(), without)


@pytest.mark.kinds("flux", "chroma")
def test_block_swap_of_double_and_single_blocks_changes_nothing(dit: Dit) -> None:
    flags = {"gradient_checkpointing": True, **dit.kind.CACHED}
    swapped = dit.train(*EVERY_STEP, blocks_to_swap=2, **flags)
    assert "double blocks: 1, single blocks: 2" in swapped.said
    assert equal(swapped.tensors(), dit.train(*EVERY_STEP, **flags).tensors())


@pytest.mark.kinds("anima", "sd3")
def test_a_caption_that_is_dropped_from_cached_text_is_an_empty_one(dit: Dit) -> None:
    """The host drops what is encoded already, and still reports the caption: such a step has nothing to compare."""
    flags = {"max_train_steps": 3, **dit.kind.DROPPED, **dit.kind.CACHED}
    dropped = dit.train(*EVERY_STEP, **flags)
    assert equal(dropped.tensors(), dit.plain(**flags).tensors())
    assert "drift=" not in dropped.log


# -- SD3's three text encoders ----------------------------------------------------------------------------------------


@pytest.mark.kinds("sd3")
@pytest.mark.parametrize(
    ("words", "cached", "trained"),
    [
        pytest.param(("train_t5xxl=True",), False, {"te1", "te2", "te3", "unet"}, id="all"),
        pytest.param((), True, {"te1", "te2", "unet"}, id="clip-beside-cached-t5"),
    ],
)
def test_text_encoders_of_sd3_are_trained(dit: Dit, words: tuple[str, ...], cached: bool, trained: set[str]) -> None:
    """The host asks its network whether T5 is trained. Where it is cached, a step encodes by the two CLIPs alone."""
    flags = {"network_train_unet_only": None, **(dit.kind.CACHED if cached else {})}
    result = dit.train(*EVERY_STEP, *words, module="tests.hosts.spy", **flags)
    assert {name.split("_")[1] for name in result.tensors()} == trained
    seen = spied(result)
    assert len(seen) == 2
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


@pytest.mark.kinds("sd3")
def test_parts_of_sd3s_text_are_dropped_as_without_spf(dit: Dit) -> None:
    """The host draws which; SPF encodes its own prompts whole, and draws nothing."""
    without_weights(dit, t5_dropout_rate=0.5, max_train_steps=4)


# -- what cannot be ---------------------------------------------------------------------------------------------------


# Beside what no kind can do: what its own trainer has.
MISTAKES: dict[str, tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "anima": (
        (),
        {"unsloth_offload_checkpointing": True},
        ("--unsloth_offload_checkpointing computes the blocks without a graph",),
    ),
    "sd3": (
        (),
        {"pos_emb_random_crop_rate": 0.5},
        ("--pos_emb_random_crop_rate=0.5 puts the image somewhere else in every pass",),
    ),
    "flux": ((), {"fp8_base": True}, ("spf_base=int8 and --fp8_base both shrink",)),
    "chroma": ((), {"fp8_base": True}, ("spf_base=int8 and --fp8_base both shrink",)),
    "lumina": (
        (),
        {"weighted_captions": True, "gemma2_max_token_length": 44},
        ("--weighted_captions is not made for this model", "--gemma2_max_token_length=44: sd-scripts cuts", "Use 48."),
    ),
    "hunyuan_image": (
        (),
        {"cache_text_encoder_outputs": True},
        ("--cache_text_encoder_outputs alone: sd-scripts fails",),
    ),
}


def test_what_cannot_work_is_one_message_before_the_first_step(dit: Dit) -> None:
    own, flags, said = MISTAKES[dit.name]
    base = "spf_base=int8" if dit.name != "lumina" else "spf_base=off"
    settings = ("spf_target=green hair", "spf_foo=1", "spf_response=anchor", "spf_layers=nowhere", base, *own)
    swap = {} if base.endswith("off") or dit.name == "anima" else {"blocks_to_swap": 1}
    result = dit.train(*settings, gradient_checkpointing=True, **swap, **flags)
    assert result.returncode != 0
    assert "running training" not in result.log
    shared = ["the target 'green hair' occurs in none of the", "spf_response=anchor needs pixels of latents"]
    shared += ["unknown setting 'spf_foo'", "spf_layers='nowhere' matches none of the"]
    shared += ["spf_base=int8 and --blocks_to_swap cannot go together"] if swap else []
    count = len(shared) + len([words for words in said if words[0] == "-" or "spf_" in words])
    assert f"SPF: {count} problems" in result.message, result.log[-3000:]
    for words in (*shared, *said):
        assert words in result.message, result.log[-3000:]


# -- inside the model -------------------------------------------------------------------------------------------------


@variants
def test_a_planted_key_is_where_it_was_planted(dit: Dit) -> None:
    """A word whose key answers to the left half of a wide image has its map there, and padding has none."""
    done = subprocess.run(dit.command("planted"), capture_output=True, text=True, env=dit.host.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    for which, found in json.loads(done.stdout.splitlines()[-1]).items():
        h, w = found["grid"]
        assert h < w, which
        assert found["left"] > 0.6, which
        assert found["right"] < 0.1, which
        assert found["top"] == pytest.approx(found["bottom"], abs=0.05), which
        assert found["padding"] == 0, which


@pytest.mark.kinds("flux", "chroma", "lumina", "hunyuan_image")
def test_queries_and_keys_are_those_of_the_models_own_attention(dit: Dit) -> None:
    """Rotary positions, shared keys and the places of words and patches, with different numbers of words."""
    done = subprocess.run(dit.command("joint"), capture_output=True, text=True, env=dit.host.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-5


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_are_those_of_the_tokenizer(dit: Dit, full: bool) -> None:
    """Against the offsets of the tokenizers, in the sequence that the host makes of a caption."""
    for name, caption in PROMPTS.items():
        spans = spans_beside_offsets(dit, caption, 24 if name == "cut off" else 64, full)
        assert spans.target or name == "cut off" or not full


@pytest.mark.kinds("hunyuan_image")
@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_of_what_is_quoted(dit: Dit, full: bool) -> None:
    """It is read twice: byte by byte by byT5, which cuts at 128, and with the rest."""
    for caption in (
        'a blue shirt "caf\u00e9", a woman, a red hat "with blonde hair and sunglasses", curtain background',
        f'a blue shirt "{"red " * 31}hat", a woman in a jacket, a man with "blonde hair", smiling',
    ):
        plain = caption.replace('"', "")
        quoted, without = (spans_beside_offsets(dit, text, 0, full) for text in (caption, plain))
        assert sum(map(len, quoted.phrases)) > sum(map(len, without.phrases)) + 9
        assert not full or len(quoted.target) >= len(without.target) > 0


def spans_beside_offsets(dit: Dit, caption: str, length: int, full: bool) -> Spans:
    """The family's, which must be what the tokenizers' offsets say."""
    prompt = split(caption, [Target("blonde hair")])
    places = dit.kind.places(dit.models, prompt.full if full else prompt.base, length)
    expected, target = by_offsets(prompt, places, full=full)
    spans = dit.kind.spans(dit.models, prompt, length, full=full)
    assert list(spans.phrases) == expected, caption
    assert spans.target == target, caption
    return spans


def test_chroma_has_no_vector_of_clip() -> None:
    """Where the trainer has zeros in its place, two phrases would be as far apart as any others."""
    for model_type, name in (("flux", "pooled"), ("chroma", "stand_in"), (None, "pooled")):
        trainer = type("FluxNetworkTrainer", (), {"model_type": model_type})()
        own = trainers.dit_of(type("Mine", (type(trainer),), {})())
        assert own is not None
        assert own.text == (name, "hidden", "ids", "hidden_mask")


@dataclass(frozen=True)
class Refused:
    """What the rules say of one option.

    Attributes:
        said: how the message begins.
        flags: the host's options.
        settings: SPF's.
        kinds: whose trainers have these options.
        release: the first with them.
    """

    said: str
    flags: dict[str, Any]
    settings: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    release: str = "v0.10"


INT8 = "spf_base=int8"
REFUSED = (
    Refused("--network_train_text_encoder_only trains no", {"network_train_text_encoder_only": True}),
    Refused("--save_model_as=ckpt: SPF writes safetensors only", {"save_model_as": "ckpt"}),
    Refused("--cpu_offload_checkpointing is not supported", {"cpu_offload_checkpointing": True}),
    Refused("--torch_compile: compiled code no longer calls", {"torch_compile": True}),
    Refused("--train_inpainting gives the UNet nine channels", {"train_inpainting": True}, release="v0.11"),
    Refused("--compile: compiled blocks no longer call", {"compile": True}, kinds=("anima",), release="v0.11"),
    Refused("--pos_emb_random_crop_rate=0.5 puts", {"pos_emb_random_crop_rate": 0.5}, kinds=("sd3",)),
    Refused("--weighted_captions is not made for", {"weighted_captions": True}),
    Refused("--cache_text_encoder_outputs alone", {"cache_text_encoder_outputs": True}, kinds=("hunyuan_image",)),
    Refused("--gemma2_max_token_length=44: sd-scripts", {"gemma2_max_token_length": 44}, kinds=("lumina",)),
    Refused("spf_response=anchor needs pixels", {}, ("spf_response=anchor",)),
    Refused("--unsloth_offload_checkpointing computes", {"unsloth_offload_checkpointing": True}, kinds=("anima",)),
    Refused("spf_base=int8 and --blocks_to_swap cannot", {"blocks_to_swap": 1}, (INT8,)),
    Refused("spf_base=int8 and --fp8_base both shrink", {"fp8_base": True}, (INT8,)),
    Refused("spf_base=int8 and --fp8_base_unet both", {"fp8_base_unet": True}, (INT8,)),
    Refused("spf_base=int8 and --fp8_scaled both", {"fp8_scaled": True}, (INT8,), kinds=("hunyuan_image",)),
    Refused("spf_base=int8 works with spf_network=", {}, (INT8, "spf_network=networks.oft_flux")),
    Refused("spf_base=int8: LyCORIS would rebuild", {}, (INT8, "spf_network=lycoris.kohya")),
)


@contract
def test_every_option_that_cannot_work_is_named(dit: Dit) -> None:
    """The rules, of what the host's own parser makes of each option."""

    def parse_only(out: Path) -> None:
        out.mkdir()
        script = Path(__file__).with_name("parse_only.py")
        train = partial(dit.train, TARGET, script=script, out=out, parsed_by=Path(dit.kind.SCRIPT).stem)
        assert train().returncode == 0

    folder = dit.host.made_once(f"args-{dit.name}-{dit.host.name}", parse_only)
    usual = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    own = trainers.DITS[dit.kind.TRAINER]

    def said(flags: dict[str, Any], *settings: str) -> list[str]:
        args = SimpleNamespace(**{**usual, **flags, "network_args": [*settings]})
        config = parse(dict(word.split("=", 1) for word in (TARGET, *settings)))
        return rules.look(args, [], config, sdxl=False, dit=own, trying=False).errors

    assert said({}) == []
    for refused in REFUSED:
        there = [name in usual for name in refused.flags]
        errors = said(refused.flags, *refused.settings)
        if dit.name in refused.kinds and dit.host.release >= refused.release:
            assert all(there), refused
            assert [error.startswith(refused.said) for error in errors] == [True], (refused, errors)
        else:  # the trainer has no such option, or can do with it
            assert not all(there) or not errors, refused


@pytest.mark.parametrize(("cached", "warns"), [(False, True), (True, False)])
def test_the_dropout_that_the_host_leaves_on_is_said(cached: bool, warns: bool) -> None:
    args = SimpleNamespace(
        network_train_text_encoder_only=False,
        network_args=[],
        train_data_dir=None,
        dataset_config=None,
        gradient_checkpointing=True,
        cache_text_encoder_outputs=cached,
    )
    config = parse({"spf_target": "blonde hair"})
    for dit in (None, *trainers.DITS.values()):
        said = rules.look(args, [], config, sdxl=False, dit=dit, trying=False).warnings
        assert any("the dropout of T5 on" in words for words in said) == (warns and dit is not None and dit.drops_out)
