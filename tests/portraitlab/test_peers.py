"""The lab's tasks and peers: masks and prompts, and each peer's step against a slow version of its formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portraitlab.lab import peers, training
from portraitlab.lab.rows import ROWS
from portraitlab.lab.tasks import Task
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.portraits import counterfactual


@pytest.mark.parametrize("target", ["blonde", "sunglasses", "shades", "hoodie"])
def test_masks_cover_the_targets_region_and_little_more(target: str) -> None:
    task = Task(target)
    masks, goal = task.masks(0), task.goal
    assert masks.shape == (24, 1, 16, 16)
    for mask, example in zip(masks[:4], task.examples(0), strict=False):
        base = {**goal.before} if goal.before else {n: False for n, v in goal.changes.items() if v is True}
        region = counterfactual(example.person, 128, **(base or {"hair_colour": "black"})).region
        fine = np.kron(mask[0].numpy(), np.ones((8, 8))) > 0
        assert region.any()
        assert not (region & ~fine).any()
        for y, x in zip(*np.nonzero(mask[0].numpy()), strict=True):
            assert region[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any()


def test_replacements_name_what_they_replace() -> None:
    for target, phrase, replaced in (("shades", "sunglasses", "glasses"), ("hoodie", "hoodie", "t-shirt")):
        task = Task(target)
        for prompt in task.evaluation():
            assert replaced in prompt.base_prompt.replace("sunglasses", "")
            assert prompt.target_prompt == prompt.base_prompt.replace(replaced, phrase)
        for example in task.examples(0):
            assert task.goal.present(example.person)
            assert example.caption == example.base_caption.replace(replaced, phrase)


class Trainer:
    """As much of the reference trainer as a peer asks for."""

    class model:
        alphas_cumprod = torch.linspace(0.99, 0.01, 1000)

        @staticmethod
        def encode(prompts: list[str]) -> torch.Tensor:
            return torch.tensor([[[float(len(prompt))]] for prompt in prompts])

    class accelerator:
        device = torch.device("cpu")


@pytest.fixture
def step() -> Any:
    """A step whose prediction is `weight * (1 + text)`, plus 10 while the adapter is bypassed."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([100, 700])
    alpha_bar = Trainer.model.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    weight = torch.randn(2, 4, 16, 16, generator=generator).requires_grad_()
    state = {"off": 0.0}

    def predict(conds: torch.Tensor, **_: Any) -> torch.Tensor:
        return weight * (1 + conds.mean(dim=(1, 2)).view(-1, 1, 1, 1)) + state["off"]

    @contextmanager
    def bypassed() -> Iterator[None]:
        state["off"] = 10.0
        yield
        state["off"] = 0.0

    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    batch = {"latents": latents, "indices": [3, 5]}
    full, base = torch.full((2, 1, 1), 2.0), torch.full((2, 1, 1), 0.5)
    made = peers.Step(Trainer, predict, bypassed, noisy, timesteps, batch, full, base)  # type: ignore[arg-type]
    made.truth, made.weight = noise, weight  # type: ignore[attr-defined]
    return made


def test_masked_loss_is_the_weighed_square_of_the_error(step: Any) -> None:
    peer = peers.Masked(Task(), 0, outside=0.1, prior=2.0)
    peer.prepare(Trainer)  # type: ignore[arg-type]
    prediction, extra = peer.step(step)
    mask = Task().masks(0)[[3, 5]]
    error = (3 * step.weight - step.truth) ** 2
    expected = torch.where(mask.bool(), error, 0.1 * error)
    assert torch.allclose((prediction - step.truth) ** 2, expected, atol=1e-4)
    prior = 1.5 * step.weight + 10
    assert extra is not None
    assert torch.allclose(extra, 2 * ((1 - mask) * (3 * step.weight - prior) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("blank", [False, True])
def test_output_preservation_compares_the_same_text(step: Any, blank: bool) -> None:
    peer = peers.OutputPreservation(Task(), 0, multiplier=3.0, blank=blank)
    peer.prepare(Trainer)  # type: ignore[arg-type]
    prediction, extra = peer.step(step)
    assert torch.equal(prediction, 3 * step.weight)
    assert extra is not None
    assert float(extra.detach()) == pytest.approx(300.0, rel=1e-5)  # the paths differ by 10 everywhere
    extra.backward()
    slope = 1.0 if blank else 1.5
    assert torch.allclose(step.weight.grad, torch.full_like(step.weight, 3 * 2 * -10 * slope / step.weight.numel()))


def test_pure_cc_takes_the_least_squares_share_of_the_direction(step: Any) -> None:
    peer = peers.PureCC(Task(), 0, eta=2.0)
    direction = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    class Extractor:
        def __call__(self, noisy: Any, timesteps: Any, encoder_hidden_states: torch.Tensor) -> Any:
            shown = direction * encoder_hidden_states.mean()  # the texts are 1 (target) and 0 (empty)
            return type("Output", (), {"sample": shown})

    peer.unet, peer.texts = Extractor(), torch.tensor([[[1.0]], [[0.0]]])  # type: ignore[assignment]
    full, extra = peer.step(step)
    base = 1.5 * step.weight + 10
    change = (full - base).detach().flatten(1).double().numpy()
    axis = direction.flatten(1).double().numpy()
    left = []
    for moved, along in zip(change, axis, strict=True):
        share, *_ = np.linalg.lstsq(along[:, None], moved, rcond=None)
        left.append(((moved - share[0] * along) ** 2).mean())
    assert extra is not None
    assert float(extra.detach()) == pytest.approx(2 * np.mean(left), rel=1e-4)


def test_pure_cc_as_released_adds_the_base_models_direction_to_the_trained_models_base(step: Any) -> None:
    peer = peers.PureCCReleased(Task(), 0, eta=2.0)
    peer.texts = torch.tensor([[[1.0]], [[0.0]]])
    full, extra = peer.step(step)
    assert torch.equal(full, 3 * step.weight)
    # f(full) - f(base) = 1.5 w; f_0(target) - f_0("") = (2 w + 10) - (w + 10) = w.
    assert extra is not None
    assert float(extra.detach()) == pytest.approx(float(2 * (0.5 * step.weight).square().mean().detach()), rel=1e-4)
    extra.backward()
    # The direction is a constant; both predictions carry a graph, so the slope of f(full) - f(base) is 1.5.
    assert torch.allclose(step.weight.grad, 2 * 2 * 0.5 * step.weight.detach() * 1.5 / step.weight.numel())


def test_a_peer_trains_and_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One real run of two steps: the base model is the reference, and nothing stays attached."""
    seen: list[Any] = []
    original = peers.OutputPreservation.step

    def spy(self: Any, step: peers.Step) -> Any:
        seen.append((step.trainer, step.prior(step.base), step.predict(step.base).detach()))
        return original(self, step)

    monkeypatch.setattr(peers.OutputPreservation, "step", spy)
    task, out = Task(steps=2, batch=1), tmp_path / "loras" / "x.safetensors"
    training.train_row(task, ROWS["dop-1"], 1e-2, 0, MODEL_FOLDER, out, "cpu", "x", lambda *_: None)
    assert out.exists()
    assert len(seen) == 2
    assert torch.equal(seen[0][1], seen[0][2])  # a fresh LoRA changes nothing
    assert not torch.allclose(seen[1][1], seen[1][2], atol=1e-5)
    assert "call_unet" not in vars(seen[0][0])
