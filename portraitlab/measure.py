"""What a LoRA did, in numbers: how well the target shows, how much it leaks, and how much else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portraitlab.captions import Target
from portraitlab.customisation import POLLUTION, neutral_person
from portraitlab.portraits import counterfactual

Seen = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1] unless said otherwise; "base image" is the base model's for the base prompt at the same seed.

    Attributes:
        response: the target shows where the prompt names it.
        leak: the target shows where the prompt does not name it.
        drift: mean squared change of the pixels (in [0, 1]) that the target has no business with, against the base
            image; prompts with the target.
        drift_without: the same for prompts without the target: ideally 0.
        uninvited_background: the training set's background shows where the base image has another.
        uninvited_clothes: likewise the training set's clothes colour.
        background_kept: the background's colour is that of the base image.
        clothes_kept: the clothes' colour is that of the base image.
    """

    response: float
    leak: float
    drift: float
    drift_without: float
    uninvited_background: float
    uninvited_clothes: float
    background_kept: float
    clothes_kept: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def shows(target: Target, seen: Mapping[str, Any]) -> bool:
    """Whether the judge sees the target in an image."""
    return all(
        seen[name] > 0.5 if value is True else seen[name] == value
        for name, value in target.changes.items()
        if value is not False  # "no glasses" comes with sunglasses and is not what was asked for
    )


def untouched_region(
    target: Target, *, people: int = 150, size: int = 128, tolerance: float = 0.02, seed: int = 0
) -> NDArray[np.bool_]:
    """Pixels that the target leaves alone in (almost) every drawn portrait, bool `[size, size]`.

    Args:
        target: the target.
        people: portraits that are drawn with and without it.
        size: pixels.
        tolerance: share of the portraits in which such a pixel may change.
        seed: of the portraits.
    """
    rng = np.random.default_rng([seed, 91])
    changed = np.zeros((size, size))
    for _ in range(people):
        changed += counterfactual(neutral_person(rng, target), size, **target.changes).region
    return changed <= tolerance * people


def score(
    target: Target,
    *,
    base: NDArray[np.uint8],
    without: NDArray[np.uint8],
    with_: NDArray[np.uint8],
    seen_base: Seen,
    seen_without: Seen,
    seen_with: Seen,
    untouched: NDArray[np.bool_],
) -> Scores:
    """Compare a LoRA's images with the base model's, prompt by prompt at equal seeds.

    Args:
        target: the target.
        base: the base model's images for the base prompts, uint8 `[N, H, W, 3]`.
        without: the LoRA's for the base prompts.
        with_: the LoRA's for the prompts with the target.
        seen_base: the judge's reading of `base`; the other two likewise.
        seen_without: see above.
        seen_with: see above.
        untouched: bool `[H, W]`, see `untouched_region`.
    """

    def drift(images: NDArray[np.uint8]) -> float:
        difference = (images.astype(np.float32) - base.astype(np.float32)) / 255
        return float((difference[:, untouched] ** 2).mean())

    def uninvited(name: str) -> float:
        value = POLLUTION[name]
        candidates = [
            after[name] == value for before, after in zip(seen_base, seen_with, strict=True) if before[name] != value
        ]
        return float(np.mean(candidates)) if candidates else float("nan")

    def kept(name: str) -> float:
        return float(np.mean([b[name] == a[name] for b, a in zip(seen_base, seen_with, strict=True)]))

    return Scores(
        response=float(np.mean([shows(target, s) for s in seen_with])),
        leak=float(np.mean([shows(target, s) for s in seen_without])),
        drift=drift(with_),
        drift_without=drift(without),
        uninvited_background=uninvited("background"),
        uninvited_clothes=uninvited("clothes_colour"),
        background_kept=kept("background"),
        clothes_kept=kept("clothes_colour"),
    )
