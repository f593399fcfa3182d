"""The reference trainer as a host: what `spf_plugin.trainer` offers, in the words of `spf_plugin.hosts.base.Host`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spf_plugin.core.prompt import Target
from spf_plugin.text import Conds

if TYPE_CHECKING:
    from spf_plugin.trainer.loop import Trainer


class ReferenceHost:
    """A running reference trainer, as `spf_plugin.hosts.base.Host`."""

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.accelerator = trainer.accelerator
        self._model = trainer.model

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

    def captions(self, batch: Any) -> list[str]:
        return list(batch["captions"])

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return ()

    @property
    def vae(self) -> Any:
        return self._model.vae

    @property
    def vae_scaling_factor(self) -> float:
        return float(self._model.vae.config.scaling_factor)

    @property
    def family(self) -> str:
        return "sdxl" if self._model.family == "sdxl" else "sd"

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._model.alphas_cumprod

    @property
    def prediction_type(self) -> str:
        return self._model.prediction

    def clean_images(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        return batch["latents"], None

    def tokenize(self, text: str) -> Sequence[int]:
        return self._model.tokenizers[0](text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Conds:
        return self._model.encode(prompts)

    def sizes(self, batch: Any) -> dict[str, Tensor]:
        return {"sizes": batch["sizes"]}

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()  # diffusers' gradient checkpointing is the non-reentrant kind

    def report(self, values: dict[str, float]) -> None:
        self.trainer.shown = dict(values)

    def on_save_state(self, state: Callable[[], Any], load: Callable[[Any], None]) -> None:
        """Nothing: this trainer does not resume."""
