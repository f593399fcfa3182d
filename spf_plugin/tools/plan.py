"""What a run needs, from its settings alone: peak VRAM, time beside a plain LoRA, size of the file.

The figures behind it (`plan.json`) are tracked, not measured on a GPU: `python -m benchmarks.step_cost` runs the real
UNets on tensors without data and counts what is alive at the peak (docs/cost.md). Everything else here is arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig, check_words, parse, split_network_args
from spf_plugin.errors import SPFError, nearest
from spf_plugin.tools.check import family
from spf_plugin.tools.check.family import MODELS
from spf_plugin.tools.check.host_options import OPTIONS, SDXL_ONLY, TEXT_CACHES
from spf_plugin.tools.check.source import load_toml

GIB = 2**30
BASIS = "tracked on tensors without data, not measured on a GPU"
# Assumed, as no tracker sees it: CUDA context, cuDNN and cuBLAS workspaces, what the allocator cannot fill.
CONTEXT = int(0.8 * GIB)
LORA_BYTES = 4  # the trained weights are float32 in every host
TEXT_ENCODERS = {"sd1": 123_060_480, "sd2": 340_387_840, "sdxl": 123_060_480 + 694_659_840}  # parameters
# Of the UNet: what `spf_base` quantises. Weights of the transformers' linear layers, and their rows.
LINEAR = {"sd1": (242_196_480, 212_160), "sd2": (273_367_040, 237_120), "sdxl": (2_207_744_000, 1_436_160)}
# Bytes of state per trained weight. 8-bit states have one float32 scale per 256 values.
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adam", "pagedadamw", "pagedadamw32bit", "adamwschedulefree"), 8.0),
    **dict.fromkeys(("adamw8bit", "adam8bit", "pagedadamw8bit"), 2.04),
    **dict.fromkeys(("lion", "sgdnesterov", "sgd"), 4.0),
    **dict.fromkeys(("lion8bit", "pagedlion8bit", "sgdnesterov8bit"), 1.02),
    **dict.fromkeys(("prodigy", "dadaptadam", "dadaptation", "dadaptadampreprint"), 16.0),
    "adafactor": 1.0,
}
_LATENT = 8  # pixels per latent, along one side
_DEFAULT_STEPS = 1600  # sd-scripts' own


@dataclass(frozen=True)
class Run:
    """The settings that decide.

    Attributes:
        model: `sd1`, `sd2` or `sdxl`.
        width: in pixels.
        height: in pixels.
        batch: images per step.
        rank: of the LoRA.
        checkpointing: gradient checkpointing.
        weights: of the frozen UNet: `bf16` (or another 16-bit type), `fp8` (the host's `fp8_base`), or `spf_base`'s
            `int8` and `nf4`.
        fused_attention: sdpa, xformers or the like.
        text_cached: the text encoders have left the card.
        optimizer: as sd-scripts spells it.
        save_bytes: per weight of the file.
        steps: optimizer steps, or 0 if unknown.
        accumulation: gradient accumulation steps.
        spf: SPF's settings, or None for a plain LoRA.
    """

    model: str
    width: int
    height: int
    batch: int = 1
    rank: int = 4
    checkpointing: bool = False
    weights: str = "bf16"
    fused_attention: bool = False
    text_cached: bool = False
    optimizer: str = "AdamW"
    save_bytes: int = 4
    steps: int = _DEFAULT_STEPS
    accumulation: int = 1
    spf: SPFConfig | None = None


@dataclass(frozen=True)
class Prediction:
    """What the run takes.

    Attributes:
        parts: name -> bytes on the card at the peak.
        flop_ratio: work of the whole run by that of a plain LoRA; time follows it closely on a busy card.
        file_bytes: size of the LoRA file.
    """

    parts: dict[str, int]
    flop_ratio: float
    file_bytes: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Change:
    """One setting to change.

    Attributes:
        setting: as it stands in the TOML.
        saves: bytes.
        peak: bytes, with this and every change before it.
    """

    setting: str
    saves: int
    peak: int


@cache
def figures() -> dict[str, Any]:
    """The tracked figures."""
    return json.loads(Path(__file__).with_name("plan.json").read_text(encoding="utf-8"))


# -- reading a preset --------------------------------------------------------------------------------------------------


def _whole(settings: Mapping[str, Any], name: str, default: int, problems: list[str], low: int = 1) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        problems.append(f"{name} = {value!r}: must be a whole number, {low} or more")
        return default
    return value


def _flag(settings: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        problems.append(f"{name} = {value!r}: must be true or false, without quotes")
        return False
    return value


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
        problems.append("which base model it trains is not clear from this file; add --model sd1, sd2 or sdxl")
        return family.Family("sd1")
    return found


def _spf(settings: Mapping[str, Any], folder: Path, problems: list[str]) -> SPFConfig | None:
    if "spf" not in str(settings.get("network_module", "")):
        return None
    words = settings.get("network_args", [])
    if not isinstance(words, list) or any(not isinstance(word, str) for word in words):
        problems.append('network_args: must be a list of texts, such as ["spf_target=blonde hair"]')
        return SPFConfig()
    stray = check_words(words)
    problems += stray
    ours, _ = split_network_args(dict(word.split("=", 1) for word in words if "=" in word))
    try:
        return parse(ours, (Path(), folder))
    except SPFError as error:
        problems += error.problems
        return SPFConfig()


def _optimizer(settings: Mapping[str, Any], problems: list[str]) -> str:
    name = str(settings.get("optimizer_type") or "AdamW")
    if settings.get("use_8bit_adam"):
        name = "AdamW8bit"
    elif settings.get("use_lion_optimizer"):
        name = "Lion"
    if name.rsplit(".", 1)[-1].lower() not in OPTIMIZERS:
        problems.append(
            f"optimizer_type = {name!r}: plan knows no size of its state{nearest(name.lower(), OPTIMIZERS)}. Known: "
            + ", ".join(sorted(OPTIMIZERS))
        )
        return "AdamW"
    return name


def read(path: Path, model: str | None = None) -> tuple[Run, list[str]]:
    """A preset as a run, and what it leaves out.

    Args:
        path: sd-scripts' `--config_file`.
        model: `sd1`, `sd2` or `sdxl`; else what `family.find` finds.

    Raises:
        SPFError: with every mistake: no such file, no TOML, unknown keys, values out of range, and settings for which
            there are no figures.
    """
    if not path.is_file():
        raise SPFError(f"{path}: there is no such file. Give a training preset, such as presets/sd15-8gb.toml.")
    settings: dict[str, Any] = {}
    for key, value in load_toml(path).items():  # section names are free, as in the host
        settings.update(value if isinstance(value, dict) else {key: value})
    if "datasets" in settings and "pretrained_model_name_or_path" not in settings:
        raise SPFError(f"{path} is a data set configuration. Give the preset that is passed as --config_file.")
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
    if not _flag(settings, "network_train_unet_only", problems):
        problems.append("there are no figures for training the text encoder; set network_train_unet_only = true")
    if not (_flag(settings, "cache_latents", problems) | _flag(settings, "cache_latents_to_disk", problems)):
        problems.append("there are no figures for a VAE that stays on the card; set cache_latents = true")
    attention = [_flag(settings, name, problems) for name in ("sdpa", "xformers", "mem_eff_attn")]
    spf = _spf(settings, path.parent, problems)
    fp8 = _flag(settings, "fp8_base", problems) | _flag(settings, "fp8_base_unet", problems)
    base = "off" if spf is None else spf.base
    if fp8 and base != "off":
        problems.append(f"spf_base={base} and fp8_base both shrink the frozen UNet; leave one of them out")
    kind = _model(settings, path, model, problems)
    cached = [_flag(settings, name, problems) for name in TEXT_CACHES]
    run = Run(
        model=kind.name,
        width=width,
        height=height,
        batch=_whole(settings, "train_batch_size", 1, problems),
        rank=_whole(settings, "network_dim", 4, problems),
        checkpointing=_flag(settings, "gradient_checkpointing", problems),
        weights=base if base != "off" else "fp8" if fp8 else "bf16",
        fused_attention=any(attention),
        text_cached=kind.name == "sdxl" and any(cached),
        optimizer=_optimizer(settings, problems),
        save_bytes=2 if settings.get("save_precision") in ("fp16", "bf16") else 4,
        steps=0 if "max_train_epochs" in settings else _whole(settings, "max_train_steps", _DEFAULT_STEPS, problems),
        accumulation=_whole(settings, "gradient_accumulation_steps", 1, problems),
        spf=spf,
    )
    if fp8 and not run.checkpointing:
        problems.append(
            "fp8_base without gradient_checkpointing saves nothing: backward keeps a half-precision copy of every "
            "weight. Set gradient_checkpointing = true"
        )
    if problems:
        raise SPFError([problem.rstrip(".") + "." for problem in problems])
    return run, _notes(settings, run, kind)


def _notes(settings: Mapping[str, Any], run: Run, kind: family.Family) -> list[str]:
    notes = []
    if kind.guess:
        notes.append(f"{MODELS[run.model]} is guessed from {kind.guess}. If it is another: --model sd1, sd2 or sdxl.")
    ignored = [name for name in SDXL_ONLY if settings.get(name)] if run.model != "sdxl" else []
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


# -- predicting --------------------------------------------------------------------------------------------------------


def _points(model: str, checkpointing: bool, weights: str = "bf16") -> list[dict[str, Any]]:
    chosen = "checkpointing" if checkpointing else "no checkpointing"
    points = figures()["models"][model]["figures"][weights][chosen]
    return sorted(points, key=lambda point: point["pixels"])


def unet_bytes(model: str, weights: str, parameters: int) -> int:
    """Bytes of the frozen UNet.

    Args:
        model: `sd1`, `sd2` or `sdxl`.
        weights: as in `Run`. `int8` takes a byte a weight and 4 a row, `nf4` 4.5 bits a weight, both of the linear
            layers of the transformers; all else stays in 16 bit.
        parameters: of the whole UNet.
    """
    if weights in ("bf16", "fp8"):
        return parameters * (2 if weights == "bf16" else 1)
    linear, rows = LINEAR[model]
    return (parameters - linear) * 2 + (linear + 4 * rows if weights == "int8" else linear * 9 // 16)


def step_bytes(run: Run) -> int:
    """Bytes that a step adds at its peak to weights and optimizer: activations, gradients, what SPF captures.

    Linear in the pixels of a batch, through the smallest and the largest tracked setup. Smaller weights, which a step
    turns into 16-bit ones for a moment, add what they add to the smallest setup with checkpointing. The peak comes
    early in backward, when few gradients are there yet, so that a larger rank hardly counts (0.6 to 1.3 bytes a weight
    were tracked, 2 are taken), until at last all gradients are.
    """
    kind = "spf" if run.spf is not None else "plain"
    half = _points(run.model, run.checkpointing)
    low, high = half[0], half[-1]
    slope = (high[kind]["peak"] - low[kind]["peak"]) / (high["pixels"] - low["pixels"])
    size = low[kind]["peak"] + slope * (run.width * run.height * run.batch - low["pixels"])
    dense, stored = (_points(run.model, True, weights)[0][kind]["peak"] for weights in ("bf16", run.weights))
    size += stored - dense
    per_rank = figures()["models"][run.model]["lora_parameters_per_rank"]
    extra = max(run.rank - figures()["rank"], 0) * per_rank
    return int(max(size + 2 * extra, run.rank * per_rank * LORA_BYTES))


def aligned_share(config: SPFConfig, steps: int) -> float:
    """Share of a run's steps that have a reference pass, where every caption has a target.

    Args:
        config: SPF's settings.
        steps: of the run; 0 if unknown, and then a start that is given as a step counts as the run's first.
    """
    if not config.active:
        return 1 / config.log_every
    if steps:
        start = min(config.stage2_step(steps) / steps, 1.0)
    else:
        start = config.stage2_start if config.stage2_start < 1 else 0.0
    return (1 - start) / (2 if config.pairs else 1)


def predict(run: Run) -> Prediction:
    """Peak memory, work and file size of a run."""
    model = figures()["models"][run.model]
    lora = model["lora_parameters_per_rank"] * run.rank
    state = OPTIMIZERS[run.optimizer.rsplit(".", 1)[-1].lower()]
    text = 0 if run.text_cached else TEXT_ENCODERS[run.model] * (1 if run.weights == "fp8" else 2)
    parts = {
        "UNet, frozen": unet_bytes(run.model, run.weights, model["unet_parameters"]),
        "text encoders": text,
        "LoRA weights": lora * LORA_BYTES,
        "optimizer state": int(lora * state),
        "activations and gradients": step_bytes(run),
        "CUDA context, workspaces (assumed)": CONTEXT,
    }
    ratio = 1.0
    if run.spf is not None:
        point = _points(run.model, run.checkpointing)[0]
        more = point["spf"]["flops"] / point["plain"]["flops"] - 1
        ratio += more * aligned_share(run.spf, run.steps)
    return Prediction({k: v for k, v in parts.items() if v}, ratio, lora * run.save_bytes)


def _changes(run: Run) -> list[tuple[str, Run]]:
    """What helps, the cheapest first."""
    out: list[tuple[str, Callable[[Run], Run]]] = []
    if not run.fused_attention:
        out.append(("sdpa = true", lambda r: replace(r, fused_attention=True)))
    if not run.checkpointing:
        out.append(("gradient_checkpointing = true", lambda r: replace(r, checkpointing=True)))
    if not run.text_cached and run.model == "sdxl":
        out.append(("cache_text_encoder_outputs = true", lambda r: replace(r, text_cached=True)))
    if OPTIMIZERS[run.optimizer.rsplit(".", 1)[-1].lower()] > OPTIMIZERS["adamw8bit"]:
        out.append(('optimizer_type = "AdamW8bit"', lambda r: replace(r, optimizer="AdamW8bit")))
    if run.batch > 1:
        accumulate = run.accumulation * run.batch
        setting = f"train_batch_size = 1, gradient_accumulation_steps = {accumulate}"
        out.append((setting, lambda r: replace(r, batch=1, accumulation=accumulate)))
    # Only in SDXL are the linear layers so many that 4 bit for them are less than 8 bit for everything.
    if run.weights == "bf16" and run.spf is not None and run.model == "sdxl":
        out.append(("spf_base=nf4, in network_args", lambda r: replace(r, weights="nf4")))
    elif run.weights == "bf16":
        out.append(("fp8_base = true", lambda r: replace(r, weights="fp8")))
    if run.rank > 8:
        out.append(("network_dim = 8", lambda r: replace(r, rank=8)))
    for side in (768, 512):
        if run.width * run.height > side * side:
            out.append((f'resolution = "{side},{side}"', lambda r, s=side: replace(r, width=s, height=s)))  # type: ignore[misc]
    applied = []
    for setting, change in out:
        run = change(run)
        applied.append((setting, run))
    return applied


def changes(run: Run, limit: int) -> list[Change]:
    """The settings to change, in this order, until the run fits into `limit` bytes, or everything that helps."""
    found: list[Change] = []
    before = run
    for setting, after in _changes(run):
        peak, was = predict(after).peak, predict(before).peak
        if was <= limit and before.fused_attention:
            break
        if peak < was or not before.fused_attention:
            found.append(Change(setting, was - peak, peak))
        before = after
    return found


def fits(run: Run, limit: int) -> bool:
    """Whether the run fits; without fused attention there is no figure, and it does not."""
    return run.fused_attention and predict(run).peak <= limit


def gib(size: float) -> str:
    """`"7.3 GB"`, in units of 2**30 bytes, as cards are sold."""
    return f"{size / GIB:.1f} GB"


def cards(run: Run, sizes: Sequence[int] = (4, 6, 8, 10, 12, 16, 24)) -> list[int]:
    """The usual card sizes, in GB, into which the run fits."""
    return [size for size in sizes if fits(run, size * GIB)]
