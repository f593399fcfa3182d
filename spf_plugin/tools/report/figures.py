"""Pictures of the report: arrays and numbers in, PNG bytes or images out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image8 = NDArray[np.uint8]

#: The colours of the page's classes of the same names.
COLOURS = {"base": "#8b8f98", "plain": "#c43d50", "spf": "#00798c"}
INK, PAPER, LINE = "#2b2d33", "#ffffff", "#e3e0da"


def png(image: Image8) -> bytes:
    """An image `[H, W, 3]` uint8 as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def jpeg(image: Image8, side: int) -> bytes:
    """An image `[H, W, 3]` uint8 as JPEG whose longer side has `side` pixels."""
    from PIL import Image

    stream = io.BytesIO()
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(stream, format="JPEG", quality=88, optimize=True)
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


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure in the page's style, so many inches large, and its axes (a list of them with `columns`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(colors=INK, labelsize=8, length=0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, all_axes if columns > 1 else all_axes[0]


def figure_png(figure: Any) -> bytes:
    """A figure as PNG, without the library's version in it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def drift_lines(lines: Mapping[str, tuple[str, bool, Mapping[int, float]]]) -> bytes:
    """Relative drift of the predicted noise over the timesteps.

    Args:
        lines: label -> (key of `COLOURS`, whether dashed, timestep -> drift).
    """
    figure, axes = new_figure(4.5, 3.2)  # narrow: a phone shows it at 300 pixels
    for label, (kind, dashed, points) in lines.items():
        style = (0, (4, 2)) if dashed else "-"
        axes.plot(
            list(points), list(points.values()), color=COLOURS[kind], linestyle=style, linewidth=2, marker="o",
            markersize=4, label=label,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("timestep (0: no noise, 999: only noise)", fontsize=9.5, color=INK)
    axes.set_ylabel("relative drift", fontsize=9.5, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure_png(figure)
