"""How well a map finds what really changes, which only drawn portraits tell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spf_plugin.tools.report.maps import Map


def separation(region: NDArray[np.bool_], heat: Map) -> float:
    """How well a map finds a region: the chance that a place inside is hotter than one outside (area under the ROC).

    Args:
        region: bool `[H, W]`.
        heat: `[h, w]`, smaller than the region by a whole factor.
    """
    factor = region.shape[0] // heat.shape[0]
    share = region.reshape(heat.shape[0], factor, heat.shape[1], factor).mean(axis=(1, 3))
    inside, outside = heat[share > 0.5], heat[share <= 0.5]
    if not len(inside) or not len(outside):
        return float("nan")
    difference = inside[:, None] - outside[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())
