"""What a run needs, from its settings alone: peak VRAM, time beside a plain LoRA, size of the file.

The figures behind it (`plan.json`) are tracked, not measured on a GPU: `python -m benchmarks.step_cost` runs the real
UNets on tensors without data and counts what is alive at the peak (docs/cost.md). Everything else here is arithmetic;
`preset` reads the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig
from spf_plugin.tools.check.source import DEFAULTS
from spf_plugin.tools.plan_dit import TRANSFORMERS, Transformer
from spf_plugin.tools.plan_musubi import CAST, DENSE, MODELS, SCALED, MusubiModel

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
#: Of musubi-tuner's models, by their weights.
FROZEN = {
    DENSE: "transformer, frozen, in 16 bits",
    CAST: "transformer, frozen, with fp8_base alone",
    SCALED: "transformer, frozen, with fp8_base and fp8_scaled",
}


@dataclass(frozen=True)
class Run:
    """The settings that decide.

    Attributes:
        model: `sd1`, `sd2` or `sdxl`, or one of `plan_dit.TRANSFORMERS` or of `plan_musubi.MODELS`.
        width: in pixels.
        height: in pixels.
        batch: images per step.
        rank: of the LoRA.
        checkpointing: gradient checkpointing.
        weights: of the frozen model: `bf16` (or another 16-bit type), `fp8` (the host's `fp8_base` or `fp8_scaled`; of
            musubi-tuner the first alone, and `fp8_scaled` both), or `spf_base`'s `int8` and `nf4` (of a UNet).
        fused_attention: sdpa, xformers or the like.
        text_cached: the text encoders have left the card.
        optimizer: as sd-scripts spells it.
        save_bytes: per weight of the file.
        steps: optimizer steps, or 0 if unknown.
        accumulation: gradient accumulation steps.
        swapped: `blocks_to_swap`, of a transformer.
        frames: of a clip, as the model has them; 1 for images.
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
    steps: int = DEFAULTS["max_train_steps"]
    accumulation: int = 1
    swapped: int = 0
    frames: int = 1
    spf: SPFConfig | None = None

    @property
    def musubi(self) -> MusubiModel | None:
        return MODELS.get(self.model)

    @property
    def transformer(self) -> Transformer | MusubiModel | None:
        return self.musubi or TRANSFORMERS.get(self.model)


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
    if run.transformer is not None:
        return _predict_transformer(run, run.transformer)
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


def _predict_transformer(run: Run, model: Transformer | MusubiModel) -> Prediction:
    """The same of a transformer, whose text is cached and has left the card."""
    lora = model.lora * run.rank
    pixels = run.width * run.height * run.frames * run.batch
    how = {"checkpointing": run.checkpointing, "spf": run.spf is not None}
    if isinstance(model, MusubiModel):
        frozen, step = FROZEN[run.weights], model.step_bytes(pixels, run.rank, weights=run.weights, **how)
    else:
        frozen, step = "transformer, frozen", model.step_bytes(pixels, run.rank, **how)
    parts = {
        frozen: model.frozen_bytes(run.weights, run.swapped),
        "LoRA weights": lora * LORA_BYTES,
        "optimizer state": int(lora * OPTIMIZERS[run.optimizer.rsplit(".", 1)[-1].lower()]),
        "activations and gradients": step,
        "CUDA context, workspaces (assumed)": CONTEXT,
    }
    ratio = 1.0
    if run.spf is not None:
        ratio += model.more_work(checkpointing=run.checkpointing) * aligned_share(run.spf, run.steps)
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
    in_data = ", in the data set" if run.musubi else ""
    if run.batch > 1:
        accumulate = run.accumulation * run.batch
        one = "batch_size = 1, in the data set" if run.musubi else "train_batch_size = 1"
        setting = f"{one}, gradient_accumulation_steps = {accumulate}"
        out.append((setting, lambda r: replace(r, batch=1, accumulation=accumulate)))
    if run.transformer is not None:
        (fp8, smaller), most = run.transformer.shrunk, run.transformer.swappable
        if fp8 and run.weights == "bf16":
            out.append((fp8, lambda r: replace(r, weights=smaller)))
        for count in (most // 2, most):
            if run.swapped < count:
                out.append((f"blocks_to_swap = {count}", lambda r, n=count: replace(r, swapped=n)))  # type: ignore[misc]
    # Only in SDXL are the linear layers so many that 4 bit for them are less than 8 bit for everything.
    if run.weights == "bf16" and run.spf is not None and run.model == "sdxl":
        out.append(("spf_base=nf4, in network_args", lambda r: replace(r, weights="nf4")))
    elif run.weights == "bf16" and run.transformer is None:
        out.append(("fp8_base = true", lambda r: replace(r, weights="fp8")))
    if run.rank > 8:
        out.append(("network_dim = 8", lambda r: replace(r, rank=8)))
    for frames in (7, 1):
        if run.frames > frames:
            setting = f"target_frames = [{video_frames(frames)}]{in_data}"
            out.append((setting, lambda r, n=frames: replace(r, frames=n)))  # type: ignore[misc]
    for side in (768, 512):
        if run.width * run.height > side * side:
            said = f"[{side}, {side}]{in_data}" if run.musubi else f'"{side},{side}"'
            out.append((f"resolution = {said}", lambda r, s=side: replace(r, width=s, height=s)))  # type: ignore[misc]
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


def video_frames(frames: int) -> int:
    """Of a clip that has so many frames to the model: four for each but the first."""
    return 4 * (frames - 1) + 1


def gib(size: float) -> str:
    """`"7.3 GB"`, in units of 2**30 bytes, as cards are sold."""
    return f"{size / GIB:.1f} GB"


def cards(run: Run, sizes: Sequence[int] = (4, 6, 8, 10, 12, 16, 24, 32, 48)) -> list[int]:
    """The usual card sizes, in GB, into which the run fits."""
    return [size for size in sizes if fits(run, size * GIB)]
