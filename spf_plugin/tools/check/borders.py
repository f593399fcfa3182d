"""What the pictures' borders share: a background that no caption names is learned with the target.

Captions alone do not show it: what they leave out is what a LoRA puts into the target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.tools.check.captions import Described, names
from spf_plugin.tools.check.findings import Finding, of
from spf_plugin.tools.check.sets import MORE_THAN_WITHOUT, TOGETHER

FEW = 6  # below this many images, a common colour may be chance
_SIDE = 32  # pixels; the picture is made this small first
_STRIP = 2  # of them along the top, and along the upper half of both sides: below are mostly clothes
_NEAR = 20.0  # distance in CIE Lab up to which two colours are alike, such as two shades of one wall
_PLAIN = 0.7  # share of the border that must be near its own middle colour: streets and forests have none
_SAID = re.compile(r"\b(?:back(?:ground|drop)s?|walls?|studio|sky|against|behind|indoors|outdoors)\b", re.IGNORECASE)
_COLOURS = {
    "black": (20, 20, 20), "white": (245, 245, 245), "grey": (130, 130, 130), "red": (205, 35, 40),
    "orange": (240, 140, 40), "yellow": (240, 220, 60), "green": (50, 150, 60), "blue": (45, 90, 190),
    "purple": (120, 50, 150), "pink": (245, 160, 190), "brown": (110, 70, 40), "beige": (225, 205, 175),
}  # fmt: skip

Colour = NDArray[np.float64]


def to_lab(pixels: Any) -> Colour:
    """sRGB from 0 to 255, `[..., 3]`, to CIE Lab (D65), where distances are about those that one sees."""
    x = np.asarray(pixels, np.float64) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = linear @ matrix.T / matrix.sum(axis=1)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def border(image: Any) -> Colour | None:
    """The colour of a picture's border in Lab; None where it has no plain one.

    Args:
        image: a Pillow image.
    """
    from PIL import Image

    opaque = image.convert("RGBA").convert("RGB")  # as the trainer sees it; without a warning for old palettes
    small = np.asarray(opaque.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    top, sides = small[:_STRIP], small[_STRIP : _SIDE // 2]
    lab = to_lab(np.concatenate([part.reshape(-1, 3) for part in (top, sides[:, :_STRIP], sides[:, -_STRIP:])]))
    middle = np.median(lab, axis=0)
    return middle if (np.linalg.norm(lab - middle, axis=1) < _NEAR).mean() >= _PLAIN else None


def colour_name(lab: Colour) -> str:
    """The nearest of a dozen common names."""
    return min(_COLOURS, key=lambda name: float(np.linalg.norm(to_lab(_COLOURS[name]) - lab)))


def look(rows: Sequence[Described], borders: Mapping[str, Colour | None]) -> list[Finding]:
    """Whether most images with the target have one border that their captions do not name.

    Args:
        rows: the training prompts, without regularisation images.
        borders: per name of an image, `border` of it; unreadable images are missing.
    """
    with_target = {row.name for row in rows if row.prompt.has_target and row.name in borders}
    without = {row.name for row in rows if row.name in borders} - with_target
    if len(with_target) < FEW:
        return []

    def near(colour: Colour, among: set[str]) -> set[str]:
        plain = ((name, other) for name in among if (other := borders[name]) is not None)
        return {name for name, other in plain if np.linalg.norm(other - colour) < _NEAR}

    colours = [colour for name in sorted(with_target) if (colour := borders[name]) is not None]
    alike = max((near(colour, with_target) for colour in colours), key=len, default=set())
    if len(alike) < TOGETHER * len(with_target):
        return []
    centre = np.median([borders[name] for name in alike], axis=0)
    if without and len(alike) / len(with_target) - len(near(centre, without)) / len(without) < MORE_THAN_WITHOUT:
        return []
    said = [row for row in rows if row.name in alike and _SAID.search(row.prompt.full)]
    if 2 * len(names(said)) > len(alike):
        return []
    target = " or ".join(dict.fromkeys(t.phrase for row in rows for t in row.targets))
    common = colour_name(centre)
    count = len(names(said))
    spoken = (
        f"only {count} of their captions {'says' if count == 1 else 'say'}" if said else "none of their captions says"
    )
    return [
        Finding(
            "warning",
            "same-border",
            f"{of(len(alike), len(with_target))} with {target!r} have much the same {common} border, and {spoken} "
            "anything of a background: it would be learned with the target",
            f'Name it in these captions ("{common} background"): SPF holds best what a caption names. Other pictures '
            "help more.",
            tuple(sorted(alike)),
        )
    ]
