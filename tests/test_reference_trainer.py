"""`spf train` on tiny models: files, exactness, bad input, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target
from spf_plugin.enhancement import limits
from spf_plugin.errors import SPFError
from spf_plugin.lorafile import writer
from spf_plugin.tools import cli
from spf_plugin.trainer import data as folders
from spf_plugin.trainer import loop, models
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.processes import Diffusion
from spf_plugin.trainer.settings import Settings
from spf_plugin.trainer.start import network_module
from spf_plugin.trainer.steps import Trainer
from tests import tiny

HAIR = (Target("blonde hair"),)
SPF = SPFConfig(target=HAIR, log_every=1)
MEASURE_ONLY = SPFConfig(
    target=HAIR, text_consistent_multiplier=0, fine_grained_multiplier=0, output_multiplier=0,
    base_preservation_multiplier=0, log_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Path:
    return tiny_sd15


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("images"), size=(160, 128))


@pytest.fixture(scope="module")
def run(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains with the given settings; the file's name is `name`."""
    out = tmp_path_factory.mktemp("out")

    def train_one(name: str, spf: SPFConfig | None = None, **changes: Any) -> loop.Result:
        values: dict[str, Any] = {"steps": 4, "rank": 4, "learning_rate": 1e-2, "batch_size": 2, "seed": 3}
        settings = Settings(str(model), images, out / f"{name}.safetensors", spf, device="cpu", **(values | changes))
        return train(settings)

    return train_one


@pytest.fixture(scope="module")
def trained(run: Any) -> loop.Result:
    return run("spf", SPF, steps=4)


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_the_file_has_kohyas_names_shapes_and_metadata(trained: loop.Result) -> None:
    tensors = load_file(trained.path)
    modules = {name.split(".")[0] for name in tensors}
    assert len(modules) == 192
    assert len(tensors) == 192 * 3
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    assert tensors[query + ".lora_down.weight"].shape == (4, 32)
    assert tensors[query + ".lora_up.weight"].shape == (32, 4)
    assert float(tensors[query + ".alpha"]) == 4.0
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (4, 128, 1, 1)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with safe_open(trained.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_steps"] == "4"
    assert '"spf_target": "blonde hair"' in metadata["ss_network_args"]
    assert '"spf_stage2_start": "0"' in metadata["ss_network_args"]


def test_diffusers_loads_it_and_the_image_changes(trained: loop.Result, model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def image() -> np.ndarray:
        return pipeline(
            "blonde hair", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
            height=128, width=128,
        ).images[0]  # fmt: skip

    before = image()
    pipeline.load_lora_weights(str(trained.path.parent), weight_name=trained.path.name)
    assert np.abs(image() - before).max() > 1e-3
    # Every module arrived: as many LoRA layers as the file has, none of them still zero.
    ups = [p for name, p in pipeline.unet.named_parameters() if "lora_B" in name]
    assert len(ups) == 192
    assert all(float(p.detach().abs().max()) > 0 for p in ups)


def test_plain_and_spf_differ_and_only_spf_logs_its_terms(trained: loop.Result, run: Any) -> None:
    plain = run("plain", steps=4)
    assert not same(load_file(plain.path), load_file(trained.path))
    assert {"step", "loss", "lr", "spf/drift_outside", "spf/map_mean", "spf/output"} <= trained.history[-1].keys()
    assert plain.history[-1].keys() == {"step", "loss", "lr"}
    assert [row["step"] for row in trained.history] == list(range(4))


def test_without_weights_spf_is_plain_lora_byte_for_byte(run: Any) -> None:
    arguments = {"steps": 4, "network_args": {"dropout": "0.1"}}
    measured, plain = run("measured", MEASURE_ONLY, **arguments), run("unmeasured", **arguments)
    assert same(load_file(measured.path), load_file(plain.path))
    assert any("spf/drift_outside" in row for row in measured.history)
    assert measured.run is not None
    assert measured.run.drift is not None  # where docs/method.md sends who asks what plain training would have done
    assert measured.run.drift[1] > 0


def test_gradient_checkpointing_changes_nothing(trained: loop.Result, run: Any) -> None:
    checkpointed = run("checkpointed", SPF, steps=4, gradient_checkpointing=True)
    a, b = load_file(trained.path), load_file(checkpointed.path)
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-3, rtol=1e-2) for k in a)


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(run: Any, trained: loop.Result) -> None:
    content = trained.path.read_bytes()
    again = run("spf", SPF, steps=4)  # the same name: it is in the metadata
    assert again.path.read_bytes() == content
    other = run("other", SPF, steps=4, seed=4)
    assert not same(load_file(other.path), load_file(again.path))


def test_nothing_of_spf_is_left_on_the_trainer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = Trainer.__init__

    def remember(self: Any, *args: Any) -> None:
        original(self, *args)
        seen.append((self, set(vars(self)), set(vars(self.accelerator))))

    monkeypatch.setattr(Trainer, "__init__", remember)
    run("clean", SPF, steps=1)
    trainer, before, accelerator_before = seen[0]
    assert "generate_step_logs" not in vars(trainer)
    assert not {"backward", "end_training"} & set(vars(trainer.accelerator))
    assert set(vars(trainer)) - before == {"spf"}  # the closed attachment itself
    assert set(vars(trainer.accelerator)) == accelerator_before


def test_cross_attention_only_and_intermediate_files(run: Any) -> None:
    config = SPFConfig(target=HAIR, train="cross_attention")
    result = run("cross", config, save_every=2, steps=3)
    tensors = load_file(result.path)
    assert len(tensors) == 64 * 3
    assert all("_attn2_" in name for name in tensors)
    between = load_file(loop.numbered(result.path, 2))
    assert between.keys() == tensors.keys()
    assert not same(between, tensors)
    assert not loop.numbered(result.path, 3).exists()


@pytest.mark.parametrize("part", ["mid_block", "up_blocks"])
def test_layers_before_the_first_trained_module_carry_no_graph_and_that_is_no_fault(run: Any, part: str) -> None:
    result = run(f"part-{part}", replace(SPF, train=part), steps=2)
    tensors = load_file(result.path)
    assert all(part in name for name in tensors)
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_up" in name)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Loss and target against the formulas written out: min(snr, 5) / snr for noise, / (snr + 1) for velocity."""
    from types import SimpleNamespace

    alphas = torch.tensor([0.99, 0.7, 0.1])
    torch.manual_seed(0)
    latents, noise, prediction = torch.randn(3, 3, 4, 2, 2)
    for kind in ("epsilon", "v_prediction"):
        model = SimpleNamespace(process=Diffusion(alphas, kind))
        trainer: Any = SimpleNamespace(model=model, settings=SimpleNamespace(min_snr_gamma=5.0))
        expected = 0.0
        for b in range(3):
            a = float(alphas[b])
            snr = a / (1 - a)
            target = noise[b] if kind == "epsilon" else a**0.5 * noise[b] - (1 - a) ** 0.5 * latents[b]
            weight = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1)
            expected += weight * float(((prediction[b] - target) ** 2).mean()) / 3
        loss = Trainer.loss(trainer, prediction, latents, noise, torch.arange(3))
        assert float(loss) == pytest.approx(expected, rel=1e-5)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_flat_folders_and_repeats_are_read(tmp_path: Path) -> None:
    tiny.images(tmp_path)
    (tmp_path / "1_set").rename(tmp_path / "3_set")
    shutil.copy(tmp_path / "3_set" / "00.png", tmp_path / "flat.png")
    (tmp_path / "flat.txt").write_text("a  woman,\nblonde hair\n", encoding="utf-8")
    pictures = folders.read_folder(tmp_path)
    assert [(p.path.name, p.repeats) for p in pictures] == [("flat.png", 1)] + [(f"{i:02d}.png", 3) for i in range(4)]
    assert pictures[0].caption == "a woman, blonde hair"


def test_every_epoch_shows_every_image_as_often_as_it_repeats() -> None:
    batches = folders.endless_batches([1, 3, 2], 4, torch.Generator().manual_seed(0))
    seen = [i for _ in range(3) for i in next(batches)]
    for epoch in (seen[:6], seen[6:]):
        assert sorted(epoch) == [0, 1, 1, 1, 2, 2]


def test_images_are_resized_cropped_and_put_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((50, 200, 4), np.uint8)
    pixels[:, 100:, 3] = 255  # the right half is black, the left transparent
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cropped = folders.load_image(tmp_path / "a.png", 64)
    assert cropped.pixels.shape == (3, 64, 64)
    assert cropped.sizes == (50, 200, 0, 96, 64, 64)  # 256x64 after resizing: 96 cut off on either side
    assert float(cropped.pixels[:, :, :28].min()) == 1.0
    assert float(cropped.pixels[:, :, 36:].max()) == -1.0


# -- bad input --------------------------------------------------------------------------------------------------------


def spf_train(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command line, in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "spf_plugin", "train", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


def bad(base: Path, images: Path, out: Path, **changes: Any) -> str:
    """The message of a run that must fail and leave an older file at `out` alone."""
    old = b"an older file"
    if out.parent.is_dir() and not out.is_dir():
        out.write_bytes(old)
    values: dict[str, Any] = {"model": str(base), "data": images, "out": out, "spf": SPF, "steps": 2, "device": "cpu"}
    with pytest.raises(SPFError) as caught:
        train(Settings(**(values | changes)))
    if out.is_file():
        assert out.read_bytes() == old
    return str(caught.value)


def test_bad_folders(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "no such folder" in bad(model, tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in bad(model, tmp_path / "empty", out)
    lacking = tiny.images(tmp_path / "lacking")
    (lacking / "1_set" / "01.txt").unlink()
    (lacking / "1_set" / "03.txt").unlink()
    message = bad(model, lacking, out)
    assert "2 of 4 images" in message
    assert "01.png" in message
    assert "03.png" in message
    broken = tiny.images(tmp_path / "broken")
    (broken / "1_set" / "02.png").write_bytes(b"not an image")
    content = (broken / "1_set" / "03.png").read_bytes()
    (broken / "1_set" / "03.png").write_bytes(content[: len(content) // 2])
    message = bad(model, broken, out)
    assert "2 of 4 images cannot be read" in message
    assert "02.png" in message
    assert "03.png" in message


def test_bad_targets(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    message = bad(model, images, out, spf=SPFConfig(target=(Target("sunglasses"),)))
    assert "none of the 4 captions" in message
    assert "no target" in bad(model, images, out, spf=SPFConfig())
    spf = SPFConfig(target=(Target("blonde hair"),))
    for caption, says in (
        ("a tree, " * 40 + "blonde hair", "behind token 75 in all 4"),
        ("blonde hair", "say nothing else"),
    ):
        told = tiny.images(tmp_path / says[:4])
        for path in told.glob("*/*.txt"):
            path.write_text(caption, encoding="utf-8")
        assert says in bad(model, told, out, spf=spf)


def test_bad_models(model: Path, images: Path, tmp_path: Path, trained: loop.Result) -> None:
    out = tmp_path / "out.safetensors"
    assert "no model_index.json" in bad(model, images, out, model=str(images))
    assert "no such file" in bad(model, images, out, model=str(tmp_path / "none"))
    assert "is a LoRA" in bad(model, images, out, model=str(trained.path))
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    assert "only .safetensors" in bad(model, images, out, model=str(tmp_path / "old.ckpt"))
    (tmp_path / "cut.safetensors").write_bytes(trained.path.read_bytes()[:100])
    assert "damaged" in bad(model, images, out, model=str(tmp_path / "cut.safetensors"))
    other = tmp_path / "flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    assert "is a FluxPipeline" in bad(model, images, out, model=str(other))
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded" in bad(model, images, out, model=str(damaged))


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_quiet_and_the_libraries_bars_are_afterwards_as_before(
    model: Path, shown: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    for library in (logging, of_transformers):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()
    try:
        models.load(str(model))
        with pytest.raises(ZeroDivisionError), models.quiet():
            raise ZeroDivisionError
        assert logging.is_progress_bar_enabled() == of_transformers.is_progress_bar_enabled() == shown
    finally:
        logging.enable_progress_bar()
        of_transformers.enable_progress_bar()
    assert capfd.readouterr().err == ""


def test_bad_outputs_and_numbers(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    assert ".safetensors" in bad(model, images, tmp_path / "out.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    assert "is a folder" in bad(model, images, tmp_path / "folder.safetensors")
    (tmp_path / "file").write_bytes(b"")
    assert "nothing can be written" in bad(model, images, tmp_path / "file" / "out.safetensors")
    assert "multiple of 8" in bad(model, images, out, resolution=100)
    for resolution in (8, 16, 64):
        assert "must be more than 64" in bad(model, images, out, resolution=resolution)
    long = tmp_path / "long" / ("好" * 82 + ".safetensors")
    assert "258 bytes" in bad(model, images, long)
    assert not long.parent.exists()
    assert "no such module" in bad(model, images, out, network="networks.missing")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    assert "Make room" in bad(model, images, out)


def test_a_diverged_run_leaves_the_old_file(model: Path, images: Path, tmp_path: Path) -> None:
    assert "diverged" in bad(model, images, tmp_path / "out.safetensors", learning_rate=1e30, steps=6)


def test_a_disk_that_fills_up_while_saving_leaves_the_old_file(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    message = bad(model, images, tmp_path / "out.safetensors", spf=None)
    assert "the disk is full" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors"]


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_says_one_sentence_and_no_traceback(model: Path, images: Path, tmp_path: Path) -> None:
    common = ("--model", str(model), "--data", str(images), "--out", str(tmp_path / "o.safetensors"))
    words = ["train", *common, "--target", "blonde hair", "--spf", "map=sofft", "--spf", "mapp=soft"]
    refused = CliRunner().invoke(cli.app, words)
    assert refused.exit_code == 2
    assert "2 problems" in refused.output
    assert "did you mean" in refused.output
    for seed in (2**63, 10**30, -1):
        refused = CliRunner().invoke(cli.app, ["train", *common, "--plain", "--seed", str(seed)])
        assert refused.exit_code == 2
        assert isinstance(refused.exception, SystemExit)
    result = spf_train(*common[:-4], "--data", str(tmp_path), *common[-2:], "--plain")
    assert result.returncode == 2
    assert result.stderr.strip().startswith("SPF: --data")
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_and_names_every_command() -> None:
    code = "import sys, spf_plugin.tools.cli; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert "train" in result.output
    assert "lora" in result.output
    result = CliRunner().invoke(cli.app, ["lora", "check", "--help"])
    assert result.exit_code == 0
    assert "--loader" in result.output


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process")
def test_ctrl_c_saves_what_there_is(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    command = [sys.executable, "-u", "-m", "spf_plugin", "train", "--model", str(model), "--data", str(images)]
    command += ["--out", str(out), "--target", "blonde hair", "--steps", "100000", "--rank", "2", "--save-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not loop.numbered(out, 2).exists():  # training is under way
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "stopped after" in stdout
    tensors = load_file(out)
    assert len(tensors) == 192 * 3
    with safe_open(out, "pt") as file:
        assert 2 <= int(file.metadata()["ss_steps"]) < 100000


def test_an_interrupted_run_does_not_replace_an_older_file(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    older = run("older", steps=2)
    content = older.path.read_bytes()

    original = Trainer.loss
    calls: list[int] = []

    def loss(self: Any, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "loss", loss)
    before = signal.getsignal(signal.SIGINT)  # a program started in the background may have been told to ignore it
    result = run("older", steps=9)
    assert result.steps == 3
    assert result.path == loop.numbered(older.path, 3)
    assert older.path.read_bytes() == content
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("mode", ["anchor", "directional"])
def test_response_enhancement(
    run: Any, trained: loop.Result, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SPF, response=mode, clip=str(tiny.clip(tmp_path / "clip")))
    monkeypatch.setattr(limits, "MAX_LEVEL", 1.1)
    enhanced = run(f"response-{mode}", settings, steps=4)
    monkeypatch.setattr(limits, "MAX_RATIO", 0.0)
    limited = run(f"response-{mode}-limited", settings, steps=4)
    assert not same(load_file(enhanced.path), load_file(trained.path))
    assert same(load_file(limited.path), load_file(trained.path))
    assert all("spf/response" in row for row in enhanced.history[1:])


def test_lycoris_runs_eagerly_on_a_gpu_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself LyCORIS 4.1 tunes a kernel for every shape on a GPU, and the first step stands still for minutes."""
    from lycoris.kernels import dispatch

    gpu = torch.device("cuda:0")
    monkeypatch.delenv("LYCORIS_KERNEL_BACKEND", raising=False)
    network_module(loop.DEFAULT_NETWORK)
    assert dispatch.resolve_backend(None, gpu) == "torch"

    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "compile")
    network_module(loop.DEFAULT_NETWORK)
    assert os.environ["LYCORIS_KERNEL_BACKEND"] == "compile"
