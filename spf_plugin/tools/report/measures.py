"""Numbers that need no other model: pixels that changed, and predictions that drifted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spf_plugin.tools.report.results import Images, Row, Variant

_SAME_SEED = "spf-plugin, against the base model's image for the base prompt, same seed"


def pixel_change(images: Images, reference: Images) -> float:
    """Mean absolute difference of two sets of uint8 images `[N, H, W, 3]`, as a share of the pixel range."""
    return float(np.abs(images.astype(np.float32) - reference.astype(np.float32)).mean() / 255)


def pixel_rows(variants: Sequence[Variant]) -> list[Row]:
    """How far the images are from the base model's for the base prompts."""
    base, n = variants[0], f"{len(variants[0].without)} images"
    return [
        Row(
            "pixels_without", "pixels, target not asked for", "0 is untouched; less is better", _SAME_SEED, n,
            "{:.2%}", [None, *(pixel_change(v.without, base.without) for v in variants[1:])],
            "Pixels changed unasked",
        ),
        Row(
            "pixels_with", "pixels, target asked for", "the target itself is a part of it", _SAME_SEED, n,
            "{:.2%}", [pixel_change(v.with_, base.without) for v in variants],
            "Pixels changed when asked",
        ),
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def drift_at(variant: Variant, key: str, step: int) -> float:
    """A variant's drift at one timestep, mean over the questions (not a number where none has any)."""
    found = _mean([getattr(maps.drift[step], key) for maps in variant.maps])
    return float("nan") if found is None else found


def drift_rows(variants: Sequence[Variant], draws: int) -> list[Row]:
    """How far the predicted noise is from the base model's for the base prompt; see `maps.Drift`."""
    loras = variants[1:]
    first = loras[0].maps
    steps = list(first[0].drift)
    n = f"{len(first) * len(steps) * draws} predictions"
    by = "spf-plugin, relative squared difference of the predicted noise"

    def of(variant: Variant, key: str) -> float | None:
        return _mean([getattr(maps.drift[step], key) for maps in variant.maps for step in steps])

    def row(key: str, name: str, note: str, base: float | None, tile: str = "", form: str = "{:.4f}") -> Row:
        return Row(f"drift_{key}", name, note, by, n, form, [base, *(of(v, key) for v in loras)], tile)

    words = of(loras[0], "words")  # the same for every LoRA: none is on
    return [
        row("base_prompt", "drift, target not asked for", "0 is untouched; less is better", None,
            "Prediction changed unasked"),
        row("outside", "drift outside the map, target asked for", "each LoRA's own map; less is better", None,
            "Prediction changed outside the map"),
        row("inside", "drift inside the map, target asked for", "where it is meant to change", None),
        row("full_prompt", "drift everywhere, target asked for", "base model: what the words alone do", words),
        row("map_mean", "share of the image that may change", "mean of the map", None, form="{:.0%}"),
    ]  # fmt: skip
