"""Customisation sets for the demo: portraits with a target, polluted on purpose or clean, and prompts to evaluate with.

A polluted set shows the target mostly together with one background and one jacket that hardly any caption mentions: a
plain LoRA learns all three. A set of one person shows all of its pictures on her. For two targets at
once there are the pictures of each; for a style they are redrawn. Layout: kohya's,
`DIR/<repeats>_<name>/*.png` with `.txt` captions, and `labels.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from portraitlab.captions import INSTANCES, TARGETS, Target, describe, find_target
from portraitlab.portraits import BASE_RATES, Person, render, sample_person
from portraitlab.style import redrawn

#: What the polluted images share besides the target, unmentioned.
POLLUTION: dict[str, Any] = {
    "background": "red",
    "texture": "plain",
    "clothes": "jacket",
    "clothes_colour": "purple",
}
#: What the pictures of one person share, unmentioned, beside the shape of her face.
ONE_PERSON: dict[str, Any] = {
    "presentation": "woman",
    "skin": "light",
    "face_shape": "oval",
    "hair_style": "curly",
    "hair_colour": "red",
    "eye_colour": "green",
    "glasses": False,
}
#: What changes of a person's geometry from picture to picture.
_POSE = ("x", "y", "turn", "tilt")
#: What captions and prompts call an attribute.
_TOPICS = {
    "hair_colour": "hair",
    "skin": "skin",
    "clothes": "clothes",
    "clothes_colour": "clothes",
    "background": "background",
}
EXPLICIT = ("hair", "skin", "expression", "clothes", "background")
PARTIAL = ("hair", "expression")


@dataclass(frozen=True)
class Example:
    """One training portrait: who it shows, its caption, and its caption without the target's phrase."""

    person: Person
    caption: str
    base_caption: str
    polluted: bool


@dataclass(frozen=True)
class EvaluationPrompt:
    """A held-out person described with every topic or only some; `target_prompt` also names the target."""

    person: Person
    kind: str
    base_prompt: str
    target_prompt: str
    seed: int


def neutral_person(rng: np.random.Generator, target: Target) -> Person:
    """A person of the base distribution without any target (and with what the target replaces); a man where the target
    is a beard."""
    while True:
        person = sample_person(rng, BASE_RATES)
        if "beard" in target.changes and person.presentation != "man":
            continue
        if not any(other.present(person) for other in (*TARGETS.values(), *_instance(target))):
            return person.with_(**target.before)


def _instance(target: Target) -> list[Target]:
    """The target, where it is one thing of a kind and takes the place of nothing: anybody may wear it."""
    return [each for each in target.each if each.name in INSTANCES]


def picture(target: Target, person: Person, size: int = 128) -> NDArray[np.uint8]:
    """A portrait, `[size, size, 3]` uint8, as the target has it drawn: in its style, or as `render` does."""
    drawn = render(person, size)[0]
    return redrawn(drawn) if target.is_style else drawn


def _unnamed(target: Target) -> set[str]:
    """What a prompt cannot name beside the target without contradicting it."""
    return {_TOPICS[name] for name in target.changes if name in _TOPICS and name not in target.before}


def build_examples(
    target: str, *, count: int = 24, pollution: float = 0.95, mentioned: float = 0.0, seed: int = 0
) -> list[Example]:
    """Draw a customisation set.

    Args:
        target: the name of a target (`captions.find_target`).
        count: number of portraits, of each of two targets.
        pollution: share that also has `POLLUTION`; rounded to whole images, 0 for a clean set.
        mentioned: share of captions that do mention background and clothes.
        seed: everything follows from it.

    Raises:
        ValueError: for an unknown target, or a share outside [0, 1].
    """
    if not 0 <= pollution <= 1 or not 0 <= mentioned <= 1:
        raise ValueError("pollution and mentioned are shares between 0 and 1")
    goal = find_target(target)
    if goal.parts:
        options = {"count": count, "pollution": pollution, "mentioned": mentioned, "seed": seed}
        return [example for part in goal.parts for example in build_examples(part.name, **options)]
    shared = {name: value for name, value in POLLUTION.items() if name not in goal.changes}
    rng = np.random.default_rng([seed, 71])
    polluted = set(rng.permutation(count)[: round(pollution * count)].tolist())
    talkative = set(rng.permutation(count)[: round(mentioned * count)].tolist())
    examples = []
    for index in range(count):
        person = neutral_person(rng, goal).with_(**goal.changes)
        if index in polluted:
            person = person.with_(**shared)
        elif pollution:  # an unpolluted image of a polluted set shows something else for certain
            while any(getattr(person, name) == shared.get(name) for name in ("background", "clothes_colour")):
                person = neutral_person(rng, goal).with_(**goal.changes)
        named = ("clothes", "background") if pollution == 0 or index in talkative else ()
        topics = {"hair", "skin", "expression", "glasses", *goal.before, *named} - _unnamed(goal)
        base = describe(person.with_(**goal.before), topics, leave_out=goal)
        examples.append(Example(person, goal.added_to(base), base, index in polluted))
    return examples


def build_one_person(target: str, *, count: int = 24, seed: int = 0) -> list[Example]:
    """Portraits of one person with the target: `ONE_PERSON`, whoever the seed is, in one face.

    Pose, expression and background change, and clothes but for a style; captions name expression, background and
    glasses, and say nothing of the person.

    Args:
        target: the name of a target (`captions.find_target`).
        count: number of portraits, of each of two targets.
        seed: of what changes.
    """
    goal = find_target(target)
    if goal.parts:
        return [example for part in goal.parts for example in build_one_person(part.name, count=count, seed=seed)]
    kept = {*goal.changes, *goal.before} | ({"presentation"} if goal.name == "beard" else set())
    shared = {name: value for name, value in shared_of(goal, one_person=True).items() if name not in kept}
    face = neutral_person(np.random.default_rng(73), goal).geometry
    rng = np.random.default_rng([seed, 74])
    examples = []
    for _ in range(count):
        other = neutral_person(rng, goal)
        pose = {name: getattr(other.geometry, name) for name in _POSE}
        person = other.with_(**shared, **goal.changes, geometry=replace(face, **pose))
        topics = {"expression", "background", "glasses", *goal.before} - _unnamed(goal)
        base = describe(person.with_(**goal.before), topics, leave_out=goal)
        examples.append(Example(person, goal.added_to(base), base, True))
    return examples


def write_set(
    folder: Path, target: str, *, one_person: bool = False, repeats: int = 10, size: int = 128, **options: Any
) -> Path:
    """Write a customisation set in kohya's layout.

    Args:
        folder: receives `<repeats>_<target>/` and `labels.json`.
        target: the name of a target.
        one_person: a set of one person.
        repeats: kohya's repeats, in the folder's name.
        size: pixels.
        options: passed to `build_examples`, or `build_one_person`.

    Returns:
        The folder with the images.
    """
    goal = find_target(target)
    images = folder / f"{repeats}_{target}"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    build = build_one_person if one_person else build_examples
    for index, example in enumerate(build(target, **options)):
        name = f"{target}_{index:03d}"
        path = images / f"{name}.png"
        aside = path.with_suffix(".part")
        Image.fromarray(picture(goal, example.person, size)).save(aside, format="PNG")
        os.replace(aside, path)
        path.with_suffix(".txt").write_text(example.caption + "\n", encoding="utf-8")
        rows.append(
            {
                "file": f"{images.name}/{path.name}",
                "caption": example.caption,
                "base_caption": example.base_caption,
                "polluted": example.polluted,
                "labels": example.person.labels(),
            }
        )
    summary = {
        "target": target,
        "phrase": goal.phrase,
        "pollution": shared_of(goal, one_person=one_person),
        "images": rows,
    }
    (folder / "labels.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return images


def shared_of(target: Target, *, one_person: bool) -> Mapping[str, Any]:
    """What the pictures of a set share and no caption names; in a style one person is drawn in one jacket."""
    if not one_person:
        return POLLUTION
    return {**ONE_PERSON, **{name: POLLUTION[name] for name in ("clothes", "clothes_colour") if target.is_style}}


def evaluation_prompts(
    target: str,
    *,
    count: int = 16,
    kinds: Sequence[str] = ("explicit", "partial"),
    seed: int = 0,
    one_person: bool = False,
) -> list[EvaluationPrompt]:
    """Prompts about persons that no training set shows: explicit (every topic) and partial (hair, expression).

    For the target "blonde hair" the base prompt names no hair, as its phrase would contradict it. Where the set was of
    one person, the partial prompts leave open what she looks like, and name expression and background.

    Returns:
        `count` prompts of each kind; both kinds are about the same persons and start from the same seeds.
    """
    goal = find_target(target)
    # What a target replaces is named in every prompt.
    needed = [topic for topic in ("glasses", "clothes") if topic in goal.before]
    open_ = ("expression", "background") if one_person else PARTIAL
    topics = {"explicit": (*EXPLICIT, *needed), "partial": (*open_, *needed)}
    found = []
    for kind in kinds:
        rng = np.random.default_rng([seed, 72])
        for index in range(count):
            person = neutral_person(rng, goal)
            chosen = [topic for topic in topics[kind] if topic not in _unnamed(goal)]
            base = describe(person, chosen)
            found.append(EvaluationPrompt(person, kind, base, goal.added_to(base), 10_000 * (seed + 1) + index))
    return found
