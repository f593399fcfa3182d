"""What other trainers do to keep the base model's behaviour, written from their code and papers as objectives.

Each is attached to the same trainer at the same seam as SPF, around the denoiser's call and in `accelerator.backward`:
model, data, noise, optimiser and LoRA are the same. Every peer has its usual weight as a parameter, to be swept.

| name | from | what |
|---|---|---|
| `Masked` | sd-scripts, OneTrainer `masked_training` | diffusion loss inside the target's true mask only |
| the same, `prior` | OneTrainer `masked_prior_preservation_weight` | and prior prediction outside the mask |
| `PriorPreservation` | DreamBooth, diffusers `--with_prior_preservation` | also trains on the base model's pictures |
| `OutputPreservation` | DOP: ai-toolkit `diff_output_preservation`, sd-scripts | base prompt: the base's prediction |
| the same, `blank` | ai-toolkit `blank_prompt_preservation` | empty prompt: the base's prediction |
| `PureCC` | PureCC, arXiv 2603.07561 | the change is the one an earlier plain LoRA makes for the target alone |
| `PureCCReleased` | PureCC's code, 2026-04 | the change is the one the base model makes for the target alone |
| `WeightPenalty` | Preserve and Personalize, arXiv 2505.19519 | the squared change of the weights is a loss |
| `TLoRA` | T-LoRA, arXiv 2507.05964 | the noisier the picture, the fewer ranks are trained |

The last two ask for one prediction a step. A peer that does can also be put on top of SPF.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portraitlab.autoencoder import to_tensor
from portraitlab.lab.bases import BaseCaptions
from portraitlab.lab.tasks import Task
from portraitlab.model_files import load_pipeline, sample
from spf_plugin import patching
from spf_plugin.adapter import bypass as adapters
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.families import known
from spf_plugin.families.base import Family, Text
from spf_plugin.seam import Call, intercepted
from spf_plugin.text import map_text
from spf_plugin.trainer.loop import Attach
from spf_plugin.trainer.models import from_pipeline
from spf_plugin.trainer.steps import Trainer

CLASS_IMAGES = 48


@dataclass
class Step:
    """One step as a peer sees it.

    Attributes:
        trainer: whose step it is; its `batch` is the present one.
        family: of the denoiser.
        call: the trainer's call of the denoiser: noisy latents, timesteps and the captions' text.
        bypassed: while it is open, the denoiser is the base model.
        base: text of the captions without the target, one row a sample.
    """

    trainer: Trainer
    family: Family
    call: Call
    bypassed: Callable[[], AbstractContextManager[None]]
    base: Text

    @property
    def batch(self) -> Mapping[str, Any]:
        assert self.trainer.batch is not None
        return self.trainer.batch

    @property
    def noisy(self) -> Tensor:
        """`z_t`, `[B, 4, h, w]`."""
        return self.family.noisy_latents(self.call)

    @property
    def timesteps(self) -> Tensor:
        """`[B]`."""
        return self.family.timesteps(self.call)

    def showing(self, text: Text) -> Call:
        """The same call with another text; a text of one row is shown to every sample."""
        count = len(self.noisy)
        return self.family.with_text(self.call, map_text(lambda part: part.expand(count, *part.shape[1:]), text))

    def predict(self, call: Call) -> Tensor:
        """The trained model's prediction for another call, with graph."""
        return self.family.prediction(call.on(self.family.denoiser), call).float()

    def prior(self, text: Text) -> Tensor:
        """The base model's prediction for another text, without graph."""
        with torch.no_grad(), self.bypassed():
            return self.predict(self.showing(text)).detach()

    def target(self) -> Tensor:
        """What the trainer compares the prediction with, from the batch's clean latents."""
        process, latents = self.trainer.model.process, self.batch["latents"]
        return process.target(latents, process.noise(latents, self.noisy, self.timesteps), self.timesteps)


Work = Generator[None, Tensor, tuple[Tensor, Tensor | None]]
"""A peer's step. It yields once, where the trainer's own call runs, and is sent its prediction; it returns the
prediction for the trainer's diffusion loss, and a scalar that is added to that loss."""


class Peer(ABC):
    """A method."""

    @abstractmethod
    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        """Called once before training, while the denoiser is still the base model.

        Args:
            trainer: whose steps they will be.
            task: what is taught.
            seed: the training seed, which also draws the pictures.
        """

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Open from when the network is applied until it is trained: for a peer that patches or reads its modules."""
        yield

    @abstractmethod
    def step(self, step: Step) -> Work:
        """What happens around the trainer's call of the denoiser."""


@dataclass
class Masked(Peer):
    """Diffusion loss weighed by the true mask: 1 inside, `outside` elsewhere; `prior` weighs prior prediction there.

    The prior prediction is that of the base prompt; OneTrainer's is of the caption as it is.
    """

    outside: float = 0.0
    prior: float = 0.0

    masks: Tensor = field(init=False, repr=False)  # [pictures, 1, h, w]

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        self.masks = task.masks(seed).to(trainer.accelerator.device)

    def step(self, step: Step) -> Work:
        mask = self.masks[step.batch["indices"]]
        extra = None
        if self.prior:
            reference = step.prior(step.base)
        prediction = yield
        if self.prior:
            extra = self.prior * ((1 - mask) * (prediction - reference).square()).mean()
        # The square of what is left is the weighed square of the error: any loss of the trainer stays as it is.
        target, weight = step.target(), mask + (1 - mask) * self.outside
        return target + weight.sqrt() * (prediction - target), extra


@dataclass
class OutputPreservation(Peer):
    """`mse(f(text), f_0(text))` at the training picture's noisy latent; the text is the base prompt (DOP) or empty."""

    multiplier: float = 1.0
    blank: bool = False

    empty: Text = field(init=False, repr=False, default_factory=dict)

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        if self.blank:
            self.empty = trainer.model.encode([""])

    def step(self, step: Step) -> Work:
        text = self.empty if self.blank else step.base
        prior = step.prior(text)
        prediction = yield
        return prediction, self.multiplier * F.mse_loss(step.predict(step.showing(text)), prior)


@dataclass
class PriorPreservation(Peer):
    """Every step also trains on as many pictures that the base model drew for the base prompts."""

    multiplier: float = 1.0

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        prompts = [example.base_caption for example in task.examples(seed)]
        prompts = (prompts * (CLASS_IMAGES // len(prompts) + 1))[:CLASS_IMAGES]
        images = sample(
            load_pipeline(Path(trainer.settings.model)), prompts, range(7000, 7000 + len(prompts)), steps=12
        )
        self.random = torch.Generator().manual_seed(seed)
        pixels = to_tensor(images)
        self.latents = torch.stack([trainer.model.to_latents(picture, self.random) for picture in pixels])
        self.texts = trainer.model.encode(prompts)

    def step(self, step: Step) -> Work:
        prediction = yield
        device, count = step.noisy.device, len(step.noisy)
        chosen = torch.randint(0, len(self.latents), (count,), generator=self.random)
        process = step.trainer.model.process
        timesteps = process.draw(count, self.random)
        latents = self.latents[chosen]
        noise = torch.randn(latents.shape, generator=self.random)
        noisy = process.noisy(latents, noise, timesteps).to(device)
        texts = map_text(lambda part: part[chosen.to(part.device)].to(device), self.texts)
        drawn = step.predict(step.trainer.model.call(noisy, timesteps.to(device), texts, step.batch["sizes"]))
        loss = step.trainer.loss(drawn, latents.to(device), noise.to(device), timesteps.to(device))
        return prediction, self.multiplier * loss


@dataclass
class PureCC(Peer):
    """Stage two of PureCC's paper; stage one is a plain LoRA on the same pictures, which costs a second training.

    `mse(f(full), noise) + eta |f(full) - (f_0(base) + l (g(target) - g("")))|^2`, with the least-squares
    `l = <f(full) - f_0(base), g(target) - g("")> / |g(target) - g("")|^2`, `f_0` the base model and `g` the model with
    the first LoRA.
    """

    extractor: Path = field(default_factory=Path)
    eta: float = 2.0
    first: nn.Module = field(init=False, repr=False)  # the model with the first LoRA
    target: Text = field(init=False, repr=False)
    empty: Text = field(init=False, repr=False)

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        pipeline = load_pipeline(Path(trainer.settings.model))
        pipeline.load_lora_weights(str(self.extractor.parent), weight_name=self.extractor.name)
        pipeline.fuse_lora()
        self.first = from_pipeline(pipeline).denoiser.to(trainer.accelerator.device)
        self.target, self.empty = (trainer.model.encode([prompt]) for prompt in (task.goal.phrase, ""))

    def step(self, step: Step) -> Work:
        with torch.no_grad():
            calls = [step.showing(text) for text in (self.target, self.empty)]
            target, empty = (step.family.prediction(call.on(self.first), call).float() for call in calls)
        base = step.prior(step.base)
        full = yield
        direction = (target - empty).flatten(1)
        length = ((full - base).flatten(1) * direction).sum(1) / direction.square().sum(1).clamp_min(1e-8)
        goal = base + (length[:, None] * direction).view_as(base)
        return full, self.eta * F.mse_loss(full, goal)


@dataclass
class PureCCReleased(Peer):
    """Stage two as PureCC's released code has it (`train_stage2_sd3.py`).

    `mse(f(full), noise) + eta |f(full) - (f(base) + f_0(target) - f_0(""))|^2`: the length is fixed (`--fix_lambda`),
    the direction is the base model's (the adapter is disabled there), and `f(base)` is the trained model's, with graph.
    Stage one then gives a learned token only, which does not exist here.
    """

    eta: float = 2.0
    target: Text = field(init=False, repr=False)
    empty: Text = field(init=False, repr=False)

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        self.target, self.empty = (trainer.model.encode([prompt]) for prompt in (task.goal.phrase, ""))

    def step(self, step: Step) -> Work:
        direction = step.prior(self.target) - step.prior(self.empty)
        full = yield
        base = step.predict(step.showing(step.base))
        return full, self.eta * F.mse_loss(full, base + direction)


def _loras(network: nn.Module) -> list[Any]:
    """The LoRA modules of a network: each has `lora_down`, `lora_up` and `scale`."""
    return [module for module in network.modules() if hasattr(module, "lora_down")]


@dataclass
class WeightPenalty(Peer):
    """`multiplier * sum |scale up down|^2` over the adapted layers: the squared change of their weights.

    Preserve and Personalize (ICLR 2026): if the network is Lipschitz in its weights, a multiple of their squared change
    bounds the KL divergence from the base model (theorem 2), so `lambda sum_i |theta_i - theta_base,i|^2` is added to
    the loss, and so it is here. The paper's code (rlgnswk/Preserve-and-Personalize) does so for whole weights, as a
    mean per tensor; for a LoRA it sums the squares of the two factors instead (with 1e-7 for SD1.5 and 1e-6 for SDXL),
    which also pulls at a `down` that changes nothing.
    """

    multiplier: float = 1e-3

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        pass

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        self.alike: dict[Any, list[Any]] = {}  # LoRA modules by shape: a few large products are cheaper than many small
        for lora in _loras(network):
            key = lora.lora_up.weight.shape, lora.lora_down.weight.shape, lora.scale
            self.alike.setdefault(key, []).append(lora)
        yield

    def penalty(self) -> Tensor:
        """`sum |scale up down|^2`, a scalar.

        With `up` `[out, r]` and `down` `[r, in]` (a kernel's positions are inputs) a layer's is
        `scale^2 tr(up^T up down down^T)`: the inner product of two `[r, r]`, never an `[out, in]`.
        """
        found = []
        for (*_, scale), loras in self.alike.items():
            up = torch.stack([lora.lora_up.weight for lora in loras]).flatten(2)
            down = torch.stack([lora.lora_down.weight for lora in loras]).flatten(2)
            found.append(scale**2 * ((up.mT @ up) * (down @ down.mT)).sum())
        return torch.stack(found).sum()

    def step(self, step: Step) -> Work:
        prediction = yield
        return prediction, self.multiplier * self.penalty()


@dataclass
class TLoRA(Peer):
    """T-LoRA (AAAI 2026; code ControlGenAI/T-LoRA): of `r` ranks only the first `r(t)` act at timestep `t` of `T`.

    `r(t) = floor((r - r_min) (T - t) / T) + r_min`: all of them at `t = 0`, `r_min` in pure noise, where a LoRA learns
    its pictures' layout and background by heart. The mask is per sample; the code's is the first sample's for the whole
    batch (it trains with batches of 1). `minimum` is `r_min / r`: a half in the README's command for SDXL (32 of 64);
    the parser's default is `r_min = 1`.

    Taken is what the code calls Vanilla T-LoRA, an ordinary LoRA with the mask; not its orthogonal initialisation
    (Ortho-LoRA), which trains three factors and subtracts what they started as. Only training masks: the code's sampler
    does as well, but a LoRA file cannot tell a WebUI to, so in the drawn pictures all ranks act at every noise level.
    """

    minimum: float = 0.5

    def prepare(self, trainer: Trainer, task: Task, seed: int) -> None:
        self.family, self.rank = known.find(trainer.model.denoiser), trainer.settings.rank
        self.timesteps = trainer.model.process.timesteps

    def mask(self, timesteps: Tensor) -> Tensor:
        """Which ranks act, `[B, r]` in {0, 1}, for timesteps `[B]`."""
        least = max(1, round(self.minimum * self.rank))
        active = (self.rank - least) * (self.timesteps - timesteps) // self.timesteps + least
        return (torch.arange(self.rank, device=timesteps.device) < active[:, None]).float()

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        forward = self.family.denoiser.forward

        def masking(*args: Any, **kwargs: Any) -> Any:
            # Stays: gradient checkpointing asks again while it goes back.
            self.present = self.mask(self.family.timesteps(Call(args, kwargs)))
            return forward(*args, **kwargs)

        def masked(lora: Any, inputs: Tensor, scale: float = 1) -> Tensor:
            """What the module adds to its layer's output, from `[B, ..., in]` or, of a convolution, `[B, in, h, w]`."""
            inner = lora.lora_down(inputs)
            shape = [len(inner)] + [1] * (inner.dim() - 1)
            shape[1 if lora.isconv else -1] = self.rank
            return lora.lora_up(inner * self.present.view(shape)) * (lora.scale * scale)

        with ExitStack() as patches:
            patches.enter_context(patching.patched(self.family.denoiser, "forward", masking))
            for lora in _loras(network):
                patches.enter_context(patching.patched(lora, "bypass_forward_diff", partial(masked, lora)))
            yield

    def step(self, step: Step) -> Work:
        prediction = yield
        return prediction, None


KINDS: Mapping[str, Callable[..., Peer]] = {
    "masked": Masked,
    "dop": OutputPreservation,
    "prior_preservation": PriorPreservation,
    "pure_cc": PureCC,
    "pure_cc_released": PureCCReleased,
    "weight_penalty": WeightPenalty,
    "t_lora": TLoRA,
}


@contextmanager
def stepping(
    peer: Peer,
    trainer: Trainer,
    family: Family,
    bypassed: Callable[[], AbstractContextManager[None]],
    base: Callable[[Sequence[str]], Text],
) -> Iterator[None]:
    """While it is open, the trainer's steps are a prepared peer's. Where the trainer trains SPF too, that is around
    SPF's: the peer sees the call that SPF makes, and adds its loss to SPF's.

    Args:
        peer: the method.
        trainer: takes the steps.
        family: of the trainer's denoiser.
        bypassed: while it is open, the denoiser is the base model.
        base: text of the captions without the target, for a batch's captions.
    """
    pending: list[Tensor] = []

    def stepped(call: Call) -> Generator[Call, Any, Any]:
        assert trainer.batch is not None
        work = peer.step(Step(trainer, family, call, bypassed, base(trainer.batch["captions"])))
        next(work)
        output = yield call
        prediction, extra = _finished(work, family.prediction(output, call).float())
        if extra is not None:
            pending.append(extra)
        return family.output(output, prediction, call)

    def around(call: Call) -> Generator[Call, Any, Any] | None:
        # A call without a graph is no training step: SPF's reference pass is one, and so is sampling.
        return stepped(call) if trainer.batch is not None and torch.is_grad_enabled() else None

    def add(backward: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        backward(loss + pending.pop() if pending else loss, **kwargs)

    accelerator = trainer.accelerator
    with (
        intercepted(family.denoiser, around),
        # What is there now: SPF's, if it trains too.
        patching.patched(accelerator, "backward", partial(add, accelerator.backward)),
    ):
        yield


def _finished(work: Work, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a step returns for the prediction that it waits for."""
    try:
        work.send(prediction)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a peer's step yields once")


def attach(peer: Peer, task: Task, seed: int) -> Attach:
    """What attaches a peer to a run of the reference trainer: in place of SPF, or around it where that trains too."""

    def attached(network: nn.Module, trainer: Trainer) -> Callable[[], None]:
        peer.prepare(trainer, task, seed)
        adapter, stack, family = Adapter(), ExitStack(), known.find(trainer.model.denoiser)
        bases = BaseCaptions(task, seed, trainer.model)

        @contextmanager
        def applying(models: Sequence[nn.Module]) -> Iterator[None]:
            with adapter.watching(models):
                yield
            stack.enter_context(peer.applied(network))
            stack.enter_context(stepping(peer, trainer, family, adapter.bypassed, bases.text))

        adapters.on_apply(network, applying)
        return stack.close

    return attached
