"""What a run shows: warnings from hand-made histories, pictures of the toy loop."""

from __future__ import annotations

import gc
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spf_plugin.core.schedule import Discrete
from spf_plugin.enhancement.decoders import LinearDecoder, save_linear
from spf_plugin.families import latents
from spf_plugin.shown import preview
from spf_plugin.shown.watch import HISTORY, SAMPLES, Row, Watch, concerns
from spf_plugin.step import Step
from tests.test_attachment import CAPTIONS, UNPAIRED, Run


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "TILE", 48)


# -- warnings ---------------------------------------------------------------------------------------------------------


def history(count: int = HISTORY, **columns: Any) -> list[Row]:
    """Rows of a healthy run; a column is a number, or a function of the row's place from 0 to 1."""
    usual: dict[str, Any] = {"map_mean": 0.3, "drift_inside": lambda x: 0.1 + x, "drift_outside": 0.05}
    rows = []
    for i in range(count):
        row = {name: value(i / count) if callable(value) else value for name, value in {**usual, **columns}.items()}
        rows.append({f"spf/{name}": value for name, value in row.items() if value is not None})
    return rows


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, set()),
        ({"map_mean": 0.004}, {"empty"}),
        ({"map_mean": 0.004, "drift_inside": None}, {"empty"}),
        ({"map_mean": lambda x: 0.0 if x < 0.7 else 0.3}, set()),
        ({"map_mean": 0.97}, {"full"}),
        ({"map_mean": lambda x: 1.0 if x < 0.5 else 0.7}, set()),
        ({"map_mean": None}, set()),
        ({"drift_inside": 0.4, "drift_outside": lambda x: 0.01 + 0.2 * x}, {"drift"}),
        ({"drift_inside": lambda x: 0.1 + x, "drift_outside": lambda x: 0.01 + 0.2 * x}, set()),  # both: it learns
        ({"drift_inside": 0.4, "drift_outside": lambda x: 0.2 - 0.1 * x}, set()),
        ({"map_mean": 0.95}, {"full"}),
    ],
)
def test_concerns(columns: dict[str, Any], expected: set[str]) -> None:
    assert set(concerns(history(**columns))) == expected


def test_a_short_history_says_nothing() -> None:
    assert concerns([]) == {}
    assert concerns(history(HISTORY - 1, map_mean=0.0)) == {}


class FakeHost:
    """What the pictures need of a host."""

    vae: Any = None

    def __init__(self, output: Path, accelerator: Any = None):
        self.output, self.accelerator = output, accelerator


def watching(run: Run, host: FakeHost) -> Watch:
    host.accelerator = host.accelerator or run.host.accelerator
    run.spf.watch = Watch(run.spf.config, host, latents.SD)
    return run.spf.watch


def feed(watch: Watch, mean: float, count: int) -> None:
    for _ in range(count):
        watch.record({}, torch.full((2, 1, 4, 4), mean), torch.tensor([True, False]))


def test_a_warning_comes_once_until_things_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = watching(Run(CAPTIONS), FakeHost(tmp_path / "out"))
    feed(watch, 0.0, HISTORY - 1)
    assert not caplog.records
    feed(watch, 0.0, 3 * HISTORY)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "control map has been empty" in caplog.text
    feed(watch, 0.3, HISTORY)
    assert len(caplog.records) == 1
    feed(watch, 0.0, 2 * HISTORY)
    assert len(caplog.records) == 2


def test_steps_without_a_target_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = watching(Run(CAPTIONS), FakeHost(tmp_path / "out"))
    for _ in range(2 * HISTORY):  # the second sample has no target, so its map is 0
        watch.record(
            {}, torch.cat([torch.full((1, 1, 4, 4), 0.3), torch.zeros(1, 1, 4, 4)]), torch.tensor([True, False])
        )
        watch.record({}, torch.zeros(2, 1, 4, 4), torch.tensor([False, False]))
    assert not caplog.records


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "out-spf").iterdir())


def test_pictures_of_the_same_samples_every_n_steps(tmp_path: Path) -> None:
    captions = [f"a woman, {colour} coat, blonde hair" for colour in ("red", "green", "blue", "white", "black", "grey")]
    run = Run(captions, spf_preview_every="3")
    watching(run, FakeHost(tmp_path / "out"))
    for _ in range(6):
        run.step()
    expected = [f"sample{n}-step{s:08d}.png" for n in range(1, SAMPLES + 1) for s in (0, 4)]  # first steps of pairs
    assert pictures(tmp_path) == expected
    with Image.open(tmp_path / "out-spf" / expected[0]) as image:
        image.load()
        assert image.mode == "RGB"
        assert len(image.getcolors(1 << 24) or []) > 500  # words and maps, not an empty sheet


def test_zero_draws_nothing(tmp_path: Path) -> None:
    run = Run(CAPTIONS, spf_preview_every="0")
    watching(run, FakeHost(tmp_path / "out"))
    run.step()
    run.step()
    assert list(tmp_path.iterdir()) == []


def test_only_the_middle_noise_levels_and_never_a_preserved_sample(tmp_path: Path) -> None:
    run = Run(CAPTIONS)
    watch = watching(run, FakeHost(tmp_path / "out"))
    text = run.spf.text.for_batch(CAPTIONS, run.host.encode(CAPTIONS))
    yes = torch.tensor([True, True])

    def turns(which: Tensor, *timesteps: int) -> list[int]:
        nothing: Any = None
        t, schedule = torch.tensor(timesteps), run.host.noise_schedule
        return [i for i, _ in watch._turns(Step(1, text, which, t, run.z, schedule, nothing, nothing, nothing))]

    assert turns(yes, 500, 500) == [0, 1]
    assert turns(yes, 249, 250) == [1]
    assert turns(yes, 749, 750) == [0]
    assert turns(torch.tensor([False, True]), 500, 500) == [1]


def test_shuffled_captions_are_the_same_sample(tmp_path: Path) -> None:
    run = Run(["a woman, red coat, blonde hair"], spf_preview_every="1", **UNPAIRED)
    watching(run, FakeHost(tmp_path / "out"))
    run.step()
    run.step()
    run.captions = ["blonde hair, a woman, red coat"]
    run.step()
    assert pictures(tmp_path) == [f"sample1-step{step:08d}.png" for step in range(3)]


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions against their formula, the map and the attention against what the objective computed."""
    drawn: list[preview.Sample] = []
    real = preview.render
    monkeypatch.setattr(preview, "render", lambda sample: drawn.append(sample) or real(sample))
    linear = LinearDecoder.of(latents.SD)
    save_linear(linear, tmp_path / "linear.safetensors")
    run = Run(CAPTIONS, spf_decoder=str(tmp_path / "linear.safetensors"))
    host = FakeHost(tmp_path / "out")
    watching(run, host)
    prediction = run.step().detach()
    sample = drawn[1]
    assert sample.caption == CAPTIONS[1]
    assert list(sample.phrases) == ["blonde hair", "a man", "blue shirt"]
    abar = run.host.noise_schedule.alphas_cumprod[500]
    x0 = (run.z[1:] - (1 - abar).sqrt() * prediction[1:]) / abar.sqrt()
    torch.testing.assert_close(sample.trained, (linear(x0)[0] / 2 + 0.5).clamp(0, 1))
    assert sample.base.shape == sample.trained.shape == (3, 12, 16)
    assert not torch.equal(sample.base, sample.trained)
    means = [float(s.control.mean()) for s in drawn]
    assert np.mean(means) == pytest.approx(run.spf.numbers.values["spf/map_mean"], rel=1e-5)
    for heat in sample.phrases.values():
        assert float(heat.min()) == 0
        assert float(heat.max()) == pytest.approx(1)
    assert all(t.device.type == "cpu" and not t.requires_grad for t in (sample.base, sample.control))
    known = FakeHost(tmp_path / "out")
    known.vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=[128, 256, 512, 512]))
    colours = Watch(Run(CAPTIONS).spf.config, known, latents.SD)._colours(x0)
    torch.testing.assert_close(colours, (linear(x0)[0] / 2 + 0.5).clamp(0, 1))
    grey = Watch(Run(CAPTIONS).spf.config, host, latents.SD)._colours(x0)
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("caption", ["金髪の女性, 青い空", "ünïcode " * 200, "a\nb", ""])
@pytest.mark.parametrize("size", [(64, 64), (4, 40), (96, 33)])
def test_render_takes_any_words_and_shapes(caption: str, size: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    colours, heat = torch.rand(3, *size, generator=random), torch.rand(size, generator=random)
    phrases = {f"{caption} {i}": heat for i in range(20)}
    image = preview.render(preview.Sample(caption, "step 1", colours, colours, heat, phrases))
    assert image.width <= preview.COLUMNS * (preview.TILE + preview.GAP) + preview.GAP


def test_overlay_is_dark_where_held_and_bright_where_free() -> None:
    image = torch.full((3, 1, 3), 0.5)
    brightness = preview.overlay(image, torch.tensor([[0.0, 0.5, 1.0]])).mean(dim=0)[0]
    assert brightness[0] < brightness[1] < brightness[2]


class Tracker:
    def __init__(self, name: str):
        self.name, self.logged = name, []  # type: ignore[var-annotated]

    def log_images(self, values: dict[str, Any], **kwargs: Any) -> None:
        self.logged.append((values, kwargs))


def test_trackers_get_the_picture_in_the_form_that_each_takes(tmp_path: Path) -> None:
    run = Run(CAPTIONS)
    run.host.accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb"), Tracker("mlflow")]  # type: ignore
    watching(run, FakeHost(tmp_path / "out"))
    run.step()
    board, wandb, other = run.host.accelerator.trackers  # type: ignore[attr-defined]
    (values, options), _ = board.logged
    assert options == {"step": 0, "dataformats": "NHWC"}
    with Image.open(tmp_path / "out-spf" / "sample1-step00000000.png") as image:
        assert np.array_equal(values["spf/sample1"][0], np.asarray(image))
    (values, options), _ = wandb.logged
    assert options == {"commit": False}
    assert isinstance(values["spf/sample1"][0], Image.Image)
    assert other.logged == []


# -- what may not happen ----------------------------------------------------------------------------------------------


def test_a_refusing_disk_is_said_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out-spf").write_text("a file stands where the folder would be")
    run = Run(CAPTIONS, spf_preview_every="1", **UNPAIRED)
    watching(run, FakeHost(tmp_path / "out"))
    for _ in range(4):
        run.step()
    assert len(caplog.records) == 1
    assert "was not written" in caplog.text
    (tmp_path / "out-spf").unlink()
    run.step()  # it can be written again
    assert len(pictures(tmp_path)) == 2

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    run.step()
    run.step()
    assert len(caplog.records) == 2
    assert "No space left on device" in caplog.text
    assert not [name for name in pictures(tmp_path) if "partial" in name]


def test_any_other_mistake_ends_the_pictures_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(CAPTIONS, spf_preview_every="1")
    run.host.noise_schedule = Discrete(run.host.noise_schedule.alphas_cumprod, "sample")  # type: ignore[misc]
    watching(run, FakeHost(tmp_path / "out"))
    for _ in range(6):
        run.step()
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no more pictures of this run" in caplog.text


def test_training_is_the_same_with_and_without_pictures(tmp_path: Path) -> None:
    runs = [Run(CAPTIONS, spf_preview_every=n) for n in ("0", "1")]
    state = torch.get_rng_state()
    for run in runs:
        watching(run, FakeHost(tmp_path / "out"))
        for _ in range(5):
            run.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].host.accelerator.losses == runs[1].host.accelerator.losses
    assert torch.equal(runs[0].weight.grad, runs[1].weight.grad)  # type: ignore[arg-type]


def test_no_tensor_and_no_thread_of_a_picture_survives_it(tmp_path: Path) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    run = Run(CAPTIONS, spf_preview_every="1")
    watching(run, FakeHost(tmp_path / "out"))
    for _ in range(3):
        run.step()
    before, threads = tensors(), threading.active_count()
    for _ in range(10):
        run.step()
    assert tensors() == before
    assert threading.active_count() == threads
