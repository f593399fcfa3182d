"""Captions of drawn portraits: comma-separated phrases, with synonyms and dropped parts.

The words of the whole lab live here: what each attribute is called, how often it is left out, and the customisation
targets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from portraitlab.portraits import Person


@dataclass(frozen=True)
class Target:
    """A customisation target: its phrase, how well the base model knows it, and what it changes in a person.

    A replacement also has the phrase it stands in for, and `before`: what the person shows without the target. A style
    changes nothing in a person, but how the picture is drawn. Two targets at once have both as `parts`.
    """

    name: str
    phrase: str
    kind: str
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    replaces: str = ""
    before: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    parts: tuple[Target, ...] = ()

    @property
    def each(self) -> tuple[Target, ...]:
        """The single targets: its parts, or itself."""
        return self.parts or (self,)

    @property
    def is_style(self) -> bool:
        """Whether pictures of it are redrawn (`style.redrawn`)."""
        return self.kind == "style"

    @property
    def spf(self) -> str:
        """The value of `spf_target`."""
        return "|".join(t.phrase + (f"->{t.replaces}" if t.replaces else "") for t in self.each)

    def present(self, person: Person) -> bool:
        """Whether `person` shows the target."""
        return all(getattr(person, key) == value for key, value in self.changes.items())

    def added_to(self, base: str) -> str:
        """The base prompt with the target: as its last part, or in place of what it replaces; with each of several."""
        for t in self.each:
            base = re.sub(rf"\b{t.replaces}\b", t.phrase, base) if t.replaces else with_phrase(base, t.phrase)
        return base


#: Weak targets are in 1-2 % of the base images and captioned; new ones are never shown nor named there.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        t.name: t
        for t in (
            Target("blonde", "blonde hair", "weak", MappingProxyType({"hair_colour": "blonde"})),
            Target("sunglasses", "sunglasses", "weak", MappingProxyType({"sunglasses": True, "glasses": False})),
            Target("beard", "beard", "weak", MappingProxyType({"beard": True})),
            Target("freckles", "freckles", "weak", MappingProxyType({"freckles": True})),
            Target("hat", "hat", "new", MappingProxyType({"hat": True})),
            Target("scarf", "scarf", "new", MappingProxyType({"scarf": True})),
            Target("earrings", "earrings", "new", MappingProxyType({"earrings": True})),
        )
    }
)
#: Targets that stand in for something else; the base model knows all of these words.
REPLACEMENTS: Mapping[str, Target] = MappingProxyType(
    {
        t.name: t
        for t in (
            Target(
                "shades", "sunglasses", "weak", MappingProxyType({"sunglasses": True, "glasses": False}),
                "glasses", MappingProxyType({"sunglasses": False, "glasses": True}),
            ),
            Target(
                "hoodie", "hoodie", "known", MappingProxyType({"clothes": "hoodie"}),
                "t-shirt", MappingProxyType({"clothes": "t-shirt"}),
            ),
        )
    }
)  # fmt: skip

#: One thing of a kind that the base model knows under this word: "jacket" comes to mean this jacket.
INSTANCES: Mapping[str, Target] = MappingProxyType(
    {
        t.name: t
        for t in (
            Target("jacket", "jacket", "known", MappingProxyType({"clothes": "jacket", "clothes_colour": "purple"})),
        )
    }
)
#: Ways to draw. The base model draws in one way only, so it has no word for another: one phrase is a word that it knows
#: of backgrounds, the other one that its text encoder never read.
STYLES: Mapping[str, Target] = MappingProxyType(
    {t.name: t for t in (Target("ink", "gradient", "style"), Target("ink-unread", "ink drawing", "style"))}
)
KNOWN: Mapping[str, Target] = MappingProxyType({**TARGETS, **REPLACEMENTS, **INSTANCES, **STYLES})


def find_target(name: str) -> Target:
    """The target of that name, or two at once: `NAME+NAME`.

    Raises:
        ValueError: there is none, or the two change the same.
    """
    names = name.split("+")
    for each in names:
        if each not in KNOWN:
            raise ValueError(f"unknown target {each!r}: choose one of {', '.join(KNOWN)}, or two as NAME+NAME")
    if len(names) == 1:
        return KNOWN[name]
    parts = tuple(KNOWN[each] for each in names)
    changed = [{*part.changes, *part.before} for part in parts]
    if len(parts) > 2 or not all(changed) or changed[0] & changed[1]:
        raise ValueError(f"{name!r}: at once are taught two targets that change different attributes, none a style")
    changes, before = ({k: v for part in parts for k, v in getattr(part, m).items()} for m in ("changes", "before"))
    phrase = ", ".join(part.phrase for part in parts)
    return Target(name, phrase, "several", MappingProxyType(changes), "", MappingProxyType(before), parts)


# Synonyms by attribute value: the first is the canonical word, drawn about half of the time.
SUBJECTS = {"woman": ("woman", "lady", "person"), "man": ("man", "guy", "person")}
HAIR_WORDS = {
    "black": ("black hair", "dark black hair"),
    "brown": ("brown hair", "brunette hair"),
    "red": ("red hair", "ginger hair"),
    "grey": ("grey hair", "gray hair"),
    "blonde": ("blonde hair", "blond hair"),
}
HAIR_STYLE_WORDS = {
    "long": "long",
    "bob": "bob cut",
    "bun": "hair bun",
    "curly": "curly",
    "short": "short",
    "swept": "swept",
}
SKIN_WORDS = {
    "light": ("light skin", "pale skin"),
    "tan": ("tan skin", "tanned skin"),
    "brown": ("brown skin",),
    "dark": ("dark skin", "deep skin"),
}
EXPRESSION_WORDS = {
    "neutral": ("neutral expression", "serious"),
    "smiling": ("smiling", "a smile"),
    "laughing": ("laughing", "a big grin"),
    "sad": ("sad", "frowning"),
    "surprised": ("surprised", "astonished"),
}
CLOTHES_WORDS = {
    "t-shirt": ("t-shirt", "tee"),
    "jacket": ("jacket", "blazer"),
    "hoodie": ("hoodie", "hooded top"),
    "sweater": ("sweater", "jumper"),
}
BACKGROUND_WORDS = ("background", "backdrop")
TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped",),
    "gradient": ("gradient",),
    "dotted": ("dotted", "polka dot"),
}
FLAG_WORDS = {
    "glasses": ("glasses", "eyeglasses"),
    "sunglasses": ("sunglasses",),
    "beard": ("beard",),
    "freckles": ("freckles",),
    "hat": ("hat",),
    "scarf": ("scarf",),
    "earrings": ("earrings",),
}
#: How often a topic is left out of a caption.
DROP = {
    "hair": 0.10, "clothes": 0.12, "background": 0.12, "expression": 0.25, "skin": 0.40, "eyes": 0.75,
    "glasses": 0.05, "sunglasses": 0.05, "beard": 0.05, "freckles": 0.05, "hat": 0.05, "scarf": 0.05, "earrings": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class Phrase:
    """One comma-separated part of a caption and what it talks about."""

    topic: str
    text: str


def phrases(person: Person, rng: np.random.Generator | None = None, style: float = 0.4) -> list[Phrase]:
    """All phrases of a portrait, the subject first; with `rng` synonyms are drawn, without it words are canonical.

    Args:
        person: who to describe.
        rng: source of the synonyms.
        style: how often the hair style and the background's texture are named.
    """

    def word(options: Sequence[str]) -> str:
        if rng is None or len(options) == 1 or rng.random() < 0.6:
            return options[0]
        return options[1 + int(rng.integers(len(options) - 1))]

    def chance(p: float) -> bool:
        return rng is not None and bool(rng.random() < p)

    found = [Phrase("subject", f"a {word(SUBJECTS[person.presentation])}")]
    hair = word(HAIR_WORDS[person.hair_colour])
    if chance(style):
        hair = f"{HAIR_STYLE_WORDS[person.hair_style]} {hair}"
    found.append(Phrase("hair", hair))
    found.append(Phrase("skin", word(SKIN_WORDS[person.skin])))
    found.append(Phrase("eyes", f"{person.eye_colour} eyes"))
    found.append(Phrase("expression", word(EXPRESSION_WORDS[person.expression])))
    clothes = f"{person.clothes_colour} {word(CLOTHES_WORDS[person.clothes])}"
    found.append(Phrase("clothes", f"wearing a {clothes}" if chance(0.2) else clothes))
    background = f"{person.background} {word(BACKGROUND_WORDS)}"
    if chance(style * 0.3 if person.texture == "plain" else 0.9):
        background = f"{word(TEXTURE_WORDS[person.texture])} {background}"
    found.append(Phrase("background", background))
    found += [Phrase(flag, word(words)) for flag, words in FLAG_WORDS.items() if getattr(person, flag)]
    return found


def caption(person: Person, rng: np.random.Generator, drop: Mapping[str, float] = DROP) -> str:
    """A random caption: synonyms, left-out parts and, half of the time, another order."""
    subject, *rest = phrases(person, rng)
    kept = [p.text for p in rest if rng.random() >= drop[p.topic]]
    if rng.random() < 0.5:
        kept = [kept[i] for i in rng.permutation(len(kept))]
    return join(subject.text, kept, linked=bool(rng.random() < 0.4))


def join(subject: str, rest: Sequence[str], linked: bool = False) -> str:
    """`subject` and the other phrases with commas; `linked` joins the first one by "with"."""
    if linked and rest and not rest[0].startswith("wearing"):
        return ", ".join([f"{subject} with {rest[0]}", *rest[1:]])
    return ", ".join([subject, *rest])


def describe(person: Person, topics: Sequence[str], *, leave_out: Target | None = None) -> str:
    """A canonical caption of the named topics, in the order of `phrases`; the target's own phrase is left out."""
    subject, *rest = phrases(person)
    hidden = leave_out.phrase if leave_out else None
    return join(subject.text, [p.text for p in rest if p.topic in topics and p.text != hidden])


def with_phrase(text: str, phrase: str) -> str:
    """`text` with the phrase as its last part; unchanged if the phrase is there."""
    return text if has_phrase(text, phrase) else f"{text}, {phrase}" if text else phrase


def without_phrase(text: str, phrase: str) -> str:
    """`text` without that part; a "with ..." link to the subject is taken apart first."""
    parts = []
    for part in text.split(", "):
        subject, link, linked = part.partition(" with ")
        parts += [subject, linked] if link and linked == phrase else [part]
    return ", ".join(part for part in parts if part != phrase)


def has_phrase(text: str, phrase: str) -> bool:
    """Whether the phrase is one of the caption's parts."""
    return any(part == phrase or part.endswith(f" with {phrase}") for part in text.split(", "))
