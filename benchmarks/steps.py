"""One training step of plain LoRA, of SPF, and of the peers, on the same model and data.

SPF runs through `spf_plugin.attachment`, exactly as in training, and the peers are the lab's (`portraitlab.lab.peers`).
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
from torch import Tensor, nn

from benchmarks.unets import CONFIGS, POOLED, base_model, lora
from portraitlab.lab import peers
from spf_plugin import probe
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.attachment import Attachment
from spf_plugin.config import BASES, PREFIX, SPFConfig, parse
from spf_plugin.core import attention
from spf_plugin.families import known
from spf_plugin.families.base import Text
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.pairs import Partner
from spf_plugin.seam import Call
from spf_plugin.text import map_text
from spf_plugin.trainer.settings import Settings
from spf_plugin.trainer.steps import Trainer

CAPTION = "a woman in a brown jacket, curtain background, smiling, blonde hair"
TARGET = "blonde hair"
TOKENS = 77
STEPS = 1000
TIMESTEP = 500
NOT_LOGGED = 1  # a step number of stage 2 at which nothing is logged

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

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        hidden = torch.randn(len(prompts), TOKENS, CONFIGS[self._setup.family]["cross_attention_dim"])
        if self._setup.family not in POOLED:
            return {"hidden": hidden}
        return {"hidden": hidden, "pooled": torch.randn(len(prompts), POOLED[self._setup.family])}


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
        self.unet_parameters = sum(p.numel() for p in model.denoiser.parameters())
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
        self.family = known.find(model.denoiser)
        self.network, self.adapter = lora(model, setup.rank, setup.device), Adapter()
        if setup.weights in BASES[1:]:
            QuantisedBase(self.family.linear_layers(), setup.weights, torch.device(setup.device))
        with self.adapter.watching([model.denoiser]):
            self.network.apply_to([], model.denoiser, apply_text_encoder=False, apply_unet=True)  # type: ignore[operator]
        self.network.requires_grad_(True).train()
        self.unet = model.denoiser.train()
        if setup.checkpointing:
            self.unet.enable_gradient_checkpointing()
        side = setup.resolution // model.latent_scale
        shape, device = (setup.batch, 4, side, side), setup.device
        self.latents, self.noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.timesteps = torch.tensor([TIMESTEP] * setup.batch, device=device)
        texts = (self.host.encode([text] * setup.batch) for text in (CAPTION, TARGET))
        self.full, self.base = (map_text(lambda part: part.to(device), text) for text in texts)
        self.trainer.batch = {
            "captions": [CAPTION] * setup.batch,
            "text": self.full,
            "sizes": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * setup.batch, device=device),
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def loss(self, prediction: Tensor) -> Tensor:
        """The diffusion loss."""
        return self.trainer.loss(prediction, self.latents, self.noise, self.timesteps)

    def clear(self) -> None:
        """Drop the gradients, as every optimizer step does."""
        for parameter in self.parameters:
            parameter.grad = None

    def plain(self, mark: Mark) -> None:
        """Plain LoRA."""
        loss = self.loss(self.trainer.predict(self.latents, self.timesteps))
        mark("forward")
        self.host.accelerator.backward(loss)
        mark("backward")

    @contextmanager
    def attached(self, **settings: Any) -> Iterator[Attachment]:
        """SPF in stage 2, before the first step of a pair. `settings` are SPF's, without their prefix."""
        usual = {"target": TARGET, "stage2_start": "0"}
        config: SPFConfig = parse({PREFIX + name: str(value) for name, value in {**usual, **settings}.items()})
        with ExitStack() as stack:
            spf = Attachment(self.host, config, self.family, self.adapter)
            stack.callback(spf.close)
            spf.open()
            spf.step, spf.numbers.window = NOT_LOGGED, 0
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
        return Partner(self.base_call(), self.noise, which, encoded=True, base=prompts, full=prompts)

    def base_call(self) -> Call:
        """The trainer's call of the UNet, with the base prompts."""
        latents = self.latents.to(self.trainer.weight_dtype)
        return self.trainer.model.call(latents, self.timesteps, self.base, self.trainer.batch["sizes"])

    def spf_maps_kept(self, mark: Mark) -> None:
        """SPF as it was before `group_attention` computed its probabilities again in backward."""
        with mock.patch.object(probe, "group_attention", attention._group_attention):
            self.spf(mark)

    def reference(self, mark: Mark) -> None:
        """The reference pass alone: what no aligned step can do without."""
        with torch.no_grad(), self.adapter.bypassed(), self.host.accelerator.autocast():
            self.base_call().on(self.unet)
        mark("forward")

    def dop(self, mark: Mark) -> None:
        """Differential output preservation: a pass without gradient and two with."""
        self._peer(peers.OutputPreservation(), mark)

    def pure_cc(self, mark: Mark) -> None:
        """The second stage of PureCC as its paper has it: three passes without gradient and one with.

        The bypassed model stands for the first LoRA's: as much work as with theirs, whose weights come on top.
        """

        def extractor(*args: Any, **kwargs: Any) -> Any:
            with self.adapter.bypassed():
                return self.unet(*args, **kwargs)

        peer = peers.PureCC()
        peer.first, peer.target, peer.empty = extractor, self.full, self.base  # type: ignore[assignment]
        self._peer(peer, mark)

    def _peer(self, peer: peers.Peer, mark: Mark) -> None:
        with peers.stepping(peer, self.trainer, self.family, self.adapter.bypassed, lambda _: self.base):
            self.plain(mark)

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
