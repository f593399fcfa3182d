"""The training loop of sd-scripts, as `spf_plugin.hosts.base.Host`.

Supported loops: the monolithic one (v0.8.7 to v0.9.1), whose steps pass `trainer.call_unet(...)`, and `process_batch`
(2025 branches, v0.10 on), for SD1.x, SD2.x and SDXL. Both end in `accelerator.backward(loss)`.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from spf_plugin import patching
from spf_plugin.adapter import quantised
from spf_plugin.config import SPFConfig, split_network_args
from spf_plugin.core.prompt import Target, parse_targets, split
from spf_plugin.core.schedule import Discrete
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.hosts.kohya.captions import prompts
from spf_plugin.hosts.kohya.frames import callers_variable, local_variables, training_frame
from spf_plugin.hosts.kohya.rules import SUPPORTED, trainer_problem, unwritable
from spf_plugin.hosts.kohya.state import register
from spf_plugin.hosts.kohya.text import TextEncoding
from spf_plugin.pairs import State

logger = logging.getLogger(__name__)

DEFAULT_NETWORK = "networks.lora"
CUSTOM_TARGET = "spf_target"
TEXT_CACHE = "_te_outputs.npz"  # after an image's name: both releases' cache of its caption's encoding


class KohyaHost:
    """A running sd-scripts trainer, as `spf_plugin.hosts.base.Host`.

    Raises:
        SPFError: (from `find`) there is no trainer among the callers, or it cannot be used.
    """

    running = True  # else the run is only looked at, and nothing may be touched
    WANTED = ("self", "args", "train_dataset_group", "accelerator", "tokenizers", "weight_dtype")

    def __init__(self, names: Mapping[str, Any], text_encoders: Sequence[Any], vae: Any = None, denoiser: Any = None):
        """`names` are variables of the training function, of which `WANTED` are read; the first three must be there."""
        self.vae, self.denoiser = vae, denoiser
        self.batch: Any = None  # of the training step that is predicted now
        self.trainer = names["self"]
        self.args = names["args"]
        self.accelerator: Any = names.get("accelerator")
        self._dataset = names["train_dataset_group"]
        self._progress_bar_seen = False
        self._postfix: dict[str, float] = {}
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
        data = [self.args.train_data_dir, os.path.dirname(getattr(self.args, "dataset_config", None) or "")]
        return [Path(), *(Path(folder) for folder in data if folder)]

    def _images(self) -> Iterator[tuple[str, Sequence[Target] | None, bool]]:
        """`(caption, per-image targets, is regularisation image)` of the whole data set."""
        for info, subset in self._infos():
            captions = info.caption if isinstance(info.caption, list) else [info.caption or ""]
            attributes = getattr(subset, "custom_attributes", None) or {}
            targets = parse_targets(attributes[CUSTOM_TARGET]) if attributes.get(CUSTOM_TARGET) else None
            for caption in captions:
                for text in prompts(caption, subset):
                    yield text, targets, bool(getattr(info, "is_reg", False))

    def _infos(self) -> Iterator[tuple[Any, Any]]:
        """The host's note about each image, and its subset."""
        for dataset in getattr(self._dataset, "datasets", []):
            for key, info in getattr(dataset, "image_data", {}).items():
                yield info, getattr(dataset, "image_to_subset", {}).get(key)

    def problems(self, config: SPFConfig | None) -> list[str]:
        """What would make this run wrong. Warns about what only might."""
        args, found = self.args, []
        if args.network_train_text_encoder_only:
            found.append(
                "--network_train_text_encoder_only trains no UNet module, and SPF aligns the UNet. Remove the option."
            )
        if getattr(args, "save_model_as", "safetensors") not in (None, "safetensors"):
            found.append(f"--save_model_as={args.save_model_as}: SPF writes safetensors only. Remove the option.")
        if getattr(args, "cpu_offload_checkpointing", False):
            found.append("--cpu_offload_checkpointing is not made for SD and SDXL UNets. Remove the option.")
        if getattr(args, "torch_compile", False):
            found.append(
                "--torch_compile: compiled code no longer calls the hooks with which SPF reads the attention layers. "
                "Remove the option."
            )
        if getattr(args, "output_dir", None):
            reason = unwritable(Path(args.output_dir), trying=self.running)
            if reason:  # the host would find out when it saves, after hours
                found.append(f"--output_dir {args.output_dir}: nothing can be written there: {reason}.")
        found += self._cached_text_problems()
        if config is not None:
            found += [*self._base_problems(config), *self._target_problems(config)]
        return found

    def _cached_text_problems(self) -> list[str]:
        """Where the text that the host has cached is not the text that it reports as the caption."""
        on_disk = getattr(self.args, "cache_text_encoder_outputs_to_disk", False)  # turns the other on
        if not (getattr(self.args, "cache_text_encoder_outputs", False) or on_disk) or not self.is_sdxl:
            return []  # without SDXL they are in the arguments only where a file names them, and do nothing
        found, stale = [], []
        if any(getattr(subset, f"caption_{end}", None) for _, subset in self._infos() for end in ("prefix", "suffix")):
            found.append(
                "caption_prefix and caption_suffix do nothing together with --cache_text_encoder_outputs: sd-scripts "
                "then encodes the captions without them. Write them into the caption files."
            )
        for info, subset in self._infos():
            stem = os.path.splitext(getattr(info, "absolute_path", None) or "")[0]
            caption, cache = stem + (getattr(subset, "caption_extension", None) or ""), stem + TEXT_CACHE
            if stem and os.path.isfile(caption) and os.path.isfile(cache):
                stale += [cache] if os.path.getmtime(caption) > os.path.getmtime(cache) else []
        if stale and on_disk:
            found.append(
                f"{len(stale)} captions were changed after their encoding was cached, and sd-scripts would train with "
                f"the old ones, e.g. {os.path.basename(stale[0])}. Delete the *{TEXT_CACHE} files."
            )
        return found

    def _base_problems(self, config: SPFConfig) -> list[str]:
        """Why `spf_base` would not work here."""
        if config.base == "off":
            return []
        words = [str(word) for word in self.args.network_args or []]
        _, theirs = split_network_args(dict(word.split("=", 1) for word in words if "=" in word))
        found = quantised.problems(config.base, config.network or DEFAULT_NETWORK, theirs)
        fp8 = [name for name in ("fp8_base", "fp8_base_unet") if getattr(self.args, name, False)]
        if fp8:
            found.append(
                f"spf_base={config.base} and --{fp8[0]} both shrink the frozen UNet. Leave one of them out; "
                "spf_base=nf4 is the smaller."
            )
        if self.accelerator is not None:  # `spf check` may run on another machine
            found += quantised.device_problems(config.base, self.accelerator.device)
        return found

    def _target_problems(self, config: SPFConfig) -> list[str]:
        try:
            images = [(caption, targets) for caption, targets, is_reg in self._images() if not is_reg]
        except ValueError as error:
            return [f"custom_attributes.{CUSTOM_TARGET} in the dataset TOML {error}"]
        if not config.target and not any(targets for _, targets in images):
            return [
                "no target. Say what the LoRA shall learn, as the captions say it: "
                '--network_args "spf_target=blonde hair"'
            ]
        if not images:
            return []  # an arbitrary dataset class: captions are known only when they come
        without = [c for c, targets in images if not split(c, config.target if targets is None else targets).has_target]
        if len(without) == len(images):
            common = Counter(part.strip() for c in without for part in c.split(",") if part.strip()).most_common(5)
            said = (
                ", ".join(repr(part) for part, _ in common) or "nothing (captions are empty: check --caption_extension)"
            )
            wanted = "|".join(str(t) for t in config.target)
            return [f"the target {wanted!r} occurs in none of the {len(images)} captions. They most often say {said}."]
        if without:
            examples = "; ".join(repr(c[:80]) for c in without[:3])
            logger.warning(
                f"SPF: {len(without)} of {len(images)} captions do not contain the target and only preserve the base "
                f"model, e.g. {examples}"
            )
        unused = [
            str(t)
            for t in config.target
            if not any(split(c, [t]).has_target for c, targets in images if targets is None)
        ]
        if unused:
            logger.warning(f"SPF: no caption contains {', '.join(map(repr, unused))}")
        return []

    # -- per batch ------------------------------------------------------------------------------------------------

    def captions(self, batch: Any) -> list[str]:
        return [str(caption or "") for caption in batch["captions"]]

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        attributes = batch.get("custom_attributes") or []
        return [parse_targets(a[CUSTOM_TARGET]) if a and a.get(CUSTOM_TARGET) else None for a in attributes]

    # -- images ---------------------------------------------------------------------------------------------------

    @property
    def vae_scaling_factor(self) -> float:
        return float(self.trainer.vae_scale_factor)

    @property
    def noise_schedule(self) -> Discrete:
        """Of the loop that is calling, zero-terminal-SNR changes included."""
        scheduler = callers_variable("noise_scheduler")  # made after the network
        if scheduler is None:
            raise SPFError(f"found no noise_scheduler among the callers. {SUPPORTED}")
        return Discrete(scheduler.alphas_cumprod, "v_prediction" if self.args.v_parameterization else "epsilon")

    def clean_images(self, batch: Any) -> tuple[Any, Any]:
        latents, pixels = batch.get("latents"), batch.get("images")
        return (None if latents is None else latents * self.vae_scaling_factor), pixels

    # -- the loop -------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> Sequence[int]:
        return self._text.tokenize(text)

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

        SDXL asks for reentrant, SD up to v0.9.1 leaves it to torch's default (reentrant), SD in v0.10 is non-reentrant.
        """
        from torch.utils import checkpoint as module

        original = module.checkpoint

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return original(function, *args, **{**kwargs, "use_reentrant": False})

        return patching.patched(module, "checkpoint", checkpoint)

    def report(self, values: dict[str, float]) -> None:
        self._postfix = {name: round(value, 4) for name, value in values.items()}
        if not self._progress_bar_seen:
            self._progress_bar_seen = True
            bar = callers_variable("progress_bar")
            if bar is not None:
                original = bar.set_postfix

                def set_postfix(*args: Any, **kwargs: Any) -> None:
                    original(*args, **{**kwargs, **self._postfix})

                bar.set_postfix = set_postfix  # the bar belongs to this run and ends with it: nothing to put back

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        register(self.accelerator, state, load)
