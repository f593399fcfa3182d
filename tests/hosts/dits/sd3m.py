"""SD3-Medium: as SD3.5, without norms of queries and keys, and without the image's own attention."""

from __future__ import annotations

from pathlib import Path

from tests.hosts.dits import sd3
from tests.hosts.dits.sd3 import (
    CACHED,
    DROPPED,
    NETWORK,
    PRECISION,
    SCRIPT,
    STEADY,
    TRAINER,
    options,
    places,
    planted,
    shrink,
    spans,
)

__all__ = [
    "CACHED",
    "DROPPED",
    "NETWORK",
    "PRECISION",
    "SCRIPT",
    "STEADY",
    "TRAINER",
    "options",
    "places",
    "planted",
    "shrink",
    "spans",
]

TENSORS = sd3.TENSORS - 2 * 3


def make(folder: Path) -> None:
    sd3.make(folder, norms=False)
