"""Results are kept under a name made of all that they depend on: a second run computes only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from portraitlab.lab.measuring import GUIDANCE, SAMPLER_STEPS
from portraitlab.lab.rows import Row
from portraitlab.lab.tasks import Task
from portraitlab.lab.training import RANK
from portraitlab.model_files import MODEL_FOLDER, min_snr_gamma
from spf_plugin.errors import SPFError

#: What was measured for docs/lab.md.
PUBLISHED = Path(__file__).parents[2] / "docs" / "lab.jsonl"
#: All that a run without any weight depends on: the other settings do nothing then.
PLAIN_FACTS = ("spf_target", "spf_train", "spf_base")


#: The embedded models: the folder of the denoiser in each.
BASES: Mapping[str, str] = {"unet": "unet", "dit": "transformer"}


@dataclass(frozen=True)
class Result:
    """One measured LoRA (or, as row `base`, the untuned model), of one of `BASES`."""

    key: str
    row: str
    learning_rate: float
    seed: int
    task: Mapping[str, Any]
    scores: Mapping[str, float]
    base: str = "unet"

    def about(self, task: Task) -> bool:
        """Whether it belongs to a task."""
        return Task.of(self.task) == task


def base_of(model: Path) -> str:
    """Which of `BASES` a folder has.

    Raises:
        SPFError: none.
    """
    for base, part in BASES.items():
        if any((model / part).glob("*.safetensors")):
            return base
    raise SPFError(f"--model {model} is no embedded model: it has neither {' nor '.join(BASES.values())}.")


@lru_cache
def _fingerprint(model: Path) -> str:
    (weights,) = (model / BASES[base_of(model)]).glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def key(task: Task, row: Row | None, learning_rate: float, seed: int, model: Path) -> str:
    """The name of a result; `row=None` is the untuned model."""
    facts: list[Any] = [task.facts, _fingerprint(model), SAMPLER_STEPS, GUIDANCE]
    if row is not None:
        here = str(MODEL_FOLDER.parent)  # the same result under another path
        config = row.config(task)
        spf = {name: value.replace(here, "") for name, value in config.to_metadata().items()}
        if not config.active:
            spf = {name: spf[name] for name in PLAIN_FACTS}
        facts += [spf, row.peer, dict(row.options), learning_rate, seed, RANK, min_snr_gamma(model)]
        facts += [row.steps] if row.steps else []
        facts += [dict(row.constants)] if row.constants else []
        facts += [row.variant] if row.variant else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write(folder: Path, result: Result) -> None:
    """Keep a result in a file of its own, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{result.key}.part"
    aside.write_text(_line(result), encoding="utf-8")
    os.replace(aside, folder / f"{result.key}.json")


def _line(result: Result) -> str:
    facts = asdict(result)
    if result.base == "unet":  # most results, and all from before there was another
        del facts["base"]
    return json.dumps(facts) + "\n"


def read(folder: Path | None, published: Path | None = None) -> dict[str, Result]:
    """Everything that was measured so far, in a folder and for the documentation, by key."""
    published = published or PUBLISHED
    return (stored(published) if published.exists() else {}) | (stored(folder) if folder else {})


def stored(place: Path) -> dict[str, Result]:
    """The results in a folder, one a file, or in a `.jsonl` file, by key."""
    files = [place] if place.is_file() else sorted(place.glob("*.json"))
    lines = (line for path in files for line in path.read_text(encoding="utf-8").splitlines())
    found = (Result(**json.loads(line)) for line in lines if line.strip())
    return {result.key: result for result in found}


def publish(results: Iterable[Result], path: Path | None = None) -> None:
    """Write results as one file, a line each, in a stable order."""
    path = path or PUBLISHED
    rows = sorted(
        results,
        key=lambda r: (r.base != "unet", json.dumps(r.task, sort_keys=True), r.row, r.learning_rate, r.seed, r.key),
    )
    aside = path.with_suffix(".part")
    aside.write_text("".join(map(_line, rows)), encoding="utf-8")
    os.replace(aside, path)


def tasks(found: Iterable[Result]) -> list[Task]:
    """The tasks that results are about, in the order of their first result."""
    return list(dict.fromkeys(Task.of(result.task) for result in found))
