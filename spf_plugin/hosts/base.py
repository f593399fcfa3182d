"""What SPF needs of a training loop. `hosts/` has the loops that it knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from spf_plugin.core.prompt import Target
from spf_plugin.enhancement.term import ImageHost
from spf_plugin.pairs import State
from spf_plugin.shown.watch import WatchedHost
from spf_plugin.text import TextHost


class Host(TextHost, ImageHost, WatchedHost, Protocol):
    """What SPF needs of a training loop. A new host is one new class with these members."""

    trainer: (
        Any  # has call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **kw)
    )
    accelerator: Any  # has backward(loss), sync_gradients, num_processes, end_training()

    @property
    def text_encoder_trained(self) -> bool: ...

    @property
    def max_train_steps(self) -> int: ...

    @property
    def first_step(self) -> int | None:
        """The step at which the user lets the loop begin, whatever was resumed; None: 0, or the resumed one."""
        ...

    def captions(self, batch: Any) -> list[str]:
        """The captions of a batch as they were encoded, `[B]`."""
        ...

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        """Per-sample targets that replace the run's, or None; may be empty."""
        ...

    def sizes(self, batch: Any) -> dict[str, Tensor]:
        """What `call_unet` reads of a batch beside the noisy latents, each `[B, ...]`: SDXL's size conditioning."""
        ...

    def recomputable(self) -> AbstractContextManager[None]:
        """While the response pass runs: make gradient checkpointing keep the graph of what hooks collect."""
        ...

    def report(self, values: dict[str, float]) -> None:
        """Put numbers on the host's progress bar."""
        ...

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        """Keep `state()` with the host's training state, and call `load` when it resumes."""
        ...
