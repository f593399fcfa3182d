"""Training Anima inside real, unmodified sd-scripts checkouts: a tiny model of the host's own classes, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spf_plugin.config import parse
from spf_plugin.core.prompt import Kind, Target, split
from spf_plugin.families.anima import Anima as Family
from spf_plugin.hosts.kohya import rules, trainers
from tests import tiny
from tests.conftest import MadeOnce
from tests.hosts.conftest import HOSTS, LAUNCHER, NEWEST, Host, Result

SCRIPT, NETWORK = "anima_train_network.py", "networks.lora_anima"
DITS = LAUNCHER.with_name("dits.py")
TARGET = "spf_target=blonde hair"
EVERY_STEP = (TARGET, "spf_log_every=1", "spf_preview_every=0")
OFF = tuple(f"spf_{name}_multiplier=0" for name in ("text_consistent", "fine_grained", "output", "base_preservation"))
CACHED = {"cache_text_encoder_outputs": True, "cache_latents": True}
SHAPES = ((128, 192), (192, 128))  # buckets that are not square

FOUND = [folder for folder in HOSTS if (folder / SCRIPT).is_file()]
FIRST = NEWEST if NEWEST in FOUND else next(iter(FOUND), None)
contract = pytest.mark.contract


class Anima:
    """One checkout, with its models and a data set of two buckets."""

    def __init__(self, host: Host, models: Path, images: Path):
        self.host, self.models, self.images = host, models, images

    def train(self, *network_args: str, module: str = "spf_plugin.lora", once: bool = False, **flags: Any) -> Result:
        options = {
            "script": SCRIPT,
            "pretrained_model_name_or_path": self.models / "dit.safetensors",
            "vae": self.models / "vae.safetensors",
            "qwen3": self.models / "qwen3",
            "t5_tokenizer_path": self.models / "t5",
            "qwen3_max_token_length": 32,
            "t5_max_token_length": 40,
            "train_data_dir": self.images,
            "enable_bucket": True,
            "min_bucket_reso": 64,
            "max_bucket_reso": 256,
            "bucket_reso_steps": 16,
            "resolution": 128,
            "learning_rate": 1e-3,
            "sdpa": True,
            **flags,
        }
        return (self.host.trained if once else self.host.train)(*network_args, module=module, **options)


def pictures(folder: Path) -> None:
    for i, size in enumerate(SHAPES):
        tiny.images(folder / str(i), size=size, seed=i)
        (folder / str(i) / "1_set").rename(folder / f"1_set{i}")
        (folder / str(i)).rmdir()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first checkout runs everything, each other one the contract."""
    if "anima" in metafunc.fixturenames:
        everywhere = metafunc.definition.get_closest_marker("contract") is not None
        params = [pytest.param(folder, id=folder.name) for folder in FOUND if everywhere or folder == FIRST]
        why = pytest.mark.skip(reason="NO sd-scripts CHECKOUT WITH ANIMA FOUND (see README, Tests)")
        metafunc.parametrize(
            "anima", params or [pytest.param(None, marks=why, id="none")], indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def anima(request: pytest.FixtureRequest, host_of: Callable[[Path], Host], made_once: MadeOnce) -> Anima:
    host = host_of(request.param)

    def build(folder: Path) -> None:
        command = [host.python, str(DITS), str(host.folder), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=host.environment())
        assert done.returncode == 0, done.stderr[-3000:]

    return Anima(host, made_once(f"anima-{host.name}", build), made_once("pictures-of-two-buckets", pictures))


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- training ---------------------------------------------------------------------------------------------------------


@contract
def test_it_trains_an_ordinary_lora(anima: Anima) -> None:
    plain = anima.train(module=NETWORK, once=True)
    result = anima.train(*EVERY_STEP, once=True)
    tensors = result.tensors()
    assert tensors.keys() == plain.tensors().keys()
    assert len(tensors) == 3 * 10 * 3  # blocks, linear layers, tensors of each
    assert relative_error(tensors, plain.tensors()) > 1e-2
    assert "drift=" in result.log
    assert "nothing is applied" not in result.said  # what is known of loaders is of SD and SDXL
    assert set(result.metadata()) - set(plain.metadata()) == {"ss_network_args"}
    # The host's own network takes the file for what it is.
    again = anima.train(module=NETWORK, network_weights=result.file, max_train_steps=1, learning_rate=1e-12)
    assert "All keys matched" in again.said
    assert relative_error(again.tensors(), tensors) < 1e-6


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"gradient_checkpointing": True, **CACHED}, id="cached-text"),
        pytest.param({"network_train_unet_only": None}, id="text-encoder"),
    ],
)
def test_without_weights_it_is_the_plain_network_bit_for_bit(anima: Anima, flags: dict[str, object]) -> None:
    """SPF still runs the reference to measure drift, and disturbs no random state, also not dropout's."""
    flags = {"network_dropout": 0.1, "max_train_steps": 3, **flags}
    measured = anima.train(TARGET, *OFF, "spf_log_every=1", **flags)
    assert "drift=" in measured.log
    assert equal(measured.tensors(), anima.train(module=NETWORK, **flags).tensors())


def spied(result: Result) -> list[dict[str, Any]]:
    assert result.returncode == 0, result.log[-4000:]
    seen = json.loads((result.folder / "spy.json").read_text(encoding="utf-8"))
    assert seen
    return seen


@contract
def test_the_reference_is_the_base_model_bit_for_bit(anima: Anima) -> None:
    """With cached text, whose encoders are freed: nobody of SPF holds them."""
    flags = {"network_dropout": 0.1, "max_train_steps": 6, "gradient_checkpointing": True, **CACHED}
    seen = spied(anima.train(*EVERY_STEP, module="tests.hosts.spy", **flags))
    assert len(seen) == 3
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)
    assert {pair["encoders"] for pair in seen} == {0}
    assert all(height != width for *_, height, width in (pair["shape"] for pair in seen))


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        pytest.param(("spf_train=cross_attention",), {"mixed_precision": "bf16"}, id="bf16,cross-attention"),
        pytest.param((), {"network_train_unet_only": None}, id="text-encoder"),
        pytest.param(("spf_base=int8",), CACHED, id="int8"),
        pytest.param(
            OFF[:2], {"gradient_checkpointing": True, "unsloth_offload_checkpointing": True, **CACHED}, id="unsloth"
        ),
    ],
)
def test_the_reference_of_other_runs(anima: Anima, settings: tuple[str, ...], flags: dict[str, object]) -> None:
    result = anima.train(*EVERY_STEP, *settings, module="tests.hosts.spy", **flags)
    seen = spied(result)
    assert len(seen) == 2
    if "spf_train=cross_attention" in settings:
        assert len(result.tensors()) == 3 * 4 * 3  # q, k, v and output of each block
    assert all(pair["equal"] and pair["repeats"] and pair["response"] > 0 for pair in seen)


def test_an_earlier_lora_is_part_of_the_reference(anima: Anima) -> None:
    """`--base_weights` goes through SPF too, and is Anima's own network there."""
    earlier = anima.train(*EVERY_STEP, once=True).file
    result = anima.train(*EVERY_STEP, module="tests.hosts.spy", base_weights=earlier, max_train_steps=2)
    assert "all weights merged" in result.said
    assert all(pair["equal"] and pair["repeats"] for pair in spied(result))


def test_resume_between_the_two_steps_of_a_pair(anima: Anima) -> None:
    """The second step follows first, on what the first one showed: five dimensions, and text by name."""
    first = anima.train(*EVERY_STEP, module="tests.hosts.spy", max_train_steps=3, save_state=True)
    assert len(spied(first)) == 2
    state = next(path for path in first.folder.glob("*-state") if path.is_dir())
    kept = load_file(state / "spf_pair.safetensors")
    assert kept["args.0"].squeeze(2).shape == kept["eps_ref"].shape
    assert kept["kwargs.target_input_ids"].dtype == torch.long
    second = anima.train(
        *EVERY_STEP, module="tests.hosts.spy", max_train_steps=6, resume=state, skip_until_initial_step=True
    )
    pairs = spied(second)
    assert len(pairs) == 1  # steps 3 (the second of a pair), 4 and 5
    assert pairs[0]["equal"]


@contract
def test_checkpointing_changes_nothing(anima: Anima) -> None:
    without = anima.train(*EVERY_STEP, once=True).tensors()
    assert relative_error(anima.train(*EVERY_STEP, gradient_checkpointing=True).tensors(), without) < 1e-4


def test_cached_text_is_the_text(anima: Anima) -> None:
    """All prompts are encoded before the training starts, and are what they would have been in it."""
    without = anima.train(*EVERY_STEP, once=True).tensors()
    assert relative_error(anima.train(*EVERY_STEP, **CACHED).tensors(), without) < 1e-4


def test_block_swap_changes_nothing(anima: Anima) -> None:
    """The host's copying of blocks is left out (`dits.swap_in_place`): the order of its calls is what is tested."""
    without = anima.train(*EVERY_STEP, once=True).tensors()
    swapped = anima.train(*EVERY_STEP, blocks_to_swap=1)
    assert "Block swap enabled" in swapped.said
    assert equal(swapped.tensors(), without)


def test_a_caption_that_is_dropped_from_cached_text_is_an_empty_one(anima: Anima) -> None:
    """The host drops what is encoded already, and still reports the caption: such a step has nothing to compare."""
    flags = {"caption_dropout_rate": 0.99999, "max_train_steps": 3, **CACHED}  # 1 is refused before the first step
    dropped = anima.train(*EVERY_STEP, **flags)
    assert equal(dropped.tensors(), anima.train(module=NETWORK, **flags).tensors())
    assert "drift=" not in dropped.log


@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        pytest.param(
            ("spf_response=anchor", "spf_train=cross_atention"),
            {"unsloth_offload_checkpointing": True},
            (
                "spf_response=anchor needs pixels of latents",
                "--unsloth_offload_checkpointing computes the blocks without a graph",
            ),
            id="response+unsloth",
        ),
        pytest.param(
            ("spf_base=int8", "spf_network=networks.lora_flux"),
            {"blocks_to_swap": 1},
            (
                "spf_base=int8 and --blocks_to_swap cannot go together",
                "spf_base=int8 works with spf_network=networks.lora, networks.lora_anima, and",
            ),
            id="base+swap",
        ),
        pytest.param(
            (),
            {"cpu_offload_checkpointing": True, "gradient_checkpointing": True},
            ("--cpu_offload_checkpointing is not supported",),
            id="cpu-offload",
        ),
    ],
)
def test_what_cannot_work_stops_before_the_first_step(
    anima: Anima, settings: tuple[str, ...], flags: dict[str, object], said: tuple[str, ...]
) -> None:
    result = anima.train(TARGET, *settings, **flags)
    assert result.returncode != 0
    assert "running training" not in result.log
    for words in said:
        assert words in result.message, result.log[-3000:]


# -- inside the model -------------------------------------------------------------------------------------------------


def test_a_planted_key_is_where_it_was_planted(anima: Anima) -> None:
    """A word whose key answers to the left half of a wide image has its map there, and padding has none."""
    command = [sys.executable, str(LAUNCHER.with_name("planted.py")), str(anima.host.folder), str(anima.models)]
    done = subprocess.run(command, capture_output=True, text=True, env=anima.host.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grid"] == [8, 12]
    assert found["left"] > 0.6
    assert found["right"] < 0.1
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)
    assert found["padding"] == 0


PROMPTS = {
    "start": "blonde hair, a woman in a brown jacket, curtain background",
    "middle": "a woman in a brown jacket, blonde hair, curtain background",
    "end": "a woman in a brown jacket, curtain background, blonde hair",
    "twice": "a woman with blonde hair in a jacket, smiling, blonde hair",
    "introduced": "a woman with blonde hair and sunglasses, brown jacket",
    "cut off": "a woman in a brown jacket, curtain background, blonde hair, with a red hat and sunglasses",
}


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
@pytest.mark.parametrize("caption", PROMPTS.values(), ids=PROMPTS)
def test_spans_are_those_of_the_tokenizer(anima: Anima, caption: str, full: bool) -> None:
    """Against the offsets of T5's own tokenizer, in the sequence that the host makes of a caption."""
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(anima.models / "t5")
    length = 24 if caption == PROMPTS["cut off"] else 64
    prompt = split(caption, [Target("blonde hair")])
    text = prompt.full if full else prompt.base
    encoded = tokenizer(text, truncation=True, padding="max_length", max_length=length, return_offsets_mapping=True)
    expected: list[list[int]] = [[] for _ in prompt.phrases]
    target: list[int] = []
    pieces, end = [], 0
    for piece in prompt.pieces:
        if piece.in_full if full else piece.in_base:
            pieces.append((end, end + len(piece.text), piece))
            end += len(piece.text)
    valid = [i for i, (token, mask) in enumerate(zip(encoded.input_ids, encoded.attention_mask, strict=True)) if mask]
    *words, eos = valid
    assert encoded.input_ids[eos] == tokenizer.eos_token_id
    for token in words:
        last = encoded.offset_mapping[token][1] - 1  # a token begins with the space before it
        piece = next(piece for start, stop, piece in pieces if start <= last < stop)
        if piece.kind is Kind.TARGET:
            target.append(token)
        elif piece.phrase >= 0:
            expected[piece.phrase].append(token)

    def tokenize(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    spans = Family(nn.Module()).spans(prompt, tokenize, length, full=full)
    assert [list(phrase) for phrase in spans.phrases] == expected
    assert list(spans.target) == target
    assert spans.end == eos
    assert (caption != PROMPTS["cut off"]) or spans.end == length - 1


def test_the_options_of_newer_releases_are_refused() -> None:
    args = SimpleNamespace(
        network_train_text_encoder_only=False, network_args=[], train_data_dir=None, dataset_config=None, compile=True
    )
    config = parse({"spf_target": "blonde hair"})
    for dit in (None, trainers.DITS["AnimaNetworkTrainer"]):
        errors = rules.look(args, [], config, sdxl=False, dit=dit, trying=False).errors
        assert [error.split(":")[0] for error in errors] == (["--compile"] if dit else [])
