"""What a run really did, as its file keeps it: the proof that SPF was at work, and how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY = "spf_run"  # in `ss_network_args`, beside the settings
#: In the metadata of a file whose alphas are not those that its training's arguments give: what plain sd-scripts needs
#: to go on from it. `networks.lora` takes its scale from its arguments and no notice of a file's alphas, unless told.
CONTINUED_WITH = "spf.continued_with"
DIM_FROM_WEIGHTS = "--dim_from_weights"

# What a training batch was, and how a sentence says it.
KINDS = {
    "aligned": "aligned",
    "second": "the second of a pair",
    "before": "plain, before alignment began",
    "dropped": "plain, every caption dropped out",
    "plain": "plain, without any weight",
}


@dataclass(frozen=True)
class Run:
    """Counted in the training batches of the main process; what a run had done when it was resumed counts, too.

    Attributes:
        batches: of each of `KINDS`, how many; kinds that there were none of are left out.
        samples: shown in the aligned batches.
        with_target: of these, how many had a target in their prompt.
        map_mean: mean of the control map over the logged steps that had a target; None without one.
        drift: relative drift outside the map in the first logged steps, and in the last; None without any.
        terms: loss name -> its mean over the logged steps, unweighted.
        skipped: batches that the response term left out since the last start.
    """

    batches: Mapping[str, int] = field(default_factory=dict)
    samples: int = 0
    with_target: int = 0
    map_mean: float | None = None
    drift: tuple[float, float] | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0

    @property
    def problem(self) -> str | None:
        """Why this is no file of SPF's, whatever its settings say."""
        total = sum(self.batches.values())
        if not self.batches.get("aligned"):
            return f"nothing was aligned: this is a plain LoRA ({self._parts()})" if total else None
        if not self.with_target:
            return "no sample had a target in its prompt: nothing was left free to be learned"
        return None

    def _parts(self) -> str:
        return ", ".join(f"{self.batches[kind]} {said}" for kind, said in KINDS.items() if self.batches.get(kind))

    def __str__(self) -> str:
        out = [f"{sum(self.batches.values())} batches: {self._parts() or 'none'}"]
        if self.samples:
            out.append(f"{self.with_target} of {self.samples} aligned samples had a target")
        if self.map_mean is not None:
            out.append(f"control map open over {self.map_mean:.0%} of the picture")
        if self.drift is not None:
            out.append(f"drift outside it {self.drift[0]:.2g} at first, {self.drift[1]:.2g} at the end")
        if self.terms:
            out.append("terms " + ", ".join(f"{name} {value:.2g}" for name, value in self.terms.items()))
        if self.skipped:
            out.append(f"response term left out of {self.skipped}")
        return "; ".join(out)

    def as_json(self) -> dict[str, object]:
        """Without what is nothing, and with four digits: it stands in every file."""
        rounded = {name: _short(value) for name, value in self.terms.items()}
        values: dict[str, object] = {
            "batches": dict(self.batches),
            "samples": self.samples,
            "with_target": self.with_target,
            "map_mean": None if self.map_mean is None else _short(self.map_mean),
            "drift": None if self.drift is None else [_short(value) for value in self.drift],
            "terms": rounded,
            "skipped": self.skipped,
        }
        return {name: value for name, value in values.items() if value not in (None, {}, 0)}

    @classmethod
    def of(cls, said: object) -> Run | None:
        """What `as_json` gave; None where a file says something else there, or nothing."""
        if not isinstance(said, Mapping):
            return None
        batches, terms, drift = said.get("batches", {}), said.get("terms", {}), said.get("drift", [])
        if not (isinstance(batches, Mapping) and isinstance(terms, Mapping) and isinstance(drift, list)):
            return None
        counts = [*batches.values(), *(said.get(name, 0) for name in ("samples", "with_target", "skipped"))]
        measured = [*terms.values(), *drift, said.get("map_mean", 0.0)]
        if not all(type(count) is int and count >= 0 for count in counts) or not all(map(_is_number, measured)):
            return None
        if not batches.keys() <= KINDS.keys() or len(drift) not in (0, 2):
            return None
        return cls(
            batches=dict(batches),
            samples=said.get("samples", 0),
            with_target=said.get("with_target", 0),
            map_mean=said.get("map_mean"),
            drift=(drift[0], drift[1]) if drift else None,
            terms={str(name): value for name, value in terms.items()},
            skipped=said.get("skipped", 0),
        )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
