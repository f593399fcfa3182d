"""A drawing style for portraits: ink outlines and a pale wash of colour on yellowish paper."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from portraitlab.portraits import FloatArray

PAPER = np.array([0.96, 0.93, 0.85], np.float32)
INK = np.array([0.12, 0.10, 0.14], np.float32)
#: How much of the colour is left, which edges count, and how fast they become ink.
WASH, FAINTEST, STRENGTH = 0.7, 0.06, 6.0


def redrawn(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same picture by another hand.

    `(1 - e) ((1 - WASH) PAPER + WASH x) + e INK`, where `e` in [0, 1] is the gradient of `x` in the channel that has
    most, from `FAINTEST` on, times `STRENGTH`, smoothed.

    Args:
        images: uint8 `[..., H, W, 3]`.

    Returns:
        uint8 of the same shape.
    """
    x = images.astype(np.float32) / 255
    edges = np.clip((_gradient(x).max(-1) - FAINTEST) * STRENGTH, 0, 1)
    ink = np.clip(_smooth(edges), 0, 1)[..., None]
    drawn = (PAPER * (1 - WASH) + x * WASH) * (1 - ink) + INK * ink
    return (np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8)


def _padded(x: FloatArray, axes: tuple[int, int]) -> FloatArray:
    width = [(0, 0)] * x.ndim
    for axis in axes:
        width[axis] = (1, 1)
    return np.pad(x, width, mode="edge")


def _gradient(x: FloatArray) -> FloatArray:
    """Length of the central difference of `[..., H, W, C]` in each channel."""
    p = _padded(x, (-3, -2))
    across, down = p[..., 1:-1, 2:, :] - p[..., 1:-1, :-2, :], p[..., 2:, 1:-1, :] - p[..., :-2, 1:-1, :]
    return np.hypot(across, down) / 2


def _smooth(x: FloatArray) -> FloatArray:
    """`[..., H, W]` smoothed by `(1, 2, 1) / 4` in both directions, and a fifth stronger."""
    p = _padded(x, (-2, -1))
    p = (p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]) / 4
    return (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4 * np.float32(1.2)
