"""The lab's tasks and peers: masks and prompts, and each peer's step against a slow version of its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lycoris.modules.locon import LoConModule
from torch import Tensor, nn

from portraitlab.lab import peers, training
from portraitlab.lab.rows import ROWS, Row
from portraitlab.lab.tasks import Task
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.portraits import counterfactual
from spf_plugin.families.unet import UNet
from spf_plugin.seam import Call
from spf_plugin.trainer.processes import Diffusion


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


class Denoiser(nn.Module):
    """Predicts `weight * (1 + text)`, plus `shift`, which a bypassed adapter makes 10."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.shift = weight, 0.0

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.weight * (1 + encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1)) + self.shift


class Trainer:
    """As much of the reference trainer as a peer asks for."""

    class model:
        process = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon")

        @staticmethod
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            return {"hidden": torch.tensor([[[float(len(prompt))]] for prompt in prompts])}

    class accelerator:
        device = torch.device("cpu")

        @staticmethod
        def backward(loss: Tensor) -> None:
            loss.backward()

    batch: Any = None


def constant(value: float) -> dict[str, Tensor]:
    """A text of one row."""
    return {"hidden": torch.full((1, 1, 1), value)}


@pytest.fixture
def step() -> Any:
    """A step for captions that are 2 and base captions that are 0.5."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([100, 700])
    alpha_bar = Trainer.model.process.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    denoiser = Denoiser(torch.randn(2, 4, 16, 16, generator=generator).requires_grad_())

    @contextmanager
    def bypassed() -> Iterator[None]:
        denoiser.shift = 10.0
        yield
        denoiser.shift = 0.0

    trainer = Trainer()
    trainer.batch = {"latents": latents, "indices": [3, 5]}
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    call = Call((noisy, timesteps), {"encoder_hidden_states": torch.full((2, 1, 1), 2.0)})
    made = peers.Step(trainer, UNet(denoiser), call, bypassed, constant(0.5))  # type: ignore[arg-type]
    made.truth, made.weight = noise, denoiser.weight  # type: ignore[attr-defined]
    return made


def taken(peer: peers.Peer, step: peers.Step) -> tuple[Tensor, Tensor | None]:
    """A peer's step around the trainer's own call."""
    work = peer.step(step)
    next(work)
    with pytest.raises(StopIteration) as end:
        work.send(step.predict(step.call))
    return end.value.value


def test_masked_loss_is_the_weighed_square_of_the_error(step: Any) -> None:
    peer = peers.Masked(outside=0.1, prior=2.0)
    peer.prepare(Trainer(), Task(), 0)  # type: ignore[arg-type]
    prediction, extra = taken(peer, step)
    mask = Task().masks(0)[[3, 5]]
    error = (3 * step.weight - step.truth) ** 2
    expected = torch.where(mask.bool(), error, 0.1 * error)
    assert torch.allclose((prediction - step.truth) ** 2, expected, atol=1e-4)
    prior = 1.5 * step.weight + 10
    assert extra is not None
    assert torch.allclose(extra, 2 * ((1 - mask) * (3 * step.weight - prior) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("blank", [False, True])
def test_output_preservation_compares_the_same_text(step: Any, blank: bool) -> None:
    peer = peers.OutputPreservation(multiplier=3.0, blank=blank)
    peer.prepare(Trainer(), Task(), 0)  # type: ignore[arg-type]
    prediction, extra = taken(peer, step)
    assert torch.equal(prediction, 3 * step.weight)
    assert extra is not None
    assert float(extra.detach()) == pytest.approx(300.0, rel=1e-5)  # the paths differ by 10 everywhere
    extra.backward()
    slope = 1.0 if blank else 1.5
    assert torch.allclose(step.weight.grad, torch.full_like(step.weight, 3 * 2 * -10 * slope / step.weight.numel()))


def test_pure_cc_takes_the_least_squares_share_of_the_direction(step: Any) -> None:
    peer = peers.PureCC(eta=2.0)
    direction = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    class Extractor:
        def __call__(self, noisy: Any, timesteps: Any, encoder_hidden_states: torch.Tensor) -> Any:
            shown = direction * encoder_hidden_states.mean()  # the texts are 1 (target) and 0 (empty)
            return type("Output", (), {"sample": shown})

    peer.first, peer.target, peer.empty = Extractor(), constant(1), constant(0)  # type: ignore[assignment]
    full, extra = taken(peer, step)
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
    peer = peers.PureCCReleased(eta=2.0)
    peer.target, peer.empty = constant(1), constant(0)
    full, extra = taken(peer, step)
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
        seen.append((step.trainer, step.prior(step.base), step.predict(step.showing(step.base)).detach()))
        return original(self, step)

    monkeypatch.setattr(peers.OutputPreservation, "step", spy)
    task, out = Task(steps=2, batch=1), tmp_path / "loras" / "x.safetensors"
    training.train_row(task, ROWS["dop-1"], 1e-2, 0, MODEL_FOLDER, out, "cpu", "x", lambda *_: None)
    assert out.exists()
    assert len(seen) == 2
    assert torch.equal(seen[0][1], seen[0][2])  # a fresh LoRA changes nothing
    assert not torch.allclose(seen[1][1], seen[1][2], atol=1e-5)
    assert not hooks(seen[0][0])


def test_a_peer_lets_calls_pass_that_are_no_training_step(step: Any) -> None:
    trainer, denoiser, taken = step.trainer, step.family.denoiser, []
    trainer.batch = {**trainer.batch, "captions": ["a", "b"]}

    class Peer(peers.OutputPreservation):
        def step(self, step: peers.Step) -> peers.Work:
            taken.append(step)
            return super().step(step)

    with peers.stepping(Peer(), trainer, step.family, step.bypassed, lambda _: step.base):
        with torch.no_grad():
            step.call.on(denoiser)
        trainer.batch, batch = None, trainer.batch
        step.call.on(denoiser)
        assert not taken
        trainer.batch = batch
        step.call.on(denoiser)
        assert len(taken) == 1


def hooks(trainer: Any) -> list[Any]:
    """What is still attached to a trainer."""
    unet = trainer.model.denoiser
    left = [*unet._forward_pre_hooks.values(), *unet._forward_hooks.values()]
    return [*left, *(name for name in vars(trainer.accelerator) if name == "backward")]


def dense_penalty(factors: Sequence[Tensor], scale: float = 1.0) -> tuple[float, list[Tensor]]:
    """`sum |scale up down|^2` and its gradients, from full matrices in float64; `factors`: down, up, down, up ..."""
    leaves = [factor.detach().double().requires_grad_() for factor in factors]
    changes = [scale * up.flatten(1) @ down.flatten(1) for down, up in zip(leaves[::2], leaves[1::2], strict=True)]
    value = torch.stack([change.square().sum() for change in changes]).sum()
    return value.item(), list(torch.autograd.grad(value, leaves))


class Small(nn.Module):
    """A UNet of a convolution and a linear layer on its pixels: `[B, 4, h, w]` to `[B, h w, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Linear(6, 5)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.second(self.first(noisy).flatten(2).mT)


@pytest.fixture
def adapted() -> tuple[Small, nn.ModuleList]:
    """A small UNet and a LoRA of rank 4 and scale 1/2 that changes both of its layers."""
    torch.manual_seed(0)
    unet = Small()
    layers = {"first": unet.first, "second": unet.second}
    network = nn.ModuleList(LoConModule(name, layer, 1.0, 4, 2, bypass_mode=True) for name, layer in layers.items())
    for lora in network:
        nn.init.normal_(lora.lora_up.weight)
        lora.apply_to()
    return unet, network


def test_the_weight_penalty_is_the_squared_change_of_the_weights(adapted: Any) -> None:
    _, network = adapted
    network.append(LoConModule("kernel", nn.Conv2d(4, 6, 3), 1.0, 4, 2, bypass_mode=True))
    nn.init.normal_(network[-1].lora_up.weight)
    peer = peers.WeightPenalty()
    with peer.applied(network):
        penalty = peer.penalty()
    factors = list(network.parameters())
    value, gradients = dense_penalty(factors, scale=0.5)
    assert penalty.item() == pytest.approx(value, rel=1e-5)
    for found, expected in zip(torch.autograd.grad(penalty, factors), gradients, strict=True):
        assert torch.allclose(found.flatten(1).double(), expected.flatten(1), rtol=1e-4, atol=1e-6)


def test_t_lora_masks_the_ranks_of_every_sample_by_its_timestep(adapted: Any) -> None:
    unet, network = adapted
    peer = peers.TLoRA(minimum=0.25)
    peer.family, peer.rank, peer.timesteps = UNet(unet), 4, 1000
    noisy, timesteps = torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    ranks = [4, 2, 1]  # 1 + floor(3 (1 - t / 1000))
    with peer.applied(network):
        masked = unet(noisy, timesteps)
        gradients = [torch.autograd.grad(one.sum(), list(network.parameters()), retain_graph=True) for one in masked]
    assert "forward" not in vars(unet)
    assert not any("bypass_forward_diff" in vars(lora) for lora in network)

    whole = [lora.lora_up.weight.detach().clone() for lora in network]
    for sample, rank in enumerate(ranks):  # one after the other, without the columns of the last ranks
        for lora, weight in zip(network, whole, strict=True):
            lora.lora_up.weight.data = weight.clone()
            lora.lora_up.weight.data[:, rank:] = 0
        assert torch.allclose(masked[sample], unet(noisy[sample : sample + 1], timesteps)[0], atol=1e-5)
        for down, up in zip(gradients[sample][::2], gradients[sample][1::2], strict=True):
            for trained in (down.flatten(1).abs().sum(1), up.flatten(1).abs().sum(0)):
                assert (trained > 0).tolist() == [True] * rank + [False] * (4 - rank)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[list[Tensor], list[Tensor]]]]:
    """A pair of steps of SPF, alone or with a peer: weights and gradients of each, down before up."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    clipped = Accelerator.clip_grad_norm_

    def clip(self: Accelerator, parameters: list[nn.Parameter], limit: float) -> Any:
        seen.append(([p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))  # type: ignore
        return clipped(self, parameters, limit)

    def train(**peer: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
        seen.clear()
        row = Row({}, **peer)
        task, out = Task(steps=2, batch=1), tmp_path / "loras" / "x.safetensors"
        training.train_row(task, row, 1e-2, 0, MODEL_FOLDER, out, "cpu", "x", lambda *_: None)
        return list(seen)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    return train


def test_a_weight_penalty_adds_to_spf(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = []
    monkeypatch.setattr(peers.WeightPenalty, "prepare", lambda _, trainer, *__: trainers.append(trainer))
    weights, alone = trained()[1]
    present, both = trained(peer="weight_penalty", options={"multiplier": 0.1}, with_spf=True)[1]
    assert all(map(torch.equal, present, weights))  # the first step has no change to penalise
    _, penalty = dense_penalty(weights)
    assert max(added.abs().max() for added in penalty) > 1e-3
    for found, without, added in zip(both, alone, penalty, strict=True):
        assert torch.allclose(found, without + 0.1 * added.float(), rtol=1e-3, atol=1e-6)
    assert not hooks(trainers[0])


def test_t_lora_masks_both_steps_of_a_pair(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, original = [], peers.TLoRA.mask

    def mask(self: peers.TLoRA, timesteps: Tensor) -> Tensor:
        masks.append(original(self, timesteps))
        return masks[-1]

    (_, first), (_, second) = trained()
    monkeypatch.setattr(peers.TLoRA, "mask", mask)
    (_, masked_first), (_, masked_second) = trained(peer="t_lora", options={"minimum": 0.25}, with_spf=True)
    assert 2 <= masks[0].sum() < 8
    for found, whole in zip(masked_first[1::2], first[1::2], strict=True):  # every `up` is 0: nothing else differs
        assert torch.allclose(found.flatten(1), whole.flatten(1) * masks[0], rtol=1e-3, atol=1e-6)
    assert len(masks) > 1  # the second step has the first one's noise level
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])
    for found, whole in zip(masked_second[1::2], second[1::2], strict=True):
        assert not (found.flatten(1) * (1 - masks[0])).any()
        assert found.any() == whole.any()
