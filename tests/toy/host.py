"""The toy loop as `spf_plugin.hosts.base.Host`: the smallest that `docs/hosts.md` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spf_plugin.core.prompt import Target
from spf_plugin.families.base import Text
from spf_plugin.pairs import State
from tests.toy.loop import Encoder, Loop


class LoopHost:
    """A running `Loop`. What SPF may ask and this loop has no answer to is None."""

    text_encoder_trained, first_step, noise_schedule, vae, vae_scaling_factor = False, None, None, None, 1.0
    output, prefix, subset_targets = Path("toy"), "", ()

    def __init__(self, loop: Loop):
        self.trainer: Any = loop
        self.accelerator, self.denoiser, self.batch = loop.accelerator, loop.model, None
        self.max_train_steps, self.reported = loop.steps, dict[str, float]()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        original: Callable[..., Tensor] = self.trainer.train_step

        def step(captions: Sequence[str], random: torch.Generator) -> Tensor:
            self.batch = captions
            try:
                return original(captions, random)
            finally:
                self.batch = None

        self.trainer.train_step = step
        try:
            yield
        finally:
            del self.trainer.train_step

    @property
    def captions_before_training(self) -> Iterable[tuple[str, None]]:
        return [(caption, None) for caption in self.trainer.images]

    def captions(self, batch: Any) -> list[str]:
        return list(batch)

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return ()

    def sample_weights(self, batch: Any) -> None:
        return None

    def tokenize(self, text: str) -> Sequence[int]:
        return Encoder.tokenize(self.trainer.encoder, text)

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        words, style = self.trainer.encoder(prompts)
        return {"hidden": words, "pooled": style}

    def clean_images(self, batch: Any) -> tuple[None, None]:
        return None, None

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()

    def report(self, values: dict[str, float]) -> None:
        self.reported = values

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        pass
