"""`spf plan` of diffusion transformers: sizes against the host's classes, the shipped presets, the formulas by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spf_plugin.config import SPFConfig
from spf_plugin.errors import SPFError
from spf_plugin.hosts.kohya.scripts import MODELS
from spf_plugin.tools import plan
from spf_plugin.tools import preset as presets
from spf_plugin.tools.cli import app
from spf_plugin.tools.plan import GIB, Run
from spf_plugin.tools.plan_dit import CHECKPOINTING, FIRST, KEPT, PLAIN, SECOND, TRANSFORMERS, figures
from tests.hosts.sizes import DIT_HOSTS, full_size
from tests.test_plan import DIT_PRESETS, ROOT

PRESETS = [path for path in sorted((ROOT / "presets").glob("*.toml")) if path.stem.startswith(DIT_PRESETS)]
needs_host = pytest.mark.skipif(
    not DIT_HOSTS, reason="NO sd-scripts CHECKOUT WITH TRANSFORMERS FOUND (see README, Tests)"
)


@needs_host
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_sizes_are_those_of_the_hosts_classes(model: str) -> None:
    ours = TRANSFORMERS[model]
    for host in DIT_HOSTS:
        theirs = full_size(host)[model]
        assert ours.parameters == theirs["parameters"]
        assert ours.lora == sum(sum(fans) for fans in theirs["modules"].values())
        blocks = {part: sum(sizes) / len(sizes) for part, sizes in theirs["blocks"].items()}
        if "double_blocks" in blocks:  # n // 2 of these, and 2 (n - n // 2) of the others
            unit = (blocks["double_blocks"] + 2 * blocks["single_blocks"]) / 2
            most = len(theirs["blocks"]["double_blocks"]) - 2
            assert ours.swappable // 2 <= most < (ours.swappable + 1) // 2 + 1
        else:
            (unit,) = blocks.values()
            (sizes,) = theirs["blocks"].values()
            assert ours.swappable == len(sizes) - 2
        assert ours.blocks == pytest.approx(unit, rel=1e-6)


@needs_host
def test_activations_are_those_that_are_tracked() -> None:
    """A plain step and both of a pair, of SD3.5 medium in full size, on tensors without data."""
    command = [sys.executable, "-m", "benchmarks.dit_cost", str(DIT_HOSTS[0]), "--only", "sd3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    tracked, kept = json.loads(done.stdout)["sd3"], figures()["models"]["sd3"]
    for how in (CHECKPOINTING, KEPT):
        for step in (PLAIN, FIRST, SECOND):
            assert tracked[how][step]["peak"] == pytest.approx(kept[how][step]["peak"], rel=0.02)
            assert tracked[how][step]["flops"] == pytest.approx(kept[how][step]["flops"], rel=0.01)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_pair_costs_one_forward_pass_more(model: str) -> None:
    """A forward pass is what a step with checkpointing computes again, but for the few layers outside the blocks."""
    again, once = (figures()["models"][model][how] for how in (CHECKPOINTING, KEPT))
    forward = again[PLAIN]["flops"] - once[PLAIN]["flops"]
    for steps in (again, once):
        assert steps[FIRST]["flops"] - steps[PLAIN]["flops"] == pytest.approx(forward, rel=0.03)
        assert steps[SECOND]["flops"] == pytest.approx(steps[PLAIN]["flops"], rel=0.01)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_what_is_promised(model: str) -> None:
    """As of UNets: at most 1.20 plain runs, and 3 % more memory."""
    run = Run(model, 1024, 1024, rank=16, checkpointing=True, fused_attention=True, text_cached=True)
    plain, spf = plan.predict(run), plan.predict(replace(run, spf=SPFConfig()))
    assert 1.1 < spf.flop_ratio <= 1.20
    assert plain.peak <= spf.peak <= 1.03 * plain.peak


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_their_cards(path: Path) -> None:
    run, _ = presets.read(path)
    card = int(path.stem.split("-")[-1].removesuffix("gb"))
    assert run.transformer is not None
    assert plan.fits(run, card * GIB), plan.predict(run)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_the_formulas_by_hand(model: str) -> None:
    of = TRANSFORMERS[model]
    run = Run(model, 1024, 1024, rank=16, checkpointing=True, fused_attention=True, text_cached=True, optimizer="AdamW")
    plain = plan.predict(run)
    assert plain.parts["transformer, frozen"] == 2 * of.parameters
    assert plain.parts["LoRA weights"] == 4 * 16 * of.lora
    assert plain.flop_ratio == 1
    spf = plan.predict(replace(run, spf=SPFConfig()))
    step, first, second = (of.tracked(name, checkpointing=True) for name in (PLAIN, FIRST, SECOND))
    assert spf.peak - plain.peak == max(first["peak"], second["peak"]) - step["peak"]
    assert spf.flop_ratio == pytest.approx((first["flops"] / step["flops"] + 1) / 2)  # every second step has none
    swapped = plan.predict(replace(run, swapped=4))
    assert plain.peak - swapped.peak == 4 * of.blocks * 2
    assert plan.predict(replace(run, swapped=99)).peak == plan.predict(replace(run, swapped=of.swappable)).peak > 0
    half = plan.predict(replace(run, width=512, height=1024))
    activations = "activations and gradients"
    assert half.parts[activations] == pytest.approx(plain.parts[activations] / 2, rel=1e-6)


def preset(folder: Path, **changes: str) -> Path:
    lines = (ROOT / "presets" / "anima-12gb.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split(" =")[0] not in changes]
    path = folder / "run.toml"
    path.write_text("\n".join([*kept, *(f"{k} = {v}" for k, v in changes.items())]) + "\n", encoding="utf-8")
    return path


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def test_the_command(tmp_path: Path) -> None:
    code, text = call(preset(tmp_path), "--vram", "12")
    assert code == 0
    assert "Anima, 1024x1024" in text
    assert "transformer, frozen" in text
    code, text = call(preset(tmp_path, train_batch_size="8"), "--vram", "6")
    assert code == 1
    assert "blocks_to_swap = " in text
    code, text = call(preset(tmp_path), "--model", "flux", "--vram", "12")
    assert code == 1
    assert "fp8_base = true" in text


def test_what_is_not_counted_is_a_mistake(tmp_path: Path) -> None:
    for changes, words in (
        ({"cache_text_encoder_outputs": "false"}, "there are no figures for text encoders on the card"),
        ({"network_args": '["spf_target=hair", "spf_base=int8"]'}, "no figures for spf_base=int8 with Anima"),
        ({"blocks_to_swap": "-1"}, "blocks_to_swap = -1"),
    ):
        with pytest.raises(SPFError) as caught:
            presets.read(preset(tmp_path, **changes))
        assert words in str(caught.value)


def test_every_model_of_a_trainer_has_figures() -> None:
    assert {*TRANSFORMERS} <= set(MODELS)
    assert set(presets.PLANNED) == set(MODELS)
