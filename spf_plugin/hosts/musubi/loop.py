"""The training loop of musubi-tuner, as `spf_plugin.hosts.base.Host`.

Its steps pass `trainer.process_batch(...)` and end in `accelerator.backward(loss)`. It trains with cached text and
latents alone: captions, token ids and encoded base prompts are what `spf cache-prompts` recorded (`replay`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spf_plugin import patching, terminal
from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError, collected
from spf_plugin.families.base import Family, Text
from spf_plugin.hosts.frames import local_variables, training_frame
from spf_plugin.hosts.looking import repeated
from spf_plugin.hosts.musubi import dataset, items, replay, rules
from spf_plugin.hosts.musubi.architectures import Architecture, of_trainer
from spf_plugin.hosts.musubi.replay import Replay
from spf_plugin.hosts.musubi.scripts import SUPPORTED, script_of
from spf_plugin.hosts.postfix import Postfix
from spf_plugin.hosts.state import register
from spf_plugin.pairs import State

logger = terminal.logger(__name__)


def _calling() -> tuple[Any, Any]:
    """The trainer that is calling now, of whichever host, and its arguments; twice None where there is none."""
    frame = training_frame()
    names = {} if frame is None else local_variables(frame, "self", "args")
    return names.get("self"), names.get("args")


def is_calling() -> bool:
    """Whether it is a trainer of musubi-tuner that calls now."""
    return hasattr(_calling()[0], "call_dit")


def default_network() -> str:
    """The inner network module for the trainer that is calling now: the host's own for its model."""
    architecture = of_trainer(_calling()[0])
    return architecture.network if architecture else "networks.lora"


def network_for(names: Iterable[str]) -> str:
    """The host's network module that reads a LoRA file with these tensors."""
    kinds = {".hada_": "networks.loha", ".lokr_": "networks.lokr"}
    return next((kinds[mark] for name in names for mark in kinds if mark in name), default_network())


def fails_before_us() -> bool:
    """Whether the host fails, without a reason, between importing the network's module and calling it."""
    return is_calling() and bool(rules.too_early(_calling()[1]))


def calling_folders() -> list[Path]:
    """Where a relative `spf_config` is looked for in the run that is calling now."""
    args = _calling()[1]
    return [Path()] if args is None else rules.folders(args)


class MusubiHost:
    """A running trainer of musubi-tuner, as `spf_plugin.hosts.base.Host`.

    Args:
        names: variables of the training function (`WANTED`).
        architecture: of the trainer.
        denoiser: its transformer.
        family_of: which family a denoiser is of. Raises SPFError.

    Raises:
        SPFError: (from `find`) there is no trainer among the callers, or it cannot be used.
    """

    WANTED = ("self", "args", "train_dataset_group", "accelerator")
    #: It trains no text encoder, begins to count at 0, and its models have no table of noise levels.
    text_encoder_trained, first_step, noise_schedule = False, None, None
    vae, vae_scaling_factor, is_unet = None, 1.0, False
    subset_targets: Sequence[Target] = ()  # its data sets take no settings but their own

    def __init__(
        self,
        names: Mapping[str, Any],
        architecture: Architecture,
        denoiser: nn.Module,
        family_of: Callable[[nn.Module], Family],
    ):
        self.trainer, self.args = names["self"], names["args"]
        self.accelerator: Any = names["accelerator"]
        self.architecture, self.denoiser, self._family_of = architecture, denoiser, family_of
        self.batch: Any = None  # of the training step that is predicted now
        self._datasets = list(names["train_dataset_group"].datasets)
        self._group = names["train_dataset_group"]
        self._replay = Replay(architecture)
        self._postfix = Postfix()

    @classmethod
    def find(cls, denoiser: nn.Module, family_of: Callable[[nn.Module], Family]) -> MusubiHost:
        """The trainer that is calling `create_arch_network` now."""
        frame = training_frame()
        if frame is None:
            raise SPFError(
                "no trainer of musubi-tuner is calling. spf_plugin.lora works inside a training run: accelerate launch "
                f"zimage_train_network.py --network_module spf_plugin.lora ... {SUPPORTED}"
            )
        names = local_variables(frame, *cls.WANTED)
        problem = rules.trainer_problem(names["self"])
        if problem:
            raise SPFError(problem)
        architecture = of_trainer(names["self"])
        if architecture is None:
            raise SPFError(f"{type(names['self']).__name__} trains a model here that SPF does not know. {SUPPORTED}")
        return cls(names, architecture, denoiser, family_of)

    # -- facts of the run -----------------------------------------------------------------------------------------

    @property
    def max_train_steps(self) -> int:
        return int(self.args.max_train_steps)  # final only after the data loader was made: read late

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir or "", self.args.output_name or "last")

    def problems(self, config: SPFConfig, wrong: Collection[str] = ()) -> list[str]:
        """What would make this run wrong. Warns about what only might.

        Args:
            config: SPF's settings.
            wrong: those of them whose value is not known (`config.Read`).
        """
        script = script_of(self.trainer)
        assert script is not None  # `find` has asked
        errors = repeated(sys.argv[1:], rules.HOST)
        try:
            sets, captions = dataset.of_host(self._group), items.captions(self._datasets)
        except Exception as error:  # a caption file that is gone or no UTF-8, a line of JSONL without a caption
            errors.append(f"a caption of the data set cannot be read: {error}")
            return errors
        found = rules.look(
            self.args, sets, config, wrong, script=script, trying=True, compiled=_compiles(self.accelerator)
        )
        errors += found.errors
        if self.architecture.shown:
            errors += rules.shown_problems(items.showing(items.latents(self._datasets), self.architecture.shown))
        warnings = [*found.warnings, *found.of_captions]
        family = None
        with collected(errors):
            family = self._family_of(self.denoiser)
        if "target" not in wrong and config.target and family is not None:
            trained = items.trained(self._datasets)
            stale, doubtful = replay.problems(
                self._replay,
                trained,
                captions,
                config.target,
                family,
                self.architecture.command(self.args, config.target),
            )
            errors += stale
            warnings += doubtful
        for warning in warnings:
            logger.warning(f"SPF: {warning}")
        return errors

    # -- text -----------------------------------------------------------------------------------------------------

    @property
    def captions_before_training(self) -> Iterable[tuple[str, Sequence[Target] | None]] | None:
        return None  # what is recorded can be read at any time

    @property
    def prefix(self) -> str:
        return self._replay.prefix

    def tokenize(self, text: str) -> Sequence[int]:
        return self._replay.tokenize(text)

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        return self._replay.encode(prompts, beside)

    # -- per batch ------------------------------------------------------------------------------------------------

    def captions(self, batch: Any) -> list[str]:
        return [self._replay.captions[text] for text in batch[items.ITEMS]]

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return ()

    def sample_weights(self, batch: Any) -> Tensor | None:
        return None

    def clean_images(self, batch: Any) -> tuple[None, None]:
        return None, None  # only the response term asks, and is refused here

    # -- the loop -------------------------------------------------------------------------------------------------

    @contextmanager
    def stepping(self) -> Iterator[None]:
        original = self.trainer.process_batch

        def step(*args: Any, **kwargs: Any) -> Any:
            self.batch = args[4]
            try:
                return original(*args, **kwargs)
            finally:
                self.batch = None

        with patching.patched(self.trainer, "process_batch", step), items.named(self._datasets):
            yield

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()  # its models' checkpoints are never reentrant

    def report(self, values: dict[str, float]) -> None:
        self._postfix.show(values)

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        register(self.accelerator, state, load)


def _compiles(accelerator: Any) -> bool:
    """Whether accelerate will compile the model, as its own configuration may say."""
    plugin = getattr(getattr(accelerator, "state", None), "dynamo_plugin", None)
    return plugin is not None and str(getattr(plugin.backend, "value", plugin.backend)).upper() != "NO"
