"""Options that are numbers."""

from __future__ import annotations

import math

import typer


def finite(value: float | None) -> float | None:
    """An option's callback: `nan` passes every comparison with a least or most, and `inf` that with a least.

    Raises:
        typer.BadParameter: it is one of these.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value:g} is no finite number.")
    return value
