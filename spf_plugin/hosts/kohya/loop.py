"""The training loop of sd-scripts, as `spf_plugin.hosts.base.Host`.

Supported loops: the monolithic one (v0.8.7 to v0.9.1), whose steps pass `trainer.call_unet(...)`, and `process_batch`
(2025 branches, v0.10 on), for SD1.x, SD2.x and SDXL, and for the transformers in `trainers.DITS`. Both end in
`accelerator.backward(loss)`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from spf_plugin import patching, terminal
from spf_plugin.config import SPFConfig, read_targets
from spf_plugin.core.prompt import Target
from spf_plugin.core.schedule import Discrete
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.hosts.frames import callers_variable, local_variables, training_frame
from spf_plugin.hosts.kohya import cached_text, own_targets, recaching, rules
from spf_plugin.hosts.kohya.images import TEXT_CACHE, Image, subset_of
from spf_plugin.hosts.kohya.rules import DEFAULT_NETWORK, SUPPORTED, trainer_problem
from spf_plugin.hosts.kohya.text import TextEncoding
from spf_plugin.hosts.kohya.trainers import dit_of
from spf_plugin.hosts.looking import name_problems, repeated
from spf_plugin.hosts.postfix import Postfix
from spf_plugin.hosts.state import register
from spf_plugin.pairs import State

logger = terminal.logger(__name__)


def default_network() -> str:
    """The inner network module for the trainer that is calling now: the host's own for its model."""
    frame = training_frame()
    dit = None if frame is None else dit_of(local_variables(frame, "self")["self"])
    return dit.network if dit else DEFAULT_NETWORK


def calling_folders() -> list[Path]:
    """Where a relative `spf_config` is looked for in the run that is calling now."""
    frame = training_frame()
    return [Path()] if frame is None else rules.folders(local_variables(frame, "args")["args"])


class KohyaHost:
    """A running sd-scripts trainer, as `spf_plugin.hosts.base.Host`.

    Raises:
        SPFError: (from `find`) there is no trainer among the callers, or it cannot be used.
    """

    WANTED = ("self", "args", "train_dataset_group", "accelerator", "tokenizers", "weight_dtype")

    def __init__(self, names: Mapping[str, Any], text_encoders: Sequence[Any], vae: Any = None, denoiser: Any = None):
        """`names` are variables of the training function, of which `WANTED` are read; the first three must be there."""
        self.vae, self.denoiser = vae, denoiser
        self.batch: Any = None  # of the training step that is predicted now
        self.trainer = names["self"]
        self.dit = dit_of(self.trainer)
        self.args = names["args"]
        self.accelerator: Any = names.get("accelerator")
        self._dataset = names["train_dataset_group"]
        self._postfix = Postfix()
        self._text = TextEncoding(
            self.trainer, self.args, self.accelerator, text_encoders, names.get("tokenizers"), names.get("weight_dtype")
        )

    @classmethod
    def find(cls, text_encoder: Any, vae: Any = None, denoiser: Any = None) -> KohyaHost:
        """The trainer that is calling `create_network` now."""
        frame = training_frame()
        if frame is None:
            raise SPFError(
                "no sd-scripts trainer is calling. spf_plugin.lora works inside a training run: accelerate launch "
                f"train_network.py --network_module spf_plugin.lora ... {SUPPORTED}"
            )
        names = local_variables(frame, *cls.WANTED)
        problem = trainer_problem(names["self"])
        if problem:
            raise SPFError(problem)
        encoders = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
        host = cls(names, encoders, vae, denoiser)
        if host.accelerator is None or not hasattr(host.accelerator, "register_save_state_pre_hook"):
            raise SPFError(f"{type(host.trainer).__name__} has no accelerator at this point. {SUPPORTED}")
        return host

    # -- facts of the run -----------------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        """Whether the loop is the `process_batch` one, with strategies for tokenizing and encoding."""
        return hasattr(self.trainer, "process_batch")

    @property
    def is_sdxl(self) -> bool:
        return bool(getattr(self.trainer, "is_sdxl", False))

    @property
    def is_unet(self) -> bool:
        """Whether its model is one, and none of the transformers."""
        return self.dit is None

    @property
    def max_train_steps(self) -> int:
        return int(self.args.max_train_steps)  # final only after the data loader was made: read late

    @property
    def first_step(self) -> int | None:
        step, epoch = getattr(self.args, "initial_step", None), getattr(self.args, "initial_epoch", None)
        if step is not None or epoch is None:
            return step
        loader = callers_variable("train_dataloader")
        if loader is None:
            raise SPFError(f"found no train_dataloader among the callers. {SUPPORTED}")
        accumulated = self.accelerator.num_processes * self.args.gradient_accumulation_steps
        return (epoch - 1) * math.ceil(len(loader) / accumulated)

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir or "", self.args.output_name or "last")

    @property
    def text_encoder_trained(self) -> bool:
        return bool(self.trainer.is_train_text_encoder(self.args))

    def folders(self) -> list[Path]:
        """Where a relative `spf_config` is looked for."""
        return rules.folders(self.args)

    def _entries(self) -> Iterator[tuple[list[str], Image]]:
        """The whole data set, as far as it is known before training: what each caption file says, and the image."""
        for dataset in getattr(self._dataset, "datasets", []):
            for key, info in getattr(dataset, "image_data", {}).items():
                captions = info.caption if isinstance(info.caption, list) else [info.caption or ""]
                yield (
                    captions,
                    Image.of(
                        captions,
                        subset_of(dataset, key),
                        is_reg=bool(getattr(info, "is_reg", False)),
                        path=getattr(info, "absolute_path", None) or "",
                    ),
                )

    def problems(self, config: SPFConfig, wrong: Collection[str] = ()) -> list[str]:
        """What would make this run wrong. Warns about what only might.

        Args:
            config: SPF's settings.
            wrong: those of them whose value is not known (`config.Read`).
        """
        device = None if self.accelerator is None else self.accelerator.device
        images, problems = own_targets.readable([image for _, image in self._entries()])
        found = rules.look(
            self.args,
            images,
            config,
            {*wrong, "target"} if problems else wrong,
            sdxl=self.is_sdxl,
            dit=self.dit,
            device=device,
            trying=True,
            stale=self._stale,
            tokenize=self.tokenize if self.dit is None and self._text.can_tokenize else None,
        )
        for warning in (*found.warnings, *found.of_captions):
            logger.warning(f"SPF: {warning}")
        ours = [*repeated(sys.argv[1:], "sd-scripts"), *name_problems(self.args, "sd-scripts")]
        return [*ours, *problems, *found.errors]

    def _stale(self, images: Sequence[Image]) -> str | None:
        """Whether cached text is not the captions': by encoding, as the text encoders are here."""
        ending = self.dit.text_cache if self.dit else TEXT_CACHE
        if not (self.dit is not None and self.dit.rebuilt) and not recaching.can_encode(self._text):
            return cached_text.by_time(images, ending)
        if not self.accelerator.is_main_process:  # one process says it; and it may still be writing the files
            return None
        with self._aside(), recaching.caching(self._text) as (encode, read):
            return cached_text.by_encoding(images, encode, read, ending)

    # -- per batch ------------------------------------------------------------------------------------------------

    @property
    def captions_before_training(self) -> Iterable[tuple[str, Sequence[Target] | None]] | None:
        """Of a UNet None: its text encoders stay, on the CPU at least. Where a transformer's text is cached and one of
        its encoders is trained, the others stay there, too, and would take seconds for a caption."""
        return self._captions_at_hand() if self._text.cached else None

    def _captions_at_hand(self) -> Iterator[tuple[str, Sequence[Target] | None]]:
        """What the caption files say and the host has encoded: cached text is neither shuffled nor framed."""
        with self._aside(), self._text.at_hand():
            for captions, image in self._entries():
                targets = read_targets(image.target) if image.target else None
                yield from ((caption, targets) for caption in captions)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The denoiser in main memory, where the host has it on the card already while it has text encoders no more."""
        place = next(self.denoiser.parameters()).device
        moved = self.dit is not None and self.dit.rebuilt and place.type != "cpu" and not self.args.lowram
        if moved:
            self.denoiser.to("cpu")
        try:
            yield
        finally:
            if moved:
                self.denoiser.to(place)

    def captions(self, batch: Any) -> list[str]:
        return [str(caption or "") for caption in batch["captions"]]

    @property
    def subset_targets(self) -> Sequence[Target]:
        return own_targets.of_images([image for _, image in self._entries()])

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        attributes = batch.get("custom_attributes") or []
        return [own_targets.of_attributes(a) for a in attributes]

    def sample_weights(self, batch: Any) -> Tensor | None:
        return batch.get("loss_weights")  # --prior_loss_weight for regularisation images

    # -- images ---------------------------------------------------------------------------------------------------

    @property
    def vae_scaling_factor(self) -> float:
        return float(self.trainer.vae_scale_factor)

    @property
    def noise_schedule(self) -> Discrete | None:
        """Of the loop that is calling, zero-terminal-SNR changes included; None for flow, which has no such table."""
        scheduler = callers_variable("noise_scheduler")  # made after the network
        if scheduler is None:
            raise SPFError(f"found no noise_scheduler among the callers. {SUPPORTED}")
        if not hasattr(scheduler, "alphas_cumprod"):
            return None
        return Discrete(scheduler.alphas_cumprod, "v_prediction" if self.args.v_parameterization else "epsilon")

    def clean_images(self, batch: Any) -> tuple[Any, Any]:
        latents, pixels = batch.get("latents"), batch.get("images")
        return (None if latents is None else latents * self.vae_scaling_factor), pixels

    # -- the loop -------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        return self._text.prefix

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        return self._text.tokenize(text, which)

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        return self._text.encode(prompts, beside)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        name, position = ("process_batch", 0) if self.is_new else ("call_unet", 6)
        original = getattr(self.trainer, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.batch = args[position] if kwargs.get("is_train", True) else None
            try:
                return original(*args, **kwargs)
            finally:
                self.batch = None

        with patching.patched(self.trainer, name, step):
            yield

    def recomputable(self) -> AbstractContextManager[None]:
        """Non-reentrant checkpointing for this pass: in a reentrant block, what a hook collects has no graph.

        SDXL asks for reentrant, SD up to v0.9.1 leaves it to torch's default (reentrant), SD from v0.10 on does not.
        """
        from torch.utils import checkpoint as module

        original = module.checkpoint

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(function, *args, **{**kwargs, "use_reentrant": False})

        return patching.patched(module, "checkpoint", checkpoint)

    def report(self, values: dict[str, float]) -> None:
        self._postfix.show(values)

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        register(self.accelerator, state, load)
