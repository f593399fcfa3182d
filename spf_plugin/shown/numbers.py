"""The numbers of a run: losses, drift and map, from the first aligned step of each window of steps."""

from __future__ import annotations

from collections.abc import Callable

from spf_plugin.core.objective import Alignment


class Numbers:
    """What the trackers get, and the progress bar.

    Args:
        every: steps of a window (`spf_log_every`).
        report: puts numbers on the progress bar.
    """

    def __init__(self, every: int, report: Callable[[dict[str, float]], None]):
        self.every, self._report = every, report
        self.values: dict[str, float] = {}
        self.taking = False  # whether the present pair gives them
        self.window = -1  # the last one that has numbers

    def begin(self, step: int, any_caption: bool) -> bool:
        """Whether the step, with any caption that was not dropped out, is the first of its window."""
        self.taking = step // self.every > self.window and any_caption
        if self.taking:
            self.window = step // self.every
        return self.taking

    def take(self, result: Alignment) -> None:
        """Of an aligned step."""
        values = {f"spf/{name}": float(value) for name, value in result.terms.items()}
        values["spf/drift_inside"] = float(result.drift_inside)
        values["spf/drift_outside"] = float(result.drift_outside)
        values["spf/map_mean"] = float(result.map_mean)
        kept = {name: value for name, value in self.values.items() if name.startswith(("spf/response", "spf/base_"))}
        # An empty map has no drift inside, a full one none outside.
        self.values = kept | {name: value for name, value in values.items() if value == value}
        bar = {"drift": values["spf/drift_outside"], "map": values["spf/map_mean"]}
        self._report({name: value for name, value in bar.items() if value == value})
