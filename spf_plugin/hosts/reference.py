"""The reference trainer as a host: what `spf_plugin.trainer` offers, in the words of `spf_plugin.hosts.base.Host`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf_plugin.core.prompt import Target
from spf_plugin.core.schedule import Discrete
from spf_plugin.families.base import Text

if TYPE_CHECKING:
    from spf_plugin.trainer.steps import Trainer


class ReferenceHost:
    """A running reference trainer, as `spf_plugin.hosts.base.Host`."""

    prefix = ""
    subset_targets: Sequence[Target] = ()

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.accelerator = trainer.accelerator
        self._model = trainer.model
        self.denoiser = trainer.model.denoiser

    @property
    def batch(self) -> Any:
        return self.trainer.batch

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()  # the trainer keeps its batch anyway

    @property
    def output(self) -> Path:
        return self.trainer.settings.out.with_suffix("")

    @property
    def text_encoder_trained(self) -> bool:
        return False

    @property
    def max_train_steps(self) -> int:
        return self.trainer.settings.steps

    @property
    def first_step(self) -> int | None:
        return None

    @property
    def captions_before_training(self) -> None:
        return None

    def captions(self, batch: Any) -> list[str]:
        return list(batch["captions"])

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return ()

    def sample_weights(self, batch: Any) -> None:
        return None

    @property
    def vae(self) -> Any:
        return self._model.vae

    @property
    def vae_scaling_factor(self) -> float:
        return float(self._model.vae.config.scaling_factor)

    @property
    def noise_schedule(self) -> Discrete | None:
        return self._model.process.schedule

    def clean_images(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        return batch["latents"], None

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        return self._model.tokenize(text, which)

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        with torch.autocast(self.accelerator.device.type, enabled=False):  # as the captions were
            return self._model.encode(prompts)

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()  # diffusers' gradient checkpointing is the non-reentrant kind

    def report(self, values: dict[str, float]) -> None:
        self.trainer.shown = dict(values)

    def on_save_state(self, state: Callable[[], Any], load: Callable[[Any], None]) -> None:
        """Nothing: this trainer does not resume."""
