"""Train and measure what is missing of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from portraitlab.demo import Show
from portraitlab.lab import results
from portraitlab.lab.measuring import Evaluator, load_with
from portraitlab.lab.results import Result
from portraitlab.lab.rows import ROWS
from portraitlab.lab.tasks import Task
from portraitlab.lab.training import train_row
from portraitlab.model_files import sheet

SHOWN_PICTURES = 8


@dataclass(frozen=True)
class Point:
    """A row at a learning rate, trained from one seed."""

    row: str
    learning_rate: float
    seed: int


@dataclass
class Bench:
    """Where to train, and where to keep what was found.

    Attributes:
        out: folder of results, LoRAs and pictures.
        model: folder of the base model.
        device: `cpu` or `cuda`.
        show: progress.
        fresh: also measure what the documentation has, and only skip what `out` has.
    """

    out: Path
    model: Path
    device: str
    show: Show
    fresh: bool = False

    def key(self, task: Task, point: Point) -> str:
        """The name of a result."""
        return results.key(task, ROWS[point.row], point.learning_rate, point.seed, self.model)

    def known(self) -> dict[str, Result]:
        """What need not be measured, by key."""
        folder = self.out / "results"
        return results.stored(folder) if self.fresh else results.read(folder)

    def missing(self, task: Task, points: Sequence[Point]) -> list[Point]:
        """The points that nobody has measured."""
        known = self.known()
        return [point for point in points if self.key(task, point) not in known]

    def run(self, task: Task, points: Sequence[Point]) -> None:
        """Train and measure every point that is missing, and the untuned model."""
        missing = self.missing(task, points)
        if not missing:
            return
        evaluator = Evaluator(task, self.model, self.device, self.show)
        self._untuned(evaluator)
        for count, point in enumerate(missing, 1):
            label = f"{count}/{len(missing)} {task.target} {point.row} {point.learning_rate:g} seed {point.seed}"
            lora, seconds = self._train(task, point, self.model, label)
            self._measure(evaluator, task, point, load_with(self.model, [lora], self.device), label, seconds)

    def run_sequence(self, task: Task, targets: Sequence[str], point: Point) -> None:
        """Teach targets one after the other, each LoRA merged into the model before the next, as `--base_weights` does.

        After each, every target taught so far is measured, always against the untuned model.
        """
        tasks = [replace(task, target=name, sequence=()) for name in targets]
        evaluators: list[Evaluator] = []
        loras: list[Path] = []
        for count, single in enumerate(tasks, 1):
            taught = tuple(targets[:count])
            pending = [replace(t, sequence=taught) for t in tasks[:count]]
            label = f"{count}/{len(tasks)} {point.row} seed {point.seed}: {single.target}"
            evaluators.append(Evaluator(single, self.model, self.device, self.show))
            model = self.model
            if loras:
                model = self.out / "merged" / self.key(replace(single, sequence=taught[:-1]), point)
                if not (model / "model_index.json").exists():
                    load_with(self.model, loras, self.device).save_pretrained(model)
            lora, seconds = self._train(replace(single, sequence=taught), point, model, label)
            loras.append(lora)
            pipeline = load_with(self.model, loras, self.device)
            for evaluator, measured in zip(evaluators, pending, strict=True):
                if self.missing(measured, [point]):
                    self._measure(evaluator, measured, point, pipeline, label, seconds)

    def trained(self, task: Task, point: Point) -> Path:
        """The LoRA of a point, trained if it is not there."""
        lora = self._file(task, point)
        return lora if lora.exists() else self._train(task, point, self.model, point.row)[0]

    def _file(self, task: Task, point: Point) -> Path:
        return self.out / "loras" / f"{self.key(task, point)}.safetensors"

    def _train(self, task: Task, point: Point, model: Path, label: str) -> tuple[Path, float]:
        lora, row = self._file(task, point), ROWS[point.row]
        seconds = train_row(task, row, point.learning_rate, point.seed, model, lora, self.device, label, self.show)
        return lora, seconds

    def _measure(
        self, evaluator: Evaluator, task: Task, point: Point, pipeline: Any, label: str, seconds: float
    ) -> None:
        key = self.key(task, point)
        pictures, bare = evaluator.draw(pipeline, label)
        self._picture(key, pictures)
        scores = evaluator.scores(pictures, bare, pipeline) | {"step_seconds": round(seconds, 4)}
        base = results.base_of(self.model)
        found = Result(key, point.row, point.learning_rate, point.seed, task.facts, scores, base)
        results.write(self.out / "results", found)

    def _untuned(self, evaluator: Evaluator) -> None:
        task = evaluator.task
        key = results.key(task, None, 0, 0, self.model)
        if key in self.known():
            return
        pipeline = load_with(self.model, [], self.device)
        pictures, bare = evaluator.draw(pipeline, "untuned")
        self._picture(key, pictures)
        self._picture(f"{key}-without", evaluator.base)
        scores = evaluator.scores(pictures, bare, pipeline)
        results.write(self.out / "results", Result(key, "base", 0, 0, task.facts, scores, results.base_of(self.model)))

    def picture(self, key: str) -> Path:
        """Where the pictures of a result are shown."""
        return self.out / "pictures" / f"{key}.png"

    def _picture(self, key: str, pictures: NDArray[np.uint8]) -> None:
        """The first few explicit prompts' pictures and as many partial ones, in two lines."""
        self.picture(key).parent.mkdir(parents=True, exist_ok=True)
        half = len(pictures) // 2
        chosen = np.concatenate([pictures[:half][:SHOWN_PICTURES], pictures[half:][:SHOWN_PICTURES]])
        Image.fromarray(sheet(chosen, min(SHOWN_PICTURES, half))).save(self.picture(key))
