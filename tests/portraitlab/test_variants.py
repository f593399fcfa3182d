"""SPF with other pairs than in time: which passes run, on what, and where the diffusion loss acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor

from portraitlab.lab import training, variants
from portraitlab.lab.rows import ROWS
from portraitlab.lab.tasks import Task
from portraitlab.model_files import MODEL_FOLDER
from spf_plugin.pairs import Partner
from spf_plugin.seam import Call
from spf_plugin.trainer.processes import Diffusion


@dataclass
class Pass:
    """A forward of the denoiser, after everybody's hooks."""

    trains: bool
    noisy: Tensor
    timesteps: Tensor
    text: Tensor
    output: Tensor
    weight: Tensor  # one of the LoRA's


@dataclass
class Seen:
    """What a run did."""

    passes: list[Pass] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)  # of the diffusion loss at what the denoiser gave, step by step
    clipped: int = 0  # optimiser steps
    spf: Any = None

    @property
    def order(self) -> str:
        """`r` for a reference pass, `t` for a training one."""
        return "".join("t" if one.trains else "r" for one in self.passes)

    def of(self, kind: str) -> list[Pass]:
        return [one for one in self.passes if one.trains == (kind == "t")]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Task], Seen]:
    """Trains a row of the lab on the embedded model and looks."""
    seen = Seen()
    timed, clip = training.timed_training, Accelerator.clip_grad_norm_

    def watched(run: Any, label: str, show: Any, attach: Any) -> Any:
        def attached(network: Any, trainer: Any) -> Callable[[], None]:
            detach = attach(network, trainer)
            seen.spf, loss = network.spf, trainer.loss

            def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
                text, weight = kwargs["encoder_hidden_states"], list(network.parameters())[-1].detach().clone()
                seen.passes.append(Pass(torch.is_grad_enabled(), *args, text, output.sample, weight))

            def slope(*args: Tensor) -> Tensor:
                value = loss(*args)
                if value.requires_grad:  # not that of a second step, which has a constant in place of a prediction
                    found = torch.autograd.grad(value, seen.passes[-1].output, retain_graph=True)[0]
                    seen.slopes.append(found.abs().amax(dim=(1, 2, 3)))
                return value

            trainer.model.denoiser.register_forward_hook(keep, with_kwargs=True)
            trainer.loss = slope
            return detach

        return timed(run, label, show, attached)

    def clipped(self: Accelerator, *args: Any) -> Any:
        seen.clipped += 1
        return clip(self, *args)

    def train(row: str, task: Task) -> Seen:
        out = tmp_path / "loras" / "x.safetensors"
        training.train_row(task, ROWS[row], 1e-2, 0, MODEL_FOLDER, out, "cpu", "x", lambda *_: None)
        return seen

    monkeypatch.setattr(training, "timed_training", watched)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipped)
    return train


def test_pairs_in_the_batch(trained: Any) -> None:
    """Two pictures twice at the same noise, second with the base captions, on which the diffusion loss has no slope."""
    seen = trained("spf-pairs-in-batch", Task(steps=3, batch=4))
    assert seen.order == "rt" * 3
    for reference, response, slope in zip(seen.of("r"), seen.of("t"), seen.slopes, strict=True):
        for part in (response.noisy, response.timesteps, reference.text):
            assert len(part) == 4
            assert torch.equal(part[:2], part[2:])
        assert torch.equal(response.text[2:], reference.text[2:])
        for full, base in zip(response.text[:2], response.text[2:], strict=True):
            assert not torch.equal(full, base)
        assert (slope > 0).tolist() == [True, True, False, False]
    assert seen.clipped == 3


def test_base_captions_on_noise_of_their_own(trained: Any) -> None:
    seen = trained("spf-base-captions", Task(steps=4, batch=2))
    assert seen.order == "rt" * 4
    for step, (reference, response, slope) in enumerate(zip(seen.of("r"), seen.of("t"), seen.slopes, strict=True)):
        base = step % 2 == 1
        assert torch.equal(reference.text, response.text) == base
        assert (slope > 0).tolist() == [not base] * 2
    for first, second in zip(seen.of("t")[::2], seen.of("t")[1::2], strict=True):
        assert not torch.equal(first.noisy, second.noisy)


def test_the_second_step_of_every_second_pair(trained: Any) -> None:
    seen = trained("spf-every-second-pair", Task(steps=7, batch=1))
    assert seen.order == "rtt" + "rt" + "rtt" + "rt" + "rt"
    first, second = seen.of("t")[:2]
    assert torch.equal(first.noisy, second.noisy)
    assert not torch.equal(first.text, second.text)


@pytest.mark.parametrize("kind", ["noisy", "clear"])
def test_which_samples_have_a_second_step(kind: str) -> None:
    class Known:
        """Of the trainer and of SPF's family, what a variant asks for."""

        process = Diffusion(torch.ones(1000), "epsilon")

        @staticmethod
        def timesteps(call: Call) -> Tensor:
            return call.args[1]

    def partner(timesteps: list[int], which: list[bool]) -> Partner:
        call = Call((torch.zeros(len(which)), torch.tensor(timesteps)), {})
        return Partner(call, torch.zeros(len(which)), torch.tensor(which), True, (), ())

    variant = variants.KINDS[f"pairs_{kind}"]()
    variant.trainer = type("T", (), {"model": Known})()  # type: ignore[assignment]
    variant.spf = type("A", (), {"family": Known})()  # type: ignore[assignment]
    noisy = kind == "noisy"
    shown = variant.second(partner([0, 499, 500, 999, 700], [True, True, True, True, False]))
    assert shown is not None
    assert shown.which.tolist() == [not noisy, not noisy, noisy, noisy, False]
    assert variant.second(partner([100, 900], [noisy, not noisy])) is None


def test_second_steps_where_it_is_noisy(trained: Any) -> None:
    """Of four samples one has a second step or none has; then the next step is the first of a pair."""
    seen = trained("spf-pairs-noisy", Task(steps=8, batch=1))
    passes, expected = list(seen.passes), ""
    while passes:
        expected += "rt"
        first = passes[1]
        del passes[:2]
        if passes and int(first.timesteps) >= 500:
            expected += "t"
            second = passes.pop(0)
            assert torch.equal(second.noisy, first.noisy)
    assert seen.order == expected
    assert "rtr" in expected
    assert "rtt" in expected


def test_single_images_whose_gradients_add_up(trained: Any) -> None:
    seen = trained("spf-batch-1", Task(steps=2, batch=4))
    assert seen.order == "rtt" * 4  # two pairs in each of two optimiser steps
    assert {len(one.noisy) for one in seen.passes} == {1}
    assert seen.clipped == seen.spf.step == 2
    weights = [one.weight for one in seen.of("t")]
    assert all(torch.equal(weight, weights[0]) for weight in weights[:4])
    assert all(torch.equal(weight, weights[4]) for weight in weights[4:])
    assert not torch.equal(weights[0], weights[4])
    assert GradientState().num_steps == 1  # for the next run of this process
    assert GradientState().sync_gradients
