"""The lab's plots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from portraitlab.lab.curves import Mean, response
from portraitlab.lab.results import Result
from portraitlab.lab.tables import by_row
from spf_plugin.tools.report.figures import INK, PAPER, Image8, figure_png, new_figure

#: One colour and mark a family of methods; rows that vary a method share its colour.
STYLES = {
    "plain": ("#c2410c", "o"),
    "masked-prior": ("#0e7490", "D"),
    "masked": ("#7c3aed", "s"),
    "prior-preservation": ("#a16207", "^"),
    "dop": ("#be185d", "v"),
    "blank": ("#64748b", "<"),
    "pure-cc": ("#4d7c0f", ">"),
    "weight-penalty": ("#9333ea", "p"),
    "t-lora": ("#b45309", "h"),
    "former-spf-paired": ("#475569", "*"),  # earlier defaults, which nobody can train any more
    "former-spf-published-paper": ("#cbd5e1", "X"),
    "former-spf-published-soft": ("#cbd5e1", "D"),
    "former-spf": ("#94a3b8", "P"),
    "former-": ("#cbd5e1", "x"),
    "spf-published-paper": ("#38bdf8", "X"),
    "spf-published-soft": ("#7dd3fc", "D"),
    "spf": ("#1d4ed8", "P"),
}
PANELS = (("drift_explicit", "explicit prompts"), ("drift_partial", "partial prompts"))


def _style(row: str) -> tuple[str, str]:
    return next((style for name, style in STYLES.items() if row.startswith(name)), ("#334155", "x"))


def response_against_drift(results: Sequence[Result], phrase: str) -> bytes | None:
    """A PNG: drift on the x axis, response on the y axis, a curve a method over its sweep; None without any sweep.

    The further to the upper left, the better. The untuned model is the cross; its drift is the floor: adding the word
    alone already changes the picture.
    """
    groups = by_row(results)
    if all(len({r.learning_rate for r in group}) == 1 for group in groups.values()):
        return None
    figure, axes = new_figure(10.5, 4.2, columns=2)
    for ax, (measure, title) in zip(axes, PANELS, strict=True):
        for name, group in groups.items():
            points = []
            for rate in sorted({r.learning_rate for r in group}):
                point = [r for r in group if r.learning_rate == rate]
                x = Mean.of([1000 * r.scores[measure] for r in point])
                points.append((x, Mean.of([response(r) for r in point])))
            if name == "base":
                x, y = points[0]
                ax.axvline(x.value, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
                ax.plot(x.value, y.value, marker="x", color=INK, linestyle="", label="untuned model")
                continue
            colour, mark = _style(name)
            xs, ys = zip(*points, strict=True)
            ax.errorbar(
                [x.value for x in xs], [y.value for y in ys], xerr=[x.error for x in xs], yerr=[y.error for y in ys],
                color=colour, marker=mark, markersize=5, linewidth=1.6, elinewidth=0.8, label=name,
                linestyle="-" if name in STYLES else "--",
            )  # fmt: skip
        ax.set_xscale("log")
        for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            axis("{x:g}")
        ax.tick_params(axis="x", which="minor", labelsize=7, length=2, colors=INK)
        ax.set_ylim(-0.02, 1.03)
        ax.set_title(title, fontsize=9, color=INK, loc="left")
        ax.set_xlabel("drift of everything else, mean squared x 1000 (log)", fontsize=8.5, color=INK)
    axes[0].set_ylabel(f"response: {phrase}", fontsize=8.5, color=INK)
    axes[1].legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure_png(figure)


def labelled(lines: Sequence[tuple[str, Image8]]) -> Image8:
    """Pictures of one width below each other, each under its label, on white."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap = ImageFont.load_default(15), 24
    height = sum(picture.shape[0] + gap for _, picture in lines)
    page = Image.new("RGB", (lines[0][1].shape[1], height), PAPER)
    draw, top = ImageDraw.Draw(page), 0
    for label, picture in lines:
        draw.text((4, top + 3), label, fill=INK, font=font)
        page.paste(Image.fromarray(picture), (0, top + gap))
        top += picture.shape[0] + gap
    return np.asarray(page)
