"""Numbers that need no other model: pixels that changed, and predictions that drifted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.results import Images, Row, Variant

_SAME_SEED = "spf-plugin, against the base model's image for the base prompt, same seed"
_PREDICTIONS = "spf-plugin, relative squared difference of the predicted noise"


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

    def of(variant: Variant, key: str) -> float | None:
        return _mean([getattr(maps.drift[step], key) for maps in variant.maps for step in steps])

    def row(key: str, name: str, note: str, base: float | None, tile: str = "", form: str = "{:.4f}") -> Row:
        return Row(f"drift_{key}", name, note, _PREDICTIONS, n, form, [base, *(of(v, key) for v in loras)], tile)

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


def held_rows(variants: Sequence[Variant], held: HeldOut, predictions: int) -> list[Row]:
    """Pixels and predictions of the prompts that nobody trained.

    Args:
        variants: the base model first.
        held: their prompts, one or more.
        predictions: for each prompt.
    """
    base, n = variants[0].held, len(held.texts)
    by = "spf-plugin, against the base model's image for the same prompt, same seed"

    def pixels(variant: Variant, chosen: Sequence[int]) -> float | None:
        return pixel_change(variant.held[chosen], base[chosen])

    def drift(variant: Variant, chosen: Sequence[int]) -> float | None:
        return _mean([variant.held_drift[i] for i in chosen])

    return [
        grouped(
            "pixels_held_out", "pixels, held-out prompts", "0 is untouched; less is better", by,
            f"{n} images", "{:.2%}", variants, held, pixels, "Pixels changed", "pixels_without",
        ),
        grouped(
            "drift_held_out", "drift, held-out prompts", "0 is untouched; less is better", _PREDICTIONS,
            f"{n * predictions} predictions", "{:.4f}", variants, held, drift, "Prediction changed",
            "drift_base_prompt",
        ),
    ]  # fmt: skip


def grouped(
    key: str, name: str, note: str, by: str, n: str, form: str, variants: Sequence[Variant], held: HeldOut,
    of: Callable[[Variant, Sequence[int]], float | None], tile: str, beside: str,
) -> Row:  # fmt: skip
    """A row of the held-out prompts, of all and of every group.

    Args:
        key, name, note, by, n, form, tile, beside: see `Row`.
        variants: the base model, which is what the others are compared with, first.
        held: the prompts.
        of: a variant and the indices of some prompts -> the value.
    """
    loras, everything = variants[1:], range(len(held.texts))
    groups = {group: [None, *(of(v, chosen) for v in loras)] for group, chosen in held.members.items()}
    return Row(key, name, note, by, n, form, [None, *(of(v, everything) for v in loras)], tile, groups, beside)
