"""The `self` anchor: aligned steps see the base model's own pictures, and nothing stays attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from portraitlab.lab import anchors, training
from portraitlab.lab.rows import Row
from portraitlab.lab.tasks import Task
from portraitlab.model_files import MODEL_FOLDER
from spf_plugin.trainer.loop import Trainer


def test_moved_keeps_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, others, noise = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3))
    alpha_bar = torch.tensor([0.9, 0.2])
    for i in range(2):
        a, b = float(alpha_bar[i]) ** 0.5, (1 - float(alpha_bar[i])) ** 0.5
        found = anchors.moved(
            a * latents[i : i + 1] + b * noise[i : i + 1], latents[i], others[i], alpha_bar[i : i + 1]
        )
        assert torch.allclose(found[0], a * others[i] + b * noise[i], atol=1e-6)


def test_only_aligned_steps_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.full((24, 4, 16, 16), 50.0)
    monkeypatch.setattr(anchors, "drawn_latents", lambda *_: own)
    calls: list[float] = []
    trainers: list[Trainer] = []
    original, run = Trainer.call_unet, Trainer.run

    def call_unet(self: Trainer, args: Any, accelerator: Any, unet: Any, noisy: torch.Tensor, *rest: Any) -> Any:
        calls.append(float(noisy.mean()))
        return original(self, args, accelerator, unet, noisy, *rest)

    def spy(self: Trainer, *args: Any) -> Any:
        trainers.append(self)
        return run(self, *args)

    monkeypatch.setattr(Trainer, "call_unet", call_unet)
    monkeypatch.setattr(Trainer, "run", spy)
    row = Row({"stage2_start": 2, "every": 1, "min_timestep": 0}, anchor="self")
    out = tmp_path / "loras" / "x.safetensors"
    training.train_row(Task(steps=3, batch=1), row, 1e-3, 0, MODEL_FOLDER, out, "cpu", "x", lambda *_: None)
    assert out.exists()
    assert len(calls) == 4  # two plain steps, then reference and response
    assert calls[2] == calls[3]
    assert calls[2] > 3 > max(map(abs, calls[:2]))
    assert "call_unet" not in vars(trainers[0])
    assert "backward" not in vars(trainers[0].accelerator)
