"""Reads a preset of musubi-tuner, with its data set, as the run that `plan` predicts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import CONFIG_BYTES, read_text
from spf_plugin.hosts.musubi import rules
from spf_plugin.hosts.musubi.rules import HOST
from spf_plugin.hosts.musubi.scripts import SCRIPTS, Script
from spf_plugin.tools.check.musubi import data, options
from spf_plugin.tools.plan import Run, video_frames
from spf_plugin.tools.plan_musubi import CAST, DENSE, MODELS, SCALED, MusubiModel
from spf_plugin.tools.preset_settings import UNSAVED, optimizer, spf_settings, whole

CHOICE = f"{', '.join([*MODELS][:-1])} or {[*MODELS][-1]}"
# What the names of models and of presets say, by trainer.
_NAMED = {
    "zimage": re.compile(r"z[-_]?image"),
    "qwen_image": re.compile(r"qwen[-_]?image"),
    "flux_2": re.compile(r"flux[-_.]?2|klein"),
    "krea2": re.compile(r"krea[-_.]?2"),
    "wan": re.compile(r"wan(?![a-z])"),
}
# Planned where no data set is named, of images and of clips: what the data sets beside the presets have.
_ASSUMED = {False: (1024, 1024, 1), True: (480, 272, 7)}
_DATA_CODES = ("dataset-config", "batch-size", "frames")  # of what the data set is, not of what lies in its folders
_USUAL = [960, 544]  # the host's own resolution, of a data set that says none


@dataclass(frozen=True)
class _Sample:
    """What a step shows.

    Attributes:
        width: in pixels.
        height: in pixels.
        frames: as the model has them.
        batch: samples of a step.
        label: of the data set that it is of; empty where it is assumed.
    """

    width: int
    height: int
    frames: int
    batch: int = 1
    label: str = ""

    @property
    def pixels(self) -> int:
        return self.width * self.height * self.frames * self.batch


def is_one(settings: Mapping[str, Any], path: Path, model: str | None) -> bool:
    """Whether a `--config_file` is of musubi-tuner, and not of sd-scripts.

    Args:
        settings: what the file says.
        path: the file.
        model: what the user says that it trains; None where nothing.
    """
    if model is not None:
        return model in MODELS
    if "pretrained_model_name_or_path" in settings:
        return False
    return "dit" in settings or _in_comments(path) is not None


def _in_comments(path: Path) -> Script | None:
    """The one trainer that the comments of a file start."""
    names = set(re.findall(r"\b(\w*train_network\w*)\.py\b", read_text(path, CONFIG_BYTES)))
    scripts = [script for script in SCRIPTS if script.name in names]
    return scripts[0] if len(scripts) == 1 else None


def _script(settings: Mapping[str, Any], path: Path) -> tuple[Script | None, str]:
    """The trainer, and what it is guessed from; None where nothing tells it."""
    by_arch = {script.arch: script for script in SCRIPTS if script.supported}
    for arch, own in (("wan", ("task", "t5")), ("krea2", ("turbo_dit",))):
        if any(name in settings for name in own):
            return by_arch[arch], ""
    if any(settings.get("model_version") in model.chosen_by[1] for model in MODELS.values()):
        return by_arch["flux_2"], ""
    script = _in_comments(path)
    if script is not None:
        return script, f"the script that {path.name} names in a comment"
    file = str(settings.get("dit") or "").replace("\\", "/").rsplit("/", 1)[-1]
    for name, said in ((file, f"the model's name, {file}"), (path.stem, f"the name of {path.name}")):
        for arch, pattern in _NAMED.items():
            if pattern.search(name.lower()):
                return by_arch[arch], said
    return None, ""


def _model(script: Script, args: Any, problems: list[str]) -> MusubiModel | None:
    """What a trainer trains with these options."""
    models = [model for model in MODELS.values() if model.arch == script.arch]
    option = models[0].chosen_by[0] if models else ""
    if not option:
        return models[0] if models else None
    value = getattr(args, option)
    found = next((model for model in models if value in model.chosen_by[1]), None)
    if found is None and not problems:  # the rules may have said why already
        known = ", ".join(value for model in models for value in model.chosen_by[1])
        problems.append(f"{option} = {value!r}: there are figures for {known}")
    return found


def _sample(
    path: Path | None, args: Any, script: Script, model: MusubiModel, problems: list[str]
) -> tuple[_Sample, list[str]]:
    """The largest that a data set has, and what to say of it."""
    if path is None:
        width, height, frames = _ASSUMED[model.clips]
        what = f"clips of {video_frames(frames)} frames, {width} x {height}" if model.clips else f"{width} x {height}"
        said = f"No data set is named: planned with {what}, one in a batch. --dataset_config FILE takes yours."
        return _Sample(width, height, frames), [said]
    if not os.path.isfile(path):
        problems.append(f"dataset_config {path}: there is no such file (from {Path.cwd()})")
        return _Sample(*_ASSUMED[model.clips]), []
    found = data.read(path, script)
    said_wrong = [one for one in found.findings if one.code in _DATA_CODES]
    problems += [f"{one.message}. {one.fix}".strip() for one in said_wrong if one.level == "error"]
    datasets = [one.data for one in found.found]
    problems += [*rules.dataset_problems(datasets, script), *rules.batch_problems(args, datasets, script)]
    samples = [_of(one) for one in found.found]
    for sample in samples:
        if not all(64 <= side <= 4096 for side in (sample.width, sample.height)):
            size = f"[{sample.width}, {sample.height}]"
            problems.append(
                f"resolution = {size} in {sample.label}: must be pixels from 64 to 4096, such as [1024, 1024]"
            )
    if not samples:
        return _Sample(*_ASSUMED[model.clips]), []
    largest = max(samples, key=lambda sample: sample.pixels)
    notes = [f"{one.message}." for one in said_wrong if one.level != "error"]
    if len(samples) > 1:
        notes.append(f"Planned with {largest.label}, the largest of {len(samples)} data sets.")
    return largest, notes


def _of(found: data.Found) -> _Sample:
    size = found.values.get("resolution", _USUAL)
    width, height = (size, size) if isinstance(size, int) else size
    frames = 1
    if found.data.video:
        most = found.values.get("target_frames") or [1]
        whole_clip = found.values.get("frame_extraction") == "full"
        frames = ((found.values.get("max_frames", 129) if whole_clip else max(most)) - 1) // 4 + 1
    return _Sample(width, height, max(frames, 1), max(int(found.values.get("batch_size", 1)), 1), found.data.label)


def read(
    path: Path, settings: Mapping[str, Any], model: str | None, dataset: Path | None = None
) -> tuple[Run, list[str]]:
    """A preset as a run, and what it leaves out.

    Args:
        path: musubi-tuner's `--config_file`.
        settings: what it says.
        model: one of `MODELS`; else what the file tells.
        dataset: a `--dataset_config`, in place of the file's own.

    Raises:
        SPFError: with every mistake.
    """
    guess = ""
    if model is None:
        script, guess = _script(settings, path)
    else:
        script = next(one for one in SCRIPTS if one.arch == MODELS[model].arch)
    if script is None:
        raise SPFError(f"which model of {HOST} {path.name} trains is not clear from it; add --model {CHOICE}.")
    args, findings = options.read(path, {}, script)
    problems = [f"{one.message}. {one.fix}".strip() for one in findings]
    problems += [*rules.model_problems(args, script), *rules.option_problems(args, script)]
    kind = MODELS[model] if model else _model(script, args, problems)
    if kind is None:
        raise SPFError([problem.rstrip(".") + "." for problem in problems])
    spf = spf_settings(args.given, path.parent, (rules.NETWORK_MODULE,), problems)
    problems += rules.setting_problems(spf) if spf else []
    if args.mixed_precision not in ("fp16", "bf16"):
        problems.append(
            f'mixed_precision = {args.mixed_precision!r}: there are figures for "fp16" and "bf16" only; set one'
        )
    for name in ("num_layers", "use_32bit_attention"):
        if getattr(args, name):
            problems.append(f"there are no figures for {name}; leave it out")
    forced = bool(args.force_v2_1_time_embedding) and kind.name == "wan-a14b"
    kind = MODELS["wan-14b"] if forced else kind
    of_data = dataset or (Path(args.dataset_config) if args.dataset_config else None)
    sample, notes = _sample(of_data, args, script, kind, problems)
    weights = (SCALED if args.fp8_scaled else CAST) if args.fp8_base else DENSE
    if weights != DENSE and not args.gradient_checkpointing:
        problems.append(UNSAVED)
    swapped = whole(args.given, "blocks_to_swap", 0, problems, low=0)
    if swapped > kind.swappable:
        problems.append(f"blocks_to_swap = {swapped}: of {kind.said} {HOST} swaps {kind.swappable} at most")
    run = Run(
        model=kind.name,
        width=sample.width,
        height=sample.height,
        batch=sample.batch,
        frames=sample.frames,
        rank=whole(args.given, "network_dim", 4, problems),
        checkpointing=bool(args.gradient_checkpointing),
        weights=weights,
        fused_attention=True,  # the host does not train without
        text_cached=True,
        optimizer=optimizer(args.given, problems),
        save_bytes=2 if args.save_precision in ("fp16", "bf16") else 4,
        steps=0 if args.max_train_epochs else whole(args.given, "max_train_steps", args.max_train_steps, problems),
        accumulation=whole(args.given, "gradient_accumulation_steps", 1, problems),
        swapped=swapped,
        spf=spf,
    )
    if problems:
        raise SPFError([problem.rstrip(".") + "." for problem in problems])
    if forced:
        notes.append("With force_v2_1_time_embedding Wan 2.2 A14B takes what Wan 2.1 14B takes, and is shown as that.")
    return run, [*_notes(args, run, kind, guess), *notes]


def _notes(args: Any, run: Run, kind: MusubiModel, guess: str) -> list[str]:
    notes = []
    if guess:
        notes.append(f"{kind.said} is guessed from {guess}. If it is another: --model {CHOICE}.")
    if run.weights == CAST:
        notes.append("fp8_base alone: every weight of the transformer in 8 bits, norms and biases, too.")
    if run.weights == SCALED:
        notes.append(
            "fp8_base and fp8_scaled: the linear layers of the blocks in 8 bits, with a scale in 16 for every 64 "
            "weights; the rest in 16 bits." + (" fp8_base alone is another figure." if CAST in kind.weights else "")
        )
    if kind.arch in ("zimage", "qwen_image", "krea2"):
        notes.append("Texts are taken for 256 tokens.")
    if run.swapped:
        notes.append("Swapped blocks cost time that is not counted.")
    if args.gradient_checkpointing_cpu_offload:
        notes.append("gradient_checkpointing_cpu_offload: what it saves is not counted.")
    if run.spf is None:
        notes.append(f"network_module is not {rules.NETWORK_MODULE}: planned as a plain LoRA.")
    words = [str(word) for word in args.network_args or []]
    if any(word.split("=")[0] in ("algo", "conv_dim", "spf_network", "include_patterns") for word in words):
        notes.append("File and optimizer are those of a plain LoRA on the layers that the trainer chooses.")
    if any(args.given.get(name) for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")):
        notes.append("Sample images during training need more for a moment; that is not counted.")
    return notes
