"""Pictures of the report: arrays and numbers in, PNG bytes or images out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image8 = NDArray[np.uint8]

COLOURS = {"base": "#8b8f98", "plain": "#d1495b", "spf": "#00798c"}
LABELS = {"base": "base model", "plain": "plain LoRA", "spf": "SPF LoRA"}
INK, PAPER, LINE = "#2b2d33", "#ffffff", "#e3e0da"


def png(image: Image8) -> bytes:
    """An image `[H, W, 3]` uint8 as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def sheet(rows: Sequence[Sequence[Image8]], gap: int = 4) -> Image8:
    """Rows of equally large images as one picture on white."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            out[r * (height + gap) :, c * (width + gap) :][:height, :width] = image
    return out


def heat_over(image: Image8, heat: NDArray[np.floating[Any]], strength: float = 0.75) -> Image8:
    """A map over an image: the greyed image where the map is 0, glowing where it is 1.

    Args:
        image: uint8 `[H, W, 3]`.
        heat: `[h, w]` in [0, 1], of any size.
        strength: how much of the image the brightest heat hides.
    """
    import matplotlib
    from PIL import Image

    h, w = image.shape[:2]
    large = np.asarray(
        Image.fromarray((np.clip(heat, 0, 1) * 255).astype(np.uint8)).resize((w, h), Image.Resampling.BICUBIC),
        dtype=np.float32,
    )[..., None] / 255  # fmt: skip
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True) / 255 * 0.8 + 0.1
    colour = matplotlib.colormaps["inferno"](0.15 + 0.8 * large[..., 0])[..., :3]
    mixed = grey * (1 - strength * large) + colour * strength * large
    return (np.clip(mixed, 0, 1) * 255).round().astype(np.uint8)


def outline(image: Image8, region: NDArray[np.bool_]) -> Image8:
    """The image with everything outside a region faded."""
    faded = image.astype(np.float32) * 0.18 + 255 * 0.82
    return np.where(region[..., None], image, faded).round().astype(np.uint8)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _bytes(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _smooth(values: NDArray[np.floating[Any]], width: int = 5) -> NDArray[np.floating[Any]]:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def drift_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]], stage2: int | None, key: str = "spf/drift_outside"
) -> bytes:
    """How far each LoRA's predictions are from the base model's, outside the map, over training.

    Args:
        histories: `plain` and `spf` -> logged rows with `step` and `key`.
        stage2: the step at which alignment begins, marked by a line; None marks none.
        key: which number to draw.
    """
    figure, axes = _figure(7.2, 3.0)
    for name, rows in histories.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            continue
        steps, values = np.array(points).T
        axes.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=COLOURS[name], linewidth=2.2, label=LABELS[name])
    if stage2:
        axes.axvline(stage2, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            "alignment begins", (stage2, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
            textcoords="offset points", va="top", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    if not axes.lines:
        axes.annotate("too few steps to measure", (0.5, 0.5), xycoords="axes fraction", ha="center", color=INK)
    axes.set_xlabel("training step", fontsize=8.5, color=INK)
    axes.set_ylabel("relative drift outside the map", fontsize=8.5, color=INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
    return _bytes(figure)


def trade_off(points: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Response against drift, one dot per seed: good is upper left.

    Args:
        points: `base`, `plain`, `spf` -> `(drift, response)`.
    """
    figure, axes = _figure(4.6, 3.4)
    for name, pairs in points.items():
        drift, response = np.array(pairs).T
        axes.scatter(drift, response, s=70, color=COLOURS[name], edgecolor="white", linewidth=1.2, label=LABELS[name])
    axes.set_xlim(left=0)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("drift of everything else (less is better)", fontsize=8.5, color=INK)
    axes.set_ylabel("target shows (more is better)", fontsize=8.5, color=INK)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    return _bytes(figure)
