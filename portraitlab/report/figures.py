"""The demo's own pictures: arrays and numbers in, PNG bytes or images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.tools.report.figures import COLOURS, INK, Image8, figure_png, new_figure

LABELS = {"base": "base model", "plain": "plain LoRA", "spf": "SPF LoRA"}


def outline(image: Image8, region: NDArray[np.bool_]) -> Image8:
    """The image with everything outside a region faded."""
    faded = image.astype(np.float32) * 0.18 + 255 * 0.82
    return np.where(region[..., None], image, faded).round().astype(np.uint8)


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
    figure, axes = new_figure(7.2, 3.0)
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
    return figure_png(figure)


def trade_off(points: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Response against drift, one dot per seed: good is upper left.

    Args:
        points: `base`, `plain`, `spf` -> `(drift, response)`.
    """
    figure, axes = new_figure(4.6, 3.4)
    for name, pairs in points.items():
        drift, response = np.array(pairs).T
        axes.scatter(drift, response, s=70, color=COLOURS[name], edgecolor="white", linewidth=1.2, label=LABELS[name])
    axes.set_xlim(left=0)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("drift of everything else (less is better)", fontsize=8.5, color=INK)
    axes.set_ylabel("target shows (more is better)", fontsize=8.5, color=INK)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    return figure_png(figure)
