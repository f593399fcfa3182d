"""The numbers of a run: losses, drift and map, from the first aligned step of each window of steps; and what its steps
were."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from spf_plugin.core.objective import Alignment
from spf_plugin.lorafile.record import KINDS, Run

ENDS = 10  # logged steps whose mean is the drift at the beginning, and at the end


class Numbers:
    """What the trackers get, the progress bar, and at the end the file.

    Args:
        every: steps of a window (`spf_log_every`).
        report: puts numbers on the progress bar.
    """

    def __init__(self, every: int, report: Callable[[dict[str, float]], None]):
        self.every, self._report = every, report
        self.values: dict[str, float] = {}
        self.taking = False  # whether the present pair gives them
        self.window = -1  # the last one that has numbers
        self._counts: Counter[str] = Counter()
        self._sums: dict[str, tuple[float, int]] = {}  # of the terms and the map: sum, number
        self._first: list[float] = []  # drift outside the map
        self._last: deque[float] = deque(maxlen=ENDS)

    def begin(self, step: int, any_caption: bool) -> bool:
        """Whether the step, with any caption that was not dropped out, is the first of its window."""
        self.taking = step // self.every > self.window and any_caption
        if self.taking:
            self.window = step // self.every
        return self.taking

    def take(self, result: Alignment, which: Tensor) -> None:
        """Of an aligned step; `which` `[B]` bool are its samples with a target."""
        values = {f"spf/{name}": float(value) for name, value in result.terms.items()}
        values["spf/drift_inside"] = float(result.drift_inside)
        values["spf/drift_outside"] = float(result.drift_outside)
        values["spf/map_mean"] = float(result.map_mean)
        kept = {name: value for name, value in self.values.items() if name.startswith(("spf/response", "spf/base_"))}
        # An empty map has no drift inside, a full one none outside.
        values = {name: value for name, value in values.items() if value == value}
        self.values = kept | values
        if which.any():
            values["map_mean"] = float(result.map[which].mean())  # the others' is 0 by definition
        self._keep(values)
        bar = {"drift": values.get("spf/drift_outside"), "map": values.get("spf/map_mean")}
        self._report({name: value for name, value in bar.items() if value is not None})

    def base_preservation(self, value: float) -> None:
        """Of the second step of a pair."""
        self.values["spf/base_preservation"] = value
        self._keep({"spf/base_preservation": value})

    def _keep(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name == "spf/drift_outside":
                if len(self._first) < ENDS:
                    self._first.append(value)
                self._last.append(value)
            elif name not in ("spf/drift_inside", "spf/map_mean"):
                short = name.removeprefix("spf/")
                total, number = self._sums.get(short, (0.0, 0))
                self._sums[short] = total + value, number + 1

    # -- what the run was -----------------------------------------------------------------------------------------

    def count(self, kind: str, samples: int = 0, with_target: int = 0) -> None:
        """A training batch of one of `record.KINDS`."""
        self._counts.update({kind: 1, "samples": samples, "with_target": with_target})

    def run(self) -> Run:
        """What it was until now."""
        means = {name: total / number for name, (total, number) in self._sums.items()}
        return Run(
            batches={kind: self._counts[kind] for kind in KINDS if self._counts[kind]},
            samples=self._counts["samples"],
            with_target=self._counts["with_target"],
            map_mean=means.pop("map_mean", None),
            drift=(fmean(self._first), fmean(self._last)) if self._first else None,
            terms=means,
            skipped=int(self.values.get("spf/response_skipped", 0)),
        )

    def state(self) -> dict[str, Any]:
        """JSON types, for a run that is resumed."""
        return {
            "counts": dict(self._counts),
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "first": list(self._first),
            "last": list(self._last),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self._counts = Counter(state["counts"])
        self._sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._first, self._last = list(state["first"]), deque(state["last"], maxlen=ENDS)
