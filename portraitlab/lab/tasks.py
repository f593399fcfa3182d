"""What is taught, from which pictures, and which prompts judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from portraitlab.captions import Target, find_target
from portraitlab.customisation import (
    EvaluationPrompt,
    Example,
    build_examples,
    build_one_person,
    evaluation_prompts,
    picture,
    shared_of,
    write_set,
)
from portraitlab.portraits import CLOTHES_COLOURS, HAIR_COLOURS, Person, counterfactual

IMAGES = 24
DATA = ("polluted", "named", "clean", "one-person")
#: What is looked for in pictures of what the training set shared.
WATCHED = {"one-person": ("hair_colour", "skin")}


@dataclass(frozen=True)
class Task:
    """A target and how it is taught and judged; everything random follows from the training seed and from here.

    Attributes:
        target: name of the target, or two at once: `NAME+NAME`.
        steps: optimiser steps.
        batch: images a step.
        data: `polluted` (95 % of the pictures share a background and a jacket that no caption names), `named` (the same
            pictures, all captions name both), `clean` (no shared background, everything named), or `one-person`
            (all show one person, of whom no caption says how she looks).
        prompts: held-out persons; each has an explicit prompt (what the pictures share is named) and a partial one.
        evaluation_seed: chooses the persons and the starting noise of their pictures.
        sequence: targets that were taught one after the other, each LoRA merged before the next; `target` is one of
            them. Empty: only `target` was taught.
    """

    target: str = "sunglasses"
    steps: int = 150
    batch: int = 4
    data: str = "polluted"
    prompts: int = 24
    evaluation_seed: int = 0
    sequence: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """The task as plain JSON types; `Task.of` reads it back."""
        facts = asdict(self)
        sequence = facts.pop("sequence")
        return {**facts, "sequence": list(sequence)} if sequence else facts

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Task:
        """A task from its facts."""
        return cls(**{**facts, "sequence": tuple(facts.get("sequence", ()))})

    @property
    def goal(self) -> Target:
        return find_target(self.target)

    @property
    def one_person(self) -> bool:
        return self.data == "one-person"

    @property
    def shared(self) -> dict[str, Any]:
        """What the training pictures share, of the attributes in which it is looked for; the target's left out."""
        watched = WATCHED.get(self.data, ("background", "clothes_colour"))
        if self.one_person and self.goal.is_style:
            watched = (*watched, "clothes_colour")
        shared = shared_of(self.goal, one_person=self.one_person)
        return {name: shared[name] for name in watched if name not in self.goal.changes}

    @property
    def _set(self) -> dict[str, Any]:
        if self.one_person:
            return {}
        return {
            "pollution": 0.0 if self.data == "clean" else 0.95,
            "mentioned": 1.0 if self.data == "named" else 0.0,
        }

    def examples(self, seed: int) -> list[Example]:
        """The training pictures as persons and captions, in the order of their files."""
        build = build_one_person if self.one_person else build_examples
        return build(self.target, count=IMAGES, seed=seed, **self._set)

    def write(self, folder: Path, seed: int) -> Path:
        """The training pictures as files, once; returns the folder to train on."""
        data = folder / f"{self.target}-{self.data}-{seed}"
        if not (data / "labels.json").exists():
            write_set(data, self.target, one_person=self.one_person, count=IMAGES, seed=seed, **self._set)
        return data

    def evaluation(self) -> list[EvaluationPrompt]:
        """`prompts` explicit prompts, then as many partial ones about the same persons."""
        return evaluation_prompts(
            self.target, count=self.prompts, seed=self.evaluation_seed, one_person=self.one_person
        )

    @cached_property
    def persons(self) -> list[Person]:
        """The persons of the evaluation."""
        return [prompt.person for prompt in self.evaluation()[: self.prompts]]

    def picture(self, person: Person) -> NDArray[np.uint8]:
        """A training picture of a person, `[128, 128, 3]` uint8."""
        return picture(self.goal, person)

    def masks(self, seed: int, size: int = 16) -> Tensor:
        """Where the target truly is in each training picture, `[N, 1, size, size]` in {0, 1}: what no user has."""
        found = []
        for example in self.examples(seed):
            if self.goal.is_style:
                found.append(torch.ones(1, size, size))
                continue
            region = counterfactual(example.person, 128, **_without(self.goal, example.person)).region
            cells = region.reshape(size, 128 // size, size, 128 // size).any(axis=(1, 3))
            found.append(torch.from_numpy(cells.astype(np.float32))[None])
        return torch.stack(found)


def _without(goal: Target, person: Person) -> dict[str, object]:
    """What takes the target away from a person: of two at once, the one that is there."""
    if goal.parts:
        return {k: v for part in goal.parts if part.present(person) for k, v in _without(part, person).items()}
    if goal.before:
        return dict(goal.before)
    if "hair_colour" in goal.changes:
        others = [colour for colour in HAIR_COLOURS if colour != person.hair_colour]
        return {"hair_colour": others[0]}
    if "clothes_colour" in goal.changes:
        return {"clothes_colour": next(colour for colour in CLOTHES_COLOURS if colour != person.clothes_colour)}
    return {name: False for name, value in goal.changes.items() if value is True}
