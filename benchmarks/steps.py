"""One training step of plain LoRA, of SPF, and of the peers, on the same model and data.

SPF runs through `spf_plugin.attachment`, exactly as in training. The peers have no code here: their steps are written
from what they publish (formulas at `dop` and `pure_cc`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.unets import CONFIGS, POOLED, base_model, lora
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.attachment import Attachment
from spf_plugin.config import BASES, PREFIX, SPFConfig, parse
from spf_plugin.core import objective
from spf_plugin.families import unet as probe
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.pairs import Partner
from spf_plugin.text import Conds, map_conds
from spf_plugin.trainer.loop import Trainer
from spf_plugin.trainer.settings import Settings

CAPTION = "a woman in a brown jacket, curtain background, smiling, blonde hair"
TARGET = "blonde hair"
TOKENS = 77
STEPS = 1000
TIMESTEP = 500
NOT_LOGGED = 1  # a step number of stage 2 at which nothing is logged
DOP_MULTIPLIER = 1.0
PURE_CC_ETA = 2.0

Mark = Callable[[str], None]
Step = Callable[[Mark], None]


@dataclass(frozen=True)
class Setup:
    """A model, a batch and what the trainer was told.

    Attributes:
        family: `sd1`, `sd2`, `sdxl` or `tiny`.
        resolution: side length in pixels.
        batch: images.
        checkpointing: gradient checkpointing.
        rank: of the LoRA.
        weights: `bf16`; `fp8` (sd-scripts' `fp8_base`); `int8` or `nf4` (`spf_base`); `fp32` trains without mixed
            precision.
        device: `cpu`, `cuda`, or `meta` for tensors without data.
    """

    family: str = "sd1"
    resolution: int = 512
    batch: int = 1
    checkpointing: bool = True
    rank: int = 16
    weights: str = "bf16"
    device: str = "meta"


WEIGHTS = {"fp8": torch.float8_e4m3fn, "fp32": torch.float32}


class Accelerator:
    """What the reference trainer and SPF need of accelerate's, for one process."""

    sync_gradients = True
    num_processes = 1

    def __init__(self, setup: Setup):
        self.device, self._mixed = torch.device(setup.device), setup.weights != "fp32"

    def autocast(self) -> AbstractContextManager[Any]:
        device = "cpu" if self.device.type == "meta" else self.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._mixed)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def end_training(self) -> None:
        pass


class Host(ReferenceHost):
    """The reference trainer's host, with words for tokens and random text embeddings: the text encoder is no part of a
    step whose captions are cached."""

    def __init__(self, trainer: Trainer, setup: Setup):
        super().__init__(trainer)
        self._setup = setup

    def tokenize(self, text: str) -> Sequence[int]:
        return list(range(len(text.replace(",", " , ").split())))

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Conds:
        hidden = torch.randn(len(prompts), TOKENS, CONFIGS[self._setup.family]["cross_attention_dim"])
        if self._setup.family not in POOLED:
            return hidden
        return [hidden, torch.randn(len(prompts), POOLED[self._setup.family])]


@dataclass
class Workbench:
    """A model with a LoRA, ready to train; `plain`, `spf`, `preservation`, `dop` and `pure_cc` make one step each.

    Nothing is cached between steps but what the trainers cache too.
    """

    setup: Setup
    host: Host = field(init=False)
    network: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        model = base_model(setup.family, WEIGHTS.get(setup.weights, torch.bfloat16), setup.device)
        self.unet_parameters = sum(p.numel() for p in model.unet.parameters())
        settings = Settings(
            model=setup.family,
            data=Path(),
            out=Path(),
            steps=STEPS,
            rank=setup.rank,
            batch_size=setup.batch,
            mixed_precision="no" if setup.weights == "fp32" else "bf16",
        )
        self.trainer = Trainer(settings, model, Accelerator(setup))
        self.host = Host(self.trainer, setup)
        self.network, self.adapter = lora(model, setup.rank, setup.device), Adapter()
        if setup.weights in BASES[1:]:
            QuantisedBase(model.unet, setup.weights, torch.device(setup.device))
        with self.adapter.watching([model.unet]):
            self.network.apply_to([], model.unet, apply_text_encoder=False, apply_unet=True)  # type: ignore[operator]
        self.network.requires_grad_(True).train()
        self.unet = model.unet.train()
        if setup.checkpointing:
            self.unet.enable_gradient_checkpointing()
        side = setup.resolution // model.latent_scale
        shape, device = (setup.batch, 4, side, side), setup.device
        self.latents, self.noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.timesteps = torch.tensor([TIMESTEP] * setup.batch, device=device)
        conds = (self.host.encode([text] * setup.batch) for text in (CAPTION, TARGET))
        self.full, self.base = (map_conds(lambda c: c.to(device), cond) for cond in conds)
        self.batch = {
            "captions": [CAPTION] * setup.batch,
            "sizes": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * setup.batch, device=device),
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def predict(self, conds: Conds, times: int = 1) -> Tensor:
        """The trainer's own call, `[B * times, 4, h, w]`."""
        batch = {**self.batch, "sizes": self.batch["sizes"].repeat(times, 1)}  # type: ignore[attr-defined]
        trainer = self.trainer
        return trainer.call_unet(
            trainer.settings,
            self.host.accelerator,
            self.unet,
            self.latents.repeat(times, 1, 1, 1),
            torch.tensor([TIMESTEP] * (self.setup.batch * times), device=self.setup.device),
            conds,
            batch,
            trainer.weight_dtype,
        )

    def loss(self, prediction: Tensor) -> Tensor:
        """The diffusion loss."""
        return self.trainer.loss(prediction, self.latents, self.noise, self.timesteps)

    def clear(self) -> None:
        """Drop the gradients, as every optimizer step does."""
        for parameter in self.parameters:
            parameter.grad = None

    def plain(self, mark: Mark) -> None:
        """Plain LoRA."""
        loss = self.loss(self.predict(self.full))
        mark("forward")
        self.host.accelerator.backward(loss)
        mark("backward")

    @contextmanager
    def attached(self, **settings: Any) -> Iterator[Attachment]:
        """SPF in stage 2, before the first step of a pair. `settings` are SPF's, without their prefix."""
        usual = {"target": TARGET, "stage2_start": "0"}
        config: SPFConfig = parse({PREFIX + name: str(value) for name, value in {**usual, **settings}.items()})
        with ExitStack() as stack:
            spf = Attachment(self.host, config, self.unet, self.adapter)
            stack.callback(spf.close)
            spf.open()
            spf.step, spf._logged = NOT_LOGGED, 0
            yield spf

    def spf(self, mark: Mark, **settings: Any) -> None:
        """The first step of a pair: reference and response; from attaching to detaching."""
        with self.attached(**settings):
            self.plain(mark)

    def preservation(self, mark: Mark) -> None:
        """The second step of a pair: the same noisy latents with the base prompts."""
        with self.attached() as spf:
            spf._partner = self.partner()
            self.plain(mark)

    def partner(self) -> Partner:
        """What waits for the second step of a pair."""
        which = torch.ones(self.setup.batch, dtype=torch.bool, device=self.setup.device)
        prompts = (CAPTION,) * self.setup.batch
        sizes = {"sizes": self.batch["sizes"]}
        return Partner(self.latents, self.timesteps, self.noise, which, sizes, self.base, prompts, prompts)  # type: ignore

    def spf_maps_kept(self, mark: Mark) -> None:
        """SPF as it was before `probe.group_attention` computed its probabilities again in backward."""
        with mock.patch.object(objective, "group_attention", probe._group_attention):
            self.spf(mark)

    def reference(self, mark: Mark) -> None:
        """The reference pass alone: what no aligned step can do without."""
        with torch.no_grad(), self.adapter.bypassed():
            self.predict(self.base)
        mark("forward")

    def dop(self, mark: Mark) -> None:
        """Differential output preservation as in ai-toolkit: two passes with gradient and one without.

        `mse(f(full), noise) + multiplier * mse(f(base), f_0(base))`, one joint backward.
        """
        with torch.no_grad(), self.adapter.bypassed():
            prior = self.predict(self.base)
        loss = self.loss(self.predict(self.full))
        preservation = F.mse_loss(self.predict(self.base).float(), prior.float())
        loss = loss + DOP_MULTIPLIER * preservation
        mark("forward")
        self.host.accelerator.backward(loss)
        mark("backward")

    def pure_cc(self, mark: Mark) -> None:
        """The second stage of PureCC (arXiv 2603.07561): both models predict two prompts per image.

        `mse(f(full), noise) + eta * |f(full) - (f(base) + l (g(target) - g(empty)))|^2`, with the least-squares
        `l = <f(full) - f(base), g(target) - g(empty)> / |g(target) - g(empty)|^2`. Here `g` is the bypassed model: as
        much work as their second model, whose weights come on top.
        """

        def both(a: Conds, b: Conds) -> Conds:
            if isinstance(a, Tensor):
                return torch.cat([a, b])
            return [torch.cat(parts) for parts in zip(a, b, strict=True)]

        with torch.no_grad(), self.adapter.bypassed():
            target, empty = self.predict(both(self.full, self.base), 2).float().chunk(2)
        full, base = self.predict(both(self.full, self.base), 2).float().chunk(2)
        direction = (target - empty).flatten(1)
        scale = ((full - base).flatten(1) * direction).sum(1) / direction.square().sum(1).clamp_min(1e-8)
        goal = base + (scale[:, None] * direction).view_as(base)
        loss = self.loss(full) + PURE_CC_ETA * F.mse_loss(full, goal)
        mark("forward")
        self.host.accelerator.backward(loss)
        mark("backward")

    def step(self, name: str) -> Step:
        """A step by its name: a method, or `spf NAME=VALUE ...` with SPF settings."""
        method, settings = _words(name)
        return partial(getattr(self, method), **settings)

    @contextmanager
    def running(self, name: str) -> Iterator[Step]:
        """The same in the middle of a run: SPF stays attached and has encoded its prompts in an earlier step."""
        method, settings = _words(name)
        if method != "spf":
            yield self.step(name)
            return
        with self.attached(**settings) as spf:
            self.plain(lambda _: None)
            self.clear()
            spf._partner = None
            yield self.plain


def _words(name: str) -> tuple[str, dict[str, str]]:
    method, *settings = name.split()
    return method, dict(item.split("=", 1) for item in settings)
