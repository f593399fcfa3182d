"""SPF with other pairs than in time: what its defaults for pairs were chosen from. No setting of a user's run.

| name | what is shown |
|---|---|
| `pairs_in_batch` | half as many pictures, each with its caption and its base caption in one batch |
| `base_captions` | every second batch with base captions, on pictures and noise of its own |
| `every_second_pair` | the second step of every second pair only |
| `pairs_noisy` | second steps for the samples in the noisier half of the timesteps only |
| `pairs_clear` | second steps for the samples in the clearer half only |
| `batch_1` | one picture at a time, with the batch's gradient accumulated |

Each changes the reference trainer's batches, or what waits for SPF's second step; the losses are SPF's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from portraitlab.lab.bases import BaseCaptions
from portraitlab.lab.tasks import Task
from spf_plugin import patching
from spf_plugin.attachment import Attachment
from spf_plugin.pairs import Partner
from spf_plugin.text import map_text
from spf_plugin.trainer.loop import Attach
from spf_plugin.trainer.settings import Settings
from spf_plugin.trainer.steps import Trainer

Predict = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Variant:
    """SPF as it is; the others differ from it in one of these methods."""

    trainer: Trainer
    spf: Attachment
    bases: BaseCaptions

    def settings(self, run: Settings) -> Settings:
        """The run, given SPF's own."""
        return run

    @contextmanager
    def training(self) -> Iterator[None]:
        """Open while the run lasts; `trainer`, `spf` and `bases` are there."""
        yield

    def second(self, partner: Partner) -> Partner | None:
        """What waits for the second step of a pair; None: it is not shown, and the next step is the first of a pair."""
        return partner

    def predict(self, predict: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The trainer's prediction for its present batch, `[B, 4, h, w]`."""
        return predict(noisy, timesteps)

    def loss(self, loss: Loss, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The trainer's diffusion loss for that prediction."""
        return loss(prediction, latents, noise, timesteps)


def _with_base_captions(batch: Mapping[str, Any], bases: BaseCaptions) -> dict[str, Any]:
    """A batch of the trainer's with the captions without the target."""
    captions = batch["captions"]
    return {**batch, "captions": bases.of(captions), "text": bases.text(captions)}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two batches of the trainer's in one."""
    return {
        "captions": [*first["captions"], *second["captions"]],
        "indices": [*first["indices"], *second["indices"]],
        "latents": torch.cat([first["latents"], second["latents"]]),
        "sizes": torch.cat([first["sizes"], second["sizes"]]),
        "text": map_text(lambda *parts: torch.cat(parts), first["text"], second["text"]),
    }


def _twice(part: Tensor) -> Tensor:
    return torch.cat([part, part])


class PairsInBatch(Variant):
    """Pairs in the batch: half of an (even) batch's pictures, shown twice at the same noisy latents and timesteps.

    The samples with the base captions have an empty map, so the diffusion loss does not act on them, and their output
    loss has the weight of base preservation. As many samples a step as with pairs in time, on half as many pictures;
    over two steps of those, each loss has the same weight.
    """

    def settings(self, run: Settings) -> Settings:
        return replace(run, batch_size=run.batch_size // 2)

    def second(self, partner: Partner) -> Partner | None:
        return None

    def predict(self, predict: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
        assert self.trainer.batch is not None
        self.trainer.batch = _joined(self.trainer.batch, _with_base_captions(self.trainer.batch, self.bases))
        return predict(_twice(noisy), _twice(timesteps))

    def loss(self, loss: Loss, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return loss(prediction, _twice(latents), _twice(noise), _twice(timesteps))


class BaseCaptionSteps(Variant):
    """Base captions on noise of their own: every second batch is shown without the target, and no pair in time."""

    taken = 0

    def second(self, partner: Partner) -> Partner | None:
        return None

    def predict(self, predict: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
        assert self.trainer.batch is not None
        self.taken += 1
        if self.taken % 2 == 0:
            self.trainer.batch = _with_base_captions(self.trainer.batch, self.bases)
        return predict(noisy, timesteps)


class EverySecondPair(Variant):
    """Pairs at half the rate: one second step for two first ones."""

    pairs = 0

    def second(self, partner: Partner) -> Partner | None:
        self.pairs += 1
        return partner if self.pairs % 2 else None


class PairsAt(Variant):
    """Second steps only for the samples whose timesteps are in one half of the schedule.

    Args:
        noisy: the noisier half, from 500 of 1000 on; else the clearer one.
    """

    def __init__(self, noisy: bool):
        self.noisy = noisy

    def second(self, partner: Partner) -> Partner | None:
        middle = self.trainer.model.process.timesteps // 2
        noisy = self.spf.family.timesteps(partner.call) >= middle
        which = partner.which & (noisy == self.noisy)
        return replace(partner, which=which) if which.any() else None


class SingleImages(Variant):
    """Batches of 1 whose gradient is accumulated over as many as the batch had: the same pictures an optimiser step.

    The trainer counts batches, so its run is longer and its learning rate moves with every one of them; SPF counts
    optimiser steps.
    """

    def settings(self, run: Settings) -> Settings:
        assert run.spf is not None
        self.images = run.batch_size
        spf = replace(run.spf, stage2_start=float(run.spf.stage2_step(run.steps)))
        return replace(run, batch_size=1, steps=run.steps * self.images, spf=spf)

    @contextmanager
    def training(self) -> Iterator[None]:
        accelerator = self.trainer.accelerator
        accelerator.gradient_accumulation_steps = self.images
        try:
            yield
        finally:  # accelerate keeps both for every accelerator of the process
            accelerator.gradient_accumulation_steps = 1
            with accelerator.accumulate():
                pass

    def predict(self, predict: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
        with self.trainer.accelerator.accumulate():  # decides whether the optimiser steps after this batch
            return predict(noisy, timesteps)


KINDS: Mapping[str, Callable[[], Variant]] = {
    "pairs_in_batch": PairsInBatch,
    "base_captions": BaseCaptionSteps,
    "every_second_pair": EverySecondPair,
    "pairs_noisy": partial(PairsAt, noisy=True),
    "pairs_clear": partial(PairsAt, noisy=False),
    "batch_1": SingleImages,
}


def attach(variant: Variant, task: Task, seed: int) -> Attach:
    """What attaches a variant to a run of the reference trainer that trains SPF."""

    def attached(network: nn.Module, trainer: Trainer) -> Callable[[], None]:
        variant.trainer, variant.spf = trainer, network.spf  # type: ignore[assignment]
        variant.bases = BaseCaptions(task, seed, trainer.model)

        def predict(original: Predict, noisy: Tensor, timesteps: Tensor) -> Tensor:
            # SPF has no setting for it: what waits is taken or changed before SPF sees the next call.
            waiting = variant.spf._partner
            if waiting is not None:
                variant.spf._partner = variant.second(waiting)
            return variant.predict(original, noisy, timesteps)

        stack = ExitStack()
        stack.enter_context(variant.training())
        stack.enter_context(patching.patched(trainer, "predict", partial(predict, trainer.predict)))
        stack.enter_context(patching.patched(trainer, "loss", partial(variant.loss, trainer.loss)))
        return stack.close

    return attached
