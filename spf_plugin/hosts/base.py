"""What SPF needs of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from spf_plugin.core.prompt import Target
from spf_plugin.core.schedule import Discrete
from spf_plugin.enhancement.term import ImageHost
from spf_plugin.pairs import State
from spf_plugin.shown.watch import WatchedHost
from spf_plugin.text import TextHost


class Host(TextHost, ImageHost, WatchedHost, Protocol):
    """A training loop. A new one is one new class with these members; it knows nothing of its model's inside."""

    trainer: Any  # where a run's attachment is kept, as `spf`; its `generate_step_logs`, if any, gets SPF's numbers
    accelerator: Any  # has backward(loss), sync_gradients, num_processes, end_training()
    denoiser: nn.Module  # unwrapped
    batch: Any  # of the training step that calls the denoiser now; None in sampling and validation

    def stepping(self) -> AbstractContextManager[None]:
        """While it is open, `batch` is kept."""
        ...

    @property
    def text_encoder_trained(self) -> bool: ...

    @property
    def max_train_steps(self) -> int: ...

    @property
    def first_step(self) -> int | None:
        """The step at which the user lets the loop begin, whatever was resumed; None: 0, or the resumed one."""
        ...

    @property
    def noise_schedule(self) -> Discrete | None:
        """The loop's, where its model has one to choose; asked for during steps only."""
        ...

    @property
    def captions_before_training(self) -> Iterable[tuple[str, Sequence[Target] | None]] | None:
        """Every caption of the data set with its own targets, if any, where text encoders will be gone when
        training starts, or wait where they are slow: all prompts are then encoded when SPF is attached. None where
        `encode` works all the time."""
        ...

    def captions(self, batch: Any) -> list[str]:
        """The captions of a batch as they were encoded, `[B]`."""
        ...

    @property
    def subset_targets(self) -> Sequence[Target]:
        """All that `targets` may give, for the whole data set; may be empty."""
        ...

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        """Per-sample targets that replace the run's, or None; may be empty."""
        ...

    def sample_weights(self, batch: Any) -> Tensor | None:
        """The loop's own weight of each sample's loss, `[B]`, as of regularisation images; None: all alike."""
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
