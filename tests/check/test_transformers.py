"""Trainers of diffusion transformers, and models of another trainer."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin.hosts.kohya.scripts import SCRIPTS, named
from spf_plugin.hosts.kohya.trainers import DITS
from spf_plugin.tools.check import family
from spf_plugin.tools.check.run import check
from spf_plugin.tools.cli.check import app
from tests.check.conftest import look
from tests.check_sets import Run, anima


def test_the_trainer_is_found(run: Run) -> None:
    anima = {"qwen3": "q.safetensors", "vae": "v.safetensors"}
    assert check(run.config, {}).limit == 75
    assert check(run.config, anima).limit == 511
    assert check(run.config, {**anima, "t5_max_token_length": 100}).limit == 99
    run.config.write_text(run.config.read_text() + "# accelerate launch anima_train_network.py\n")
    run.set(pretrained_model_name_or_path="model.safetensors")
    run.config.write_text(run.config.read_text() + "# accelerate launch anima_train_network.py\n")
    assert check(run.config, {}).limit == 511
    assert check(run.config, {}, script=named("sdxl_train_network.py")).limit == 75


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_the_script_may_come_first_as_on_the_line_that_starts_it(run: Run, script: Any) -> None:
    run.set(**{part: f"{part}.safetensors" for part in script.parts})
    words = [f"sd-scripts/{script.file}", str(run.config), "--tokenizer", "none"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    known = not script.is_dit or script.trainer in DITS
    assert ("ready to train" in result.output) == (known and script.name != "flux_train_network"), result.output
    assert f"{script.text_limit(SimpleNamespace())} fit" in result.output
    assert known or f"this is a run of {script.file}" in result.output
    unknown = CliRunner().invoke(app, [*words, "--nothing", "1"])
    assert unknown.exit_code == 2
    assert f"--nothing is no option of {script.file}" in unknown.stderr


def test_every_transformer_lacks_what_it_is_not_told(run: Run) -> None:
    for script in SCRIPTS:
        report = check(run.config, {}, script=script)
        missing = [f.message for f in report.findings if f.code == "no-part"]
        assert bool(missing) == bool(script.parts and script.supported), script.name
        assert all(part in missing[0] for part in script.parts if missing)


def test_a_model_of_another_trainer(run: Run) -> None:
    write_header(run.folder / "model.safetensors", "net.blocks.0.cross_attn.q_proj.weight", "net.llm_adapter.x.weight")
    run.set(pretrained_model_name_or_path=str(run.folder / "model.safetensors"))
    report = check(run.config, {}, script=named("sdxl_train_network"))
    (found,) = [f for f in report.findings if f.code == "other-model"]
    assert found.message.endswith("is a model of Anima, and sdxl_train_network.py trains SDXL")
    assert "anima_train_network.py" in found.fix


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("anima", "llm_adapter.blocks.0.cross_attn.q_proj.weight"),
        ("sd3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        ("flux", "double_blocks.0.img_attn.qkv.weight"),
        ("chroma", "distilled_guidance_layer.in_proj.weight"),
        ("lumina", "noise_refiner.0.attention.qkv.weight"),
        ("hunyuan_image", "byt5_in.layernorm.weight"),
    ],
)
def test_a_file_says_what_it_is(tmp_path: Path, model: str, key: str) -> None:
    also = ["double_blocks.0.img_attn.qkv.weight"] if model == "chroma" else []
    write_header(tmp_path / "m.safetensors", key, *also)
    assert family.of_model(str(tmp_path / "m.safetensors")) == model


def test_cached_text_of_a_transformer_that_is_older_than_its_caption(run: Run) -> None:
    anima(run, cache_text_encoder_outputs_to_disk=True)
    cache = run.images / "p0_anima_te.npz"
    cache.write_bytes(b"x")
    os.utime(cache, (1, 1))
    (found,) = [f.message for f in look(run).findings if f.level == "error"]
    assert "p0_anima_te.npz" in found
    assert "Delete the *_anima_te.npz files" in found


def write_header(path: Path, *names: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, path)
