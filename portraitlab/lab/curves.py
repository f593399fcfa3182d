"""Methods compared at equal response: each method's learning-rate sweep is a curve of response against drift."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from portraitlab.lab.results import Result

RESPONSES = ("response_explicit", "response_partial")


@dataclass(frozen=True)
class Mean:
    """Mean over training seeds, and its standard error (not a number for a single seed)."""

    value: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        numbers = np.asarray(values, dtype=float)
        error = numbers.std(ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
        return cls(float(numbers.mean()), float(error), len(numbers))


@dataclass(frozen=True)
class AtResponse:
    """A measure at a given response.

    Attributes:
        mean: over the seeds.
        bound: `""`, or `"<="` where the weakest LoRA of the sweep responds more than that in some seed (so its own
            value stands, which is an upper bound of a measure that grows with response).
        missed: seeds whose sweep never responds that much; the mean is over the others.
    """

    mean: Mean | None
    bound: str
    missed: int


def response(result: Result) -> float:
    """Mean response over both kinds of prompts."""
    return float(np.mean([result.scores[name] for name in RESPONSES]))


def at_response(results: Iterable[Result], measure: str, wanted: float) -> AtResponse:
    """A measure of one method where its mean response is `wanted`: linear between the points of each seed's sweep.

    The sweep is followed from its lowest learning rate upwards, and the first crossing counts.
    """
    sweeps: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        sweeps[result.seed].append(result)
    values, bound, missed = [], "", 0
    for sweep in sweeps.values():
        points = sorted(sweep, key=lambda r: r.learning_rate)
        x = [response(p) for p in points]
        y = [p.scores[measure] for p in points]
        if x[0] >= wanted:
            values.append(y[0])
            bound = "<=" if x[0] > wanted else bound
            continue
        for i in range(1, len(points)):
            if x[i] >= wanted:
                share = (wanted - x[i - 1]) / (x[i] - x[i - 1])
                values.append(y[i - 1] + share * (y[i] - y[i - 1]))
                break
        else:
            missed += 1
    return AtResponse(Mean.of(values) if values else None, bound, missed)
