"""Reads a preset, a `--config_file`, as the run that `plan` predicts; musubi-tuner's by `preset_musubi`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import read_toml
from spf_plugin.hosts.kohya.cached_text import TEXT_CACHES
from spf_plugin.hosts.kohya.rules import FP8_BASES, NETWORK_MODULES
from spf_plugin.hosts.kohya.scripts import MODELS
from spf_plugin.tools import preset_musubi
from spf_plugin.tools.check import family
from spf_plugin.tools.check.host_options import OPTIONS, SDXL_ONLY
from spf_plugin.tools.check.source import DEFAULTS, unfolded
from spf_plugin.tools.plan import Run
from spf_plugin.tools.plan_dit import TRANSFORMERS
from spf_plugin.tools.preset_settings import UNSAVED, flag, optimizer, spf_settings, whole

PLANNED = ("sd1", "sd2", "sdxl", *TRANSFORMERS)
_CHOICE = f"{', '.join(PLANNED[:-1])} or {PLANNED[-1]}"


def _resolution(value: Any, problems: list[str]) -> tuple[int, int]:
    try:
        sides = [int(v) for v in (value if isinstance(value, list) else str(value).split(","))]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or any(not 64 <= side <= 4096 for side in sides):
        problems.append(f'resolution = {value!r}: must be pixels from 64 to 4096, such as "512,512"')
        return 512, 512
    return sides[0], sides[-1]


def _model(settings: Mapping[str, Any], path: Path, given: str | None, problems: list[str]) -> family.Family:
    if given:
        return family.Family(given)
    found = family.find(settings, path)
    if not found.name:
        problems.append(f"which base model it trains is not clear from this file; add --model {_CHOICE}")
        return family.Family("sd1")
    if found.name not in PLANNED:
        problems.append(f"there are no figures for {MODELS[found.name]}")
    return found


def read(path: Path, model: str | None = None, dataset: Path | None = None) -> tuple[Run, list[str]]:
    """A preset as a run, and what it leaves out.

    Args:
        path: a `--config_file` of sd-scripts, or of musubi-tuner.
        model: one of `PLANNED` or of `plan_musubi.MODELS`; else what the file tells.
        dataset: musubi-tuner's `--dataset_config`, where the file names none or another is meant.

    Raises:
        SPFError: with every mistake: no such file, no TOML, unknown keys, values out of range, and settings for which
            there are no figures.
    """
    if not os.path.isfile(path):
        raise SPFError(f"{path}: there is no such file. Give a training preset, such as presets/sd15-8gb.toml.")
    settings = unfolded(read_toml(path))
    if "datasets" in settings and "pretrained_model_name_or_path" not in settings:
        raise SPFError(f"{path} is a data set configuration. Give the preset that is passed as --config_file.")
    if preset_musubi.is_one(settings, path, model):
        return preset_musubi.read(path, settings, model, dataset)
    if dataset is not None:
        raise SPFError("--dataset_config is for presets of musubi-tuner; sd-scripts' name their resolution themselves.")
    problems = [
        f"unknown setting {name!r}{nearest(name, OPTIONS) or ': sd-scripts has no such option'}"
        for name in settings
        if name not in OPTIONS
    ]
    if "resolution" not in settings:
        problems.append('resolution is missing; write for example resolution = "512,512"')
    width, height = _resolution(settings.get("resolution", 512), problems)
    precision = settings.get("mixed_precision", "no")
    if precision not in ("fp16", "bf16"):
        problems.append(f'mixed_precision = {precision!r}: there are figures for "fp16" and "bf16" only; set one')
    if not flag(settings, "network_train_unet_only", problems):
        problems.append("there are no figures for training the text encoder; set network_train_unet_only = true")
    if not (flag(settings, "cache_latents", problems) | flag(settings, "cache_latents_to_disk", problems)):
        problems.append("there are no figures for a VAE that stays on the card; set cache_latents = true")
    attention = [flag(settings, name, problems) for name in ("sdpa", "xformers", "mem_eff_attn")]
    spf = spf_settings(settings, path.parent, NETWORK_MODULES, problems)
    shrunk = [flag(settings, name, problems) for name in FP8_BASES]
    fp8 = any(shrunk)
    base = "off" if spf is None else spf.base
    if fp8 and base != "off":
        problems.append(f"spf_base={base} and fp8_base both shrink the frozen UNet; leave one of them out")
    kind = _model(settings, path, model, problems)
    cached = [flag(settings, name, problems) for name in TEXT_CACHES]
    transformer = TRANSFORMERS.get(kind.name)
    if transformer is not None:
        if not any(cached):
            problems.append("there are no figures for text encoders on the card; set cache_text_encoder_outputs = true")
        fp8 = bool(transformer.fp8) and flag(settings, transformer.fp8, problems)
        if base != "off":
            problems.append(f"there are no figures for spf_base={base} with {MODELS[kind.name]}")
    run = Run(
        model=kind.name,
        width=width,
        height=height,
        batch=whole(settings, "train_batch_size", 1, problems),
        rank=whole(settings, "network_dim", 4, problems),
        checkpointing=flag(settings, "gradient_checkpointing", problems),
        weights=base if base != "off" else "fp8" if fp8 else "bf16",
        fused_attention=any(attention) or transformer is not None,
        text_cached=kind.name not in ("sd1", "sd2") and any(cached),
        optimizer=optimizer(settings, problems),
        save_bytes=2 if settings.get("save_precision") in ("fp16", "bf16") else 4,
        steps=0
        if "max_train_epochs" in settings
        else whole(settings, "max_train_steps", DEFAULTS["max_train_steps"], problems),
        accumulation=whole(settings, "gradient_accumulation_steps", 1, problems),
        swapped=whole(settings, "blocks_to_swap", 0, problems, low=0) if transformer else 0,
        spf=spf,
    )
    if fp8 and not run.checkpointing:
        problems.append(UNSAVED)
    if problems:
        raise SPFError([problem.rstrip(".") + "." for problem in problems])
    return run, _notes(settings, run, kind)


def _notes(settings: Mapping[str, Any], run: Run, kind: family.Family) -> list[str]:
    notes = []
    if kind.guess:
        notes.append(f"{MODELS[run.model]} is guessed from {kind.guess}. If it is another: --model {_CHOICE}.")
    if run.model == "sd3":
        notes.append("SD3 is planned as SD3.5 medium; SD3.5 large has 3.6 times the weights.")
    if run.transformer is not None:
        notes.append("Text lengths are the trainer's own; swapped blocks cost time that is not counted.")
    ignored = [name for name in SDXL_ONLY if settings.get(name)] if run.model in ("sd1", "sd2") else []
    if ignored:
        notes.append(f"{', '.join(ignored)}: only sdxl_train_network.py has it; train_network.py ignores it.")
    if run.spf is None:
        notes.append("network_module is not spf_plugin.lora: planned as a plain LoRA.")
    elif getattr(run.spf, "enhances", False):
        notes.append("The response term's CLIP model is not counted.")
    words = [str(word) for word in settings.get("network_args", [])]
    if any(word.split("=")[0] in ("conv_dim", "algo", "spf_network", "spf_train") for word in words):
        notes.append("File and optimizer are those of a plain LoRA on all linear layers.")
    if "dataset_config" in settings:
        notes.append("resolution and train_batch_size are taken from this file, not from the data set's.")
    if any(name.startswith("sample_every") for name in settings):
        notes.append("Sample images during training need the VAE for a moment; that is not counted.")
    return notes
