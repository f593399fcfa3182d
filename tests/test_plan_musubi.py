"""`spf plan` of a run inside musubi-tuner: against the host's classes, the shipped presets, the formulas by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spf_plugin.config import SPFConfig
from spf_plugin.errors import SPFError
from spf_plugin.tools import plan
from spf_plugin.tools import preset as presets
from spf_plugin.tools.cli import app
from spf_plugin.tools.plan import GIB, Run
from spf_plugin.tools.plan_dit import FIRST, PLAIN, SECOND
from spf_plugin.tools.plan_musubi import CAST, DENSE, MODELS, SCALED, figures
from tests.hosts.musubi.sizes import MUSUBI_HOSTS, full_size

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets" / "musubi").glob("*gb.toml"))
needs_host = pytest.mark.skipif(not MUSUBI_HOSTS, reason="NO musubi-tuner CHECKOUT FOUND (see README, Tests)")
models = pytest.mark.parametrize("model", MODELS)


@needs_host
@models
def test_sizes_are_those_of_the_hosts_classes(model: str) -> None:
    ours = MODELS[model]
    for host in MUSUBI_HOSTS:
        theirs = full_size(host)[model]
        assert ours.frozen_bytes(DENSE, 0) == 2 * theirs["parameters"]
        assert ours.lora == sum(sum(fans) for fans in theirs["modules"].values())
        if CAST in ours.weights:
            assert ours.frozen_bytes(CAST, 0) == theirs["parameters"]
        # A byte, and two for every 64, in place of two: of the linear layers of the blocks, which is nearly all.
        in_8_bits = (ours.frozen_bytes(DENSE, 0) - ours.frozen_bytes(SCALED, 0)) / (1 - 2 / 64)
        assert 0.93 * sum(sum(sizes) for sizes in theirs["blocks"].values()) < in_8_bits < theirs["parameters"]


@needs_host
@models
def test_swapped_blocks_are_those_of_the_hosts_classes(model: str) -> None:
    """The weights of their linear layers, which the network names where nothing is left out."""
    ours = MODELS[model]
    for host in MUSUBI_HOSTS:
        theirs = full_size(host)[model]
        linear = {
            stack: sum(a * b for name, (a, b) in theirs["all modules"].items() if f"_unet_{stack}_1_" in name)
            for stack in theirs["blocks"]
        }
        counts = {stack: len(theirs["blocks"][stack]) for stack in linear}
        for swapped in range(1, ours.swappable + 1):
            away = (ours.frozen_bytes(DENSE, 0) - ours.frozen_bytes(DENSE, swapped)) // 2
            assert away in {sum(n * linear[stack] for stack, n in taken.items()) for taken in _takings(counts, swapped)}
        assert abs(ours.swappable - _most(counts)) <= len(counts) - 1


def _takings(counts: dict[str, int], swapped: int) -> Iterator[dict[str, int]]:
    """How many blocks of each stack may be swapped. Of FLUX.2's two a unit is a double block or two single ones, and
    the host takes both in their proportion, rounded."""
    if len(counts) == 1:
        yield dict.fromkeys(counts, swapped)
        return
    for double in range(counts["double_blocks"] - 1):
        for single in range(max(0, 2 * (swapped - double) - 4), 2 * (swapped - double) + 5):
            yield {"double_blocks": double, "single_blocks": single}


def _most(counts: dict[str, int]) -> int:
    """The host's limits; of two stacks it may round beyond that."""
    if len(counts) == 2:
        return counts["double_blocks"] - 2 + (counts["single_blocks"] - 2) // 2
    ((stack, count),) = counts.items()
    kept = {"layers": 2, "transformer_blocks": 1, "blocks": 2 if count == 28 else 1}  # Krea 2 has 28
    return count - kept[stack]


@needs_host
def test_activations_are_those_that_are_tracked() -> None:
    """A plain step and both of a pair, of FLUX.2 klein 4B in full size, on tensors without data."""
    command = [sys.executable, "-m", "benchmarks.musubi_cost", str(MUSUBI_HOSTS[0])]
    command += ["--only", "flux2-klein-4b", "--size", "512x512"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for how, steps in json.loads(done.stdout)["flux2-klein-4b"].items():
        kept = figures()["models"]["flux2-klein-4b"]["figures"][how][DENSE][0]
        assert kept["pixels"] == 512**2
        for step in (PLAIN, FIRST, SECOND):
            assert steps[step]["peak"] == pytest.approx(kept[step]["peak"], rel=0.02)
            assert steps[step]["flops"] == pytest.approx(kept[step]["flops"], rel=0.01)


def forward(model: str, *, checkpointing: bool) -> int:
    """What the first step of a pair has beyond a plain one."""
    plain, first = (MODELS[model].tracked(step, checkpointing=checkpointing)[-1]["flops"] for step in (PLAIN, FIRST))
    return first - plain


@models
def test_a_pair_costs_one_forward_pass_more(model: str) -> None:
    """A forward pass is what a step with checkpointing computes again, but for the few layers outside the blocks; of
    Z-Image twice, whose checkpoints lie in each other."""
    again, once = (
        MODELS[model].tracked(PLAIN, checkpointing=checkpointing)[-1]["flops"] for checkpointing in (True, False)
    )
    times = 2 if model == "zimage" else 1
    assert again - once == pytest.approx(times * forward(model, checkpointing=False), rel=0.05)
    assert forward(model, checkpointing=True) == pytest.approx(forward(model, checkpointing=False), rel=0.03)
    for checkpointing in (True, False):
        plain, second = (
            MODELS[model].tracked(step, checkpointing=checkpointing)[-1]["flops"] for step in (PLAIN, SECOND)
        )
        assert 0.94 * plain < second < 1.01 * plain


def block(tokens: int, width: int, linear: int) -> float:
    """Operations of a block that is one sequence: its linear layers, and queries by keys and by values."""
    return 2.0 * tokens * linear + 4.0 * tokens**2 * width


def test_a_forward_pass_counted_by_hand() -> None:
    """Of Z-Image at 1024 px with 256 words: 30 joint blocks, two of the patches alone, two of the words."""
    width, hidden, patches, words = 3840, 10240, 64 * 64, 256
    linear = 4 * width**2 + 3 * width * hidden
    count = 30 * block(patches + words, width, linear)
    count += 2 * block(patches, width, linear) + 2 * block(words, width, linear)
    assert forward("zimage", checkpointing=False) == pytest.approx(count, rel=0.01)


def test_a_forward_pass_of_a_clip_counted_by_hand() -> None:
    """Of Wan 2.1 1.3B, 81 frames: 30 blocks, which read 512 words across."""
    width, hidden, patches, words = 1536, 8960, 21 * 30 * 52, 512
    across = 2.0 * patches * 2 * width**2 + 2.0 * words * 2 * width**2 + 4.0 * patches * words * width
    count = 30 * (block(patches, width, 4 * width**2 + 2 * width * hidden) + across)
    assert forward("wan-1.3b", checkpointing=False) == pytest.approx(count, rel=0.01)


@models
def test_what_is_promised(model: str) -> None:
    """As of UNets: at most 1.20 plain runs, and 3 % more memory."""
    size = {"width": 832, "height": 480, "frames": 21} if MODELS[model].clips else {"width": 1024, "height": 1024}
    run = Run(model, rank=16, checkpointing=True, fused_attention=True, text_cached=True, **size)
    plain, spf = plan.predict(run), plan.predict(replace(run, spf=SPFConfig()))
    assert 1.1 < spf.flop_ratio <= 1.20
    assert plain.peak <= spf.peak <= 1.03 * plain.peak


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_their_cards(path: Path) -> None:
    run, _ = presets.read(path)
    card = int(path.stem.split("-")[-1].removesuffix("gb"))
    assert run.musubi is not None
    assert path.stem.split("-")[0] in run.model.replace("_", "")
    assert plan.fits(run, card * GIB), plan.predict(run)


@models
def test_the_formulas_by_hand(model: str) -> None:
    of = MODELS[model]
    low, high = (point["pixels"] for point in of.tracked(PLAIN, checkpointing=True))
    # Where a sample was tracked the line goes through it, whatever the shape.
    run = Run(model, low, 1, rank=16, checkpointing=True, fused_attention=True, text_cached=True, optimizer="AdamW")
    for pixels, which in ((low, 0), (high, 1)):
        plain = plan.predict(replace(run, width=pixels))
        assert plain.parts["LoRA weights"] == 4 * 16 * of.lora
        assert plain.flop_ratio == 1
        spf = plan.predict(replace(run, width=pixels, spf=SPFConfig()))
        step, first, second = (of.tracked(name, checkpointing=True)[which] for name in (PLAIN, FIRST, SECOND))
        assert plain.parts["activations and gradients"] == step["peak"]
        assert spf.peak - plain.peak == max(first["peak"], second["peak"]) - step["peak"]
    assert spf.flop_ratio == pytest.approx((first["flops"] / step["flops"] + 1) / 2)  # every second step has none
    halfway = plan.predict(replace(run, width=(low + high) // 2)).parts["activations and gradients"]
    ends = [of.tracked(PLAIN, checkpointing=True)[i]["peak"] for i in (0, 1)]
    assert halfway == pytest.approx(sum(ends) / 2, rel=1e-6)
    assert plan.predict(replace(run, height=2)).peak == plan.predict(replace(run, frames=2)).peak
    small = plan.predict(replace(run, weights=SCALED))
    stored = of.tracked(PLAIN, checkpointing=True, weights=SCALED)[0]
    assert small.parts["activations and gradients"] == stored["peak"]
    assert plan.predict(replace(run, swapped=999)).peak == plan.predict(replace(run, swapped=of.swappable)).peak > 0


def preset(folder: Path, name: str = "zimage-12gb", **changes: Any) -> Path:
    lines = (ROOT / "presets" / "musubi" / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split(" =")[0] not in changes]
    path = folder / f"{name}.toml"
    written = (f"{key} = {value}" for key, value in changes.items() if value is not None)
    path.write_text("\n".join([*kept, *written]) + "\n", encoding="utf-8")
    return path


def data_set(folder: Path, text: str, general: str = "") -> Path:
    path = folder / "data.toml"
    path.write_text(f"[general]\ncaption_extension = '.txt'\n{general}\n{text}\n", encoding="utf-8")
    return path


IMAGES = "[[datasets]]\nimage_directory = 'none'\n"
CLIPS = "[[datasets]]\nvideo_directory = 'none'\n"


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_command(path: Path) -> None:
    code, text = call(path)
    assert code == 0
    assert "fits cards with" in text
    assert "No data set is named: planned with" in text
    assert "transformer, frozen, with fp8_base and fp8_scaled" in text


def test_which_kind_of_8_bits_is_said(tmp_path: Path) -> None:
    code, text = call(preset(tmp_path, fp8_scaled=None))
    assert code == 0
    assert "transformer, frozen, with fp8_base alone 5.7 GB" in text
    assert "every weight of the transformer in 8 bits" in text
    _, text = call(preset(tmp_path))
    assert "with fp8_base and fp8_scaled 6.0 GB" in text
    _, text = call(preset(tmp_path, fp8_base=None, fp8_scaled=None))
    assert "in 16 bits 11.5 GB" in text


def test_it_does_not_fit_and_says_what_to_change(tmp_path: Path) -> None:
    path = preset(tmp_path, fp8_base=None, fp8_scaled=None, gradient_checkpointing="false")
    data = data_set(tmp_path, IMAGES, "resolution = 1024\nbatch_size = 2")
    code, text = call(path, "--dataset_config", data, "--vram", "12")
    assert code == 1
    assert "gradient_checkpointing = true" in text
    assert "batch_size = 1, in the data set, gradient_accumulation_steps = 2" in text
    code, text = call(path, "--dataset_config", data, "--vram", "5", "--json")
    settings = [change["setting"] for change in json.loads(text)["changes"]]
    assert "fp8_base = true, fp8_scaled = true" in settings
    assert "blocks_to_swap = 28" in settings


def test_the_data_set_is_read(tmp_path: Path) -> None:
    images = data_set(tmp_path, f"{IMAGES}resolution = [1280, 768]\nbatch_size = 2")
    run, _ = presets.read(preset(tmp_path), dataset=images)
    assert (run.width, run.height, run.batch, run.frames) == (1280, 768, 2, 1)
    run, _ = presets.read(preset(tmp_path, dataset_config=f"'{images.as_posix()}'"))
    assert (run.width, run.height, run.batch) == (1280, 768, 2)
    run, _ = presets.read(preset(tmp_path), dataset=data_set(tmp_path, IMAGES, "resolution = 512"))
    assert (run.width, run.height, run.batch) == (512, 512, 1)
    run, _ = presets.read(preset(tmp_path), dataset=data_set(tmp_path, IMAGES))
    assert (run.width, run.height) == (960, 544)  # the host's own


def test_frames_are_those_of_the_model(tmp_path: Path) -> None:
    wan = preset(tmp_path, "wan-24gb")
    for said, frames in (("target_frames = [1, 25]", 7), ("target_frames = [83]", 21), ("", 1)):
        run, _ = presets.read(wan, dataset=data_set(tmp_path, f"{CLIPS}{said}\nresolution = [832, 480]"))
        assert run.frames == frames
    whole = data_set(tmp_path, f"{CLIPS}frame_extraction = 'full'\nmax_frames = 49")
    assert presets.read(wan, dataset=whole)[0].frames == 13
    both = ROOT / "presets" / "musubi" / "dataset-wan.toml"
    run, notes = presets.read(wan, dataset=both)
    assert (run.width, run.height, run.frames) == (480, 272, 7)  # more than an image of 832 x 480
    assert "Planned with [[datasets]] 2, the largest of 2 data sets." in notes
    _, text = call(wan, "--dataset_config", both)
    assert "480x272, 25 frames, batch 1" in text
    code, text = call(wan, "--dataset_config", data_set(tmp_path, f"{CLIPS}target_frames = [81]"), "--vram", "8")
    assert code == 1
    assert "target_frames = [25], in the data set" in text


@pytest.mark.parametrize(
    ("name", "changes", "model"),
    [
        ("wan-24gb", {"task": '"t2v-1.3B"'}, "wan-1.3b"),
        ("wan-24gb", {"task": '"t2v-A14B"'}, "wan-a14b"),
        ("wan-24gb", {"task": None}, "wan-14b"),  # the host's default
        ("flux2-klein-12gb", {"model_version": '"klein-9b"'}, "flux2-klein-9b"),
        ("flux2-klein-12gb", {"model_version": None}, "flux2-dev"),
        ("zimage-12gb", {}, "zimage"),
        ("krea2-24gb", {}, "krea2"),
        ("qwen-image-24gb", {}, "qwen_image"),
    ],
)
def test_which_model_it_is(tmp_path: Path, name: str, changes: dict[str, Any], model: str) -> None:
    assert presets.read(preset(tmp_path, name, **changes))[0].model == model


def test_wan_2_2_with_the_embedding_of_2_1(tmp_path: Path) -> None:
    """It then has one modulation for all places, as 2.1."""
    for task in ("t2v-A14B", "t2v-14B"):
        forced = preset(tmp_path, "wan-24gb", task=f'"{task}"', force_v2_1_time_embedding="true")
        run, notes = presets.read(forced)
        assert run.model == "wan-14b"
        assert any("is shown as that" in note for note in notes) == (task == "t2v-A14B")


def test_without_comments_the_names_tell_it(tmp_path: Path) -> None:
    def bare(name: str, dit: str) -> Path:
        path = tmp_path / name
        path.write_text(
            f"dit = '{dit}'\nsdpa = true\nmixed_precision = 'bf16'\ngradient_checkpointing = true\n", encoding="utf-8"
        )
        return path

    run, notes = presets.read(bare("run.toml", "models/z_image_turbo_bf16.safetensors"))
    assert run.model == "zimage"
    assert "Z-Image is guessed from the model's name, z_image_turbo_bf16.safetensors" in notes[0]
    assert presets.read(bare("my-qwen-image.toml", "models/a.safetensors"))[0].model == "qwen_image"
    with pytest.raises(SPFError, match="is not clear from it; add --model zimage, qwen_image"):
        presets.read(bare("run.toml", "models/a.safetensors"))
    assert call(bare("run.toml", "models/a.safetensors"), "--model", "wan-14b")[0] == 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("zimage-12gb", {"gradient_checkpoint": "true"}, "did you mean gradient_checkpointing"),
        ("zimage-12gb", {"network_dim": "0"}, "network_dim = 0: must be a whole number"),
        ("zimage-12gb", {"network_dim": '"16"'}, "is a text, and musubi-tuner does not make a number of it"),
        ("zimage-12gb", {"sdpa": None}, "no attention is chosen"),
        ("zimage-12gb", {"mixed_precision": None}, "mixed_precision"),
        ("zimage-12gb", {"gradient_checkpointing": "false"}, "saves nothing"),
        ("zimage-12gb", {"blocks_to_swap": "29"}, "blocks_to_swap = 29: of Z-Image musubi-tuner swaps 28 at most"),
        ("zimage-12gb", {"optimizer_type": '"AdamX8bit"'}, "did you mean adam8bit"),
        ("zimage-12gb", {"network_args": '["spf_maap=2"]'}, "did you mean spf_map"),
        ("zimage-12gb", {"network_args": '["spf_target=hat", "spf_base=int8"]'}, "spf_base=int8 has not been tried"),
        ("zimage-12gb", {"use_32bit_attention": "true"}, "no figures for use_32bit_attention"),
        ("zimage-12gb", {"fp8_base": None}, "--fp8_scaled needs --fp8_base"),
        ("flux2-klein-12gb", {"fp8_scaled": None}, "--fp8_base needs --fp8_scaled beside it with FLUX.2"),
        ("flux2-klein-12gb", {"model_version": '"klein-7b"'}, "there are figures for dev, klein-4b"),
        ("krea2-24gb", {"fp8_scaled": None}, "--fp8_base needs --fp8_scaled beside it with Krea 2"),
        ("wan-24gb", {"task": '"i2v-14B"'}, "--task i2v-14B begins with an image"),
        ("zimage-12gb", {"dataset_config": '"none.toml"'}, "dataset_config none.toml: there is no such file"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    path = preset(tmp_path, name, **changes)
    with pytest.raises(SPFError) as caught:
        presets.read(path)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1
    assert call(path)[0] == 2


def test_mistakes_in_the_data_set(tmp_path: Path) -> None:
    for text, words in (
        (f"{IMAGES}batch_size = 0", "leaves nothing to train"),
        (f"{IMAGES}resolution = 'big'", "resolution = 'big'"),
        (f"{IMAGES}resolution = 8", "resolution = [8, 8] in [[datasets]] 1: must be pixels"),
        (f"{IMAGES}control_directory = 'b'", "has control images"),
        (f"{CLIPS}target_frames = [25]", "takes images only"),
    ):
        with pytest.raises(SPFError) as caught:
            presets.read(preset(tmp_path), dataset=data_set(tmp_path, text))
        assert words in str(caught.value)
        assert len(caught.value.problems) == 1
    alone = preset(tmp_path, fp8_scaled=None)
    with pytest.raises(SPFError, match="beside it with Z-Image and a batch_size above 1"):
        presets.read(alone, dataset=data_set(tmp_path, f"{IMAGES}batch_size = 2"))
    with pytest.raises(SPFError, match="is for presets of musubi-tuner"):
        presets.read(ROOT / "presets" / "sdxl-12gb.toml", dataset=data_set(tmp_path, IMAGES))
    assert "data set configuration" in call(ROOT / "presets" / "musubi" / "dataset.toml")[1]


def test_a_plain_lora(tmp_path: Path) -> None:
    run, notes = presets.read(preset(tmp_path, network_module='"networks.lora_zimage"'))
    assert run.spf is None
    assert "network_module is not spf_plugin.lora: planned as a plain LoRA." in notes
