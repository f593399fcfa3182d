"""What sd-scripts can and cannot do with SPF: rules that a run and `spf check` share.

They are functions of plain data, so that both ask the very same: no trainer, no model, and no torch but where weights
are to be quantised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_plugin.config import SPFConfig
from spf_plugin.core import coverage
from spf_plugin.core.coverage import Coverage
from spf_plugin.core.prompt import Target, parse_targets, split
from spf_plugin.hosts import resuming
from spf_plugin.hosts.kohya import cached_text, own_targets
from spf_plugin.hosts.kohya.images import Image, dropped_targets
from spf_plugin.hosts.kohya.scripts import LENGTHS, text_tokens
from spf_plugin.hosts.kohya.trainers import Dit, dit_of
from spf_plugin.hosts.looking import Found, folder_problems
from spf_plugin.network_args import split_words

if TYPE_CHECKING:
    import torch

NETWORK_MODULES = ("spf_plugin.lora", "networks.spf_lora")  # --network_module: SPF by either name
DEFAULT_NETWORK = "networks.lora"
FP8_BASES = ("fp8_base", "fp8_base_unet")  # either shrinks the frozen UNet
FP8_SCALED = "fp8_scaled"  # HunyuanImage's, whose layers hold a scale beside each weight
MUCH_DROPOUT = 0.3  # of the captions
#: Words of FLUX's network with which it has no module in a double block.
NO_DOUBLE_BLOCKS = (("train_blocks", "single"), ("train_double_block_indices", "none"))
GEMMA_STEP = 8  # Lumina's text is padded to a multiple of it
SUPPORTED = (
    "SPF supports (sdxl_)train_network.py of sd-scripts v0.8.7 to v0.11.x, and anima_, sd3_, flux_, lumina_ and "
    "hunyuan_image_train_network.py"
)


def _overrides(cls: type, name: str) -> type | None:
    """The most derived class that defines `name`."""
    return next((c for c in cls.__mro__ if name in vars(c)), None)


def trainer_problem(trainer: Any) -> str | None:
    """Why this trainer cannot be used, or None. Every reason names the trainer."""
    cls = type(trainer)
    seam, prediction = _overrides(cls, "call_unet"), _overrides(cls, "get_noise_pred_and_target")
    if seam is None:
        return f"{cls.__name__} has no call_unet, as the trainers that SPF knows have. {SUPPORTED}"
    if prediction is not None and prediction is not seam and issubclass(prediction, seam) and dit_of(trainer) is None:
        return (
            f"{cls.__name__} is not supported: its model is neither a UNet nor a transformer that SPF knows. "
            f"{SUPPORTED}"
        )
    if prediction is not None and not hasattr(cls, "process_batch"):
        return f"{cls.__name__} belongs to a 2024 development branch of sd-scripts (no process_batch). {SUPPORTED}"
    return None


def folders(args: Any) -> list[Path]:
    """Where a relative `spf_config` is looked for."""
    data = [args.train_data_dir, os.path.dirname(getattr(args, "dataset_config", None) or "")]
    return [Path(), *(Path(folder) for folder in data if folder)]


def look(
    args: Any,
    images: Sequence[Image],
    config: SPFConfig,
    wrong: Collection[str] = (),
    *,
    sdxl: bool,
    dit: Dit | None = None,
    device: torch.device | None = None,
    trying: bool,
    stale: Callable[[Sequence[Image]], str | None] | None = None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int | None = None,
) -> Found:
    """What would make a run wrong.

    Args:
        args: the host's arguments.
        images: the whole data set, with targets of their own that can be read (`own_targets.readable`); may be empty
            where it is known only when training has begun.
        config: SPF's settings.
        wrong: those of them whose value is not known, because it is wrong (`config.Read`): what depends on them is
            left out.
        sdxl: the script is sdxl_train_network.py.
        dit: of the trainer, where its model is no UNet.
        device: what would be trained on; None where the run may be on another machine.
        trying: the output folder may be touched (`looking.unwritable`).
        stale: finds cached text that is not the captions'; None looks at the files' times (`cached_text`).
        tokenize: text -> token ids without begin, end and padding; None where no tokenizer is at hand.
        limit: tokens of text that are read; None: as many as CLIP reads with the host's `max_token_length`.
    """
    errors: list[str] = []
    warnings: list[str] = []
    of_captions: list[str] = []
    if args.network_train_text_encoder_only:
        errors.append(
            "--network_train_text_encoder_only trains no UNet module, and SPF aligns the UNet. Remove the option."
        )
    if getattr(args, "save_model_as", "safetensors") not in (None, "safetensors"):
        errors.append(f"--save_model_as={args.save_model_as}: SPF writes safetensors only. Remove the option.")
    if getattr(args, "cpu_offload_checkpointing", False):
        errors.append(
            "--cpu_offload_checkpointing is not supported: SPF has not been tried with it. Remove the option; "
            "--gradient_checkpointing works."
        )
    if getattr(args, "torch_compile", False):
        errors.append(
            "--torch_compile: compiled code no longer calls the hooks with which SPF reads the attention layers. "
            "Remove the option."
        )
    if getattr(args, "train_inpainting", False):  # from v0.11 on
        errors.append(
            "--train_inpainting gives the UNet nine channels, and SPF knows four: the noisy latents. Remove the option."
        )
    errors += folder_problems(getattr(args, "output_dir", None), trying=trying)
    errors += cached_text.problems(args, images, sdxl=sdxl, ending=dit.text_cache if dit else None, stale=stale)
    errors += cached_text.kept_captions(images)
    warnings += _skipped_warnings(args)
    if dit is not None:
        errors += _dit_problems(args, config, wrong, dit)
        warnings += _noisy_text(args, dit)
    dropped = dropped_targets(args)
    if dropped:
        errors.append(
            f"the subset's own spf_target {dropped[0]!r} is lost: with conditioning_data_dir sd-scripts drops a "
            "subset's custom_attributes. Name the target in --network_args, or train without masks."
        )
    errors += _base_problems(args, config, wrong, device, dit)
    errors += resuming.problems(resuming.of_run(args), config, own_targets.of_images(images), wrong)
    steps = getattr(args, "max_train_steps", None)
    # Of epochs the host makes steps later, and what is resumed may be aligned already.
    later = getattr(args, "max_train_epochs", None) or getattr(args, "resume", None)
    if steps and not later and "stage2_start" not in wrong:
        errors += config.never_aligned(steps)
    errors += _dropout_problems(images)
    if "target" not in wrong and not dropped:
        limit = limit or text_tokens(getattr(args, "max_token_length", None))
        said = coverage.coverage(list(_captions(images)), config.target, tokenize, limit)
        errors += _target_problems(images, config, said, limit)
        of_captions += coverage.warnings(said, limit)
        of_captions += _taken_warnings(images, config)
    return Found(errors, warnings, of_captions)


def _skipped_warnings(args: Any) -> list[str]:
    """Where the host leaves more out at the start than it was asked to."""
    accumulated = getattr(args, "gradient_accumulation_steps", None) or 1
    if not getattr(args, "skip_until_initial_step", False) or accumulated < 2:
        return []
    return [
        f"--skip_until_initial_step: with gradient_accumulation_steps={accumulated} sd-scripts up to v0.11.x skips "
        f"{accumulated} times as many epochs as it should, and may end without a step. Without it, a run resumes at "
        "the beginning of its epoch"
    ]


def _dit_problems(args: Any, config: SPFConfig, wrong: Collection[str], dit: Dit) -> list[str]:
    """What SPF cannot do with a diffusion transformer."""
    found: list[str] = []
    if getattr(args, "compile", False):  # from v0.11 on
        found.append(
            "--compile: compiled blocks no longer call the hooks with which SPF reads the attention layers. Remove the "
            "option."
        )
    if getattr(args, "pos_emb_random_crop_rate", 0):
        found.append(
            f"--pos_emb_random_crop_rate={args.pos_emb_random_crop_rate} puts the image somewhere else in every pass "
            "of the model, and SPF compares passes. Remove the option."
        )
    if getattr(args, "weighted_captions", False):
        found.append(
            "--weighted_captions is not made for this model: sd-scripts fails, or encodes brackets and numbers as "
            "words. Remove the option, and the weights from the captions."
        )
    cached, on_disk = (getattr(args, name, False) for name in cached_text.TEXT_CACHES)
    if dit.rebuilt and cached and not on_disk:
        found.append(
            "--cache_text_encoder_outputs alone: sd-scripts fails at the first batch of HunyuanImage text that it "
            "keeps in memory. Use --cache_text_encoder_outputs_to_disk."
        )
    longest = getattr(args, "gemma2_max_token_length", None) or GEMMA_STEP
    if longest % GEMMA_STEP:
        found.append(
            f"--gemma2_max_token_length={longest}: sd-scripts cuts captions there, but pads them to a multiple of "
            f"{GEMMA_STEP}, and SPF could not tell what is cut off. Use {-(-longest // GEMMA_STEP) * GEMMA_STEP}."
        )
    if config.enhances:
        found.append(
            f"spf_response={config.response} needs pixels of latents, and SPF has decoders for those of SD and SDXL "
            "only. Leave it out."
        )
    unknown = {"text_consistent_multiplier", "fine_grained_multiplier"}.intersection(wrong)
    if getattr(args, "unsloth_offload_checkpointing", False) and config.compares_attention and not unknown:
        found.append(
            "--unsloth_offload_checkpointing computes the blocks without a graph, so the losses on attention and "
            "queries would train nothing. Use --gradient_checkpointing alone, or set spf_text_consistent_multiplier=0 "
            "and spf_fine_grained_multiplier=0."
        )
    found += _early_layers(args, config, dit)
    if config.base != "off" and getattr(args, "blocks_to_swap", None):
        found.append(
            f"spf_base={config.base} and --blocks_to_swap cannot go together: the host moves weights that are no "
            "longer there. Leave one of them out."
        )
    return found


def _early_layers(args: Any, config: SPFConfig, dit: Dit) -> list[str]:
    """Where all layers that are compared lie before the first module that is trained."""
    found: list[str] = []
    _, theirs = split_words(args.network_args or [])
    said = [f"{name}={theirs[name]}" for name, value in NO_DOUBLE_BLOCKS if theirs.get(name) == value]
    if dit.network == "networks.lora_flux" and said and config.layers == "last" and config.compares_attention:
        found.append(
            f"{said[0]}: only single blocks are trained, and spf_layers=last compares double blocks, which lie before "
            "them, so the losses on attention and queries would train nothing. Compare single blocks behind the first "
            "trained one, such as spf_layers=single_blocks.(28|32|37), or set spf_text_consistent_multiplier=0 and "
            "spf_fine_grained_multiplier=0."
        )
    return found


def _noisy_text(args: Any, dit: Dit) -> list[str]:
    """Where the host's own text is not what its encoders give."""
    found: list[str] = []
    if dit.drops_out and getattr(args, "gradient_checkpointing", False) and not cached_text.asked_for(args):
        found.append(
            "with --gradient_checkpointing sd-scripts leaves the dropout of T5 on where it encodes text in every step, "
            "so this text is noisy beside the base prompts': add --cache_text_encoder_outputs"
        )
    return found


def _base_problems(
    args: Any, config: SPFConfig, wrong: Collection[str], device: torch.device | None, dit: Dit | None
) -> list[str]:
    """Why `spf_base` would not work here."""
    if config.base == "off":
        return []
    from spf_plugin.adapter import quantised  # imports torch

    _, theirs = split_words(args.network_args or [])
    default = dit.network if dit else DEFAULT_NETWORK
    found = [] if "network" in wrong else quantised.problems(config.base, config.network or default, theirs)
    fp8 = [name for name in (*FP8_BASES, FP8_SCALED) if getattr(args, name, False)]
    if fp8:
        found.append(
            f"spf_base={config.base} and --{fp8[0]} both shrink the frozen UNet. Leave one of them out; "
            "spf_base=nf4 is the smaller."
        )
    if device is not None:
        found += quantised.device_problems(config.base, device)
    return found


def _captions(images: Sequence[Image]) -> Iterator[tuple[tuple[str, ...], tuple[Target, ...] | None]]:
    """Every training image's caption as all that it may become, with the targets of its subset or None."""
    for image in images:
        targets = parse_targets(image.target) if image.target else None
        if not image.is_reg:
            yield image.prompts, targets


def _target_problems(images: Sequence[Image], config: SPFConfig, said: Coverage, limit: int) -> list[str]:
    """Why nothing would be learned."""
    found: list[str] = []
    if not config.target and not any(image.target for image in images if not image.is_reg):
        found.append(
            'no target. Say what the LoRA shall learn, as the captions say it: --network_args "spf_target=blonde hair"'
        )
        return found
    longer = next((f", or set --max_token_length {length}" for length in LENGTHS if length > limit), "")
    return found + coverage.problems(said, config.target, limit, longer)


def _dropout_problems(images: Sequence[Image]) -> list[str]:
    """Captions that no step shows."""
    found: list[str] = []
    trained = [image for image in images if not image.is_reg]
    if trained and all(image.dropout >= 1 for image in trained):
        found.append(
            "every caption is left out at every step (caption_dropout_rate or caption_dropout_every_n_epochs is 1), so "
            "nothing says the target. Use a rate of 0.1 or less."
        )
    return found


def _taken_warnings(images: Sequence[Image], config: SPFConfig) -> list[str]:
    """Targets that images show while their captions do not say them any more."""
    found: list[str] = []
    trained = [image for image in images if not image.is_reg]
    lost = [image for image in trained if may_lose_target(image, config.target)]
    if lost:
        found.append(
            f"caption_tag_dropout_rate or token_warmup_step takes the target out of {len(lost)} of {len(trained)} "
            "captions while their images show it: put it first and set keep_tokens = 1"
        )
    much = [image for image in trained if image.dropout >= MUCH_DROPOUT]
    if much and not _dropout_problems(images):
        found.append(
            f"up to {max(image.dropout for image in much):.0%} of the captions of {len(much)} of {len(trained)} images "
            "are dropped; those steps are plain training, without SPF: a rate of 0.1 or less is usual"
        )
    return found


def may_lose_target(image: Image, targets: Sequence[Target]) -> bool:
    """Whether tag dropout or token warm-up may take the target out of a caption that says it."""
    own = parse_targets(image.target) if image.target else targets
    return any(split(text, own).has_target and not split(left, own).has_target for text, left in image.taken)
