"""Prompts that no training has seen: a fixed bank, without what the target's words would bring in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from spf_plugin.core import words
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError

PROMPTS = 12  # two of every group
GIVEN = "your held-out prompts"
_SMALL = words.FILLERS | words.PREPOSITIONS | words.OF | words.MEASURES | words.VERBS
_ENDINGS = ("s", "es", "d", "ed", "ing", "e", "y", "ies")  # "hair" is in "haired", "blond" in "blonde"
_PLURALS = {"men": "man", "women": "woman", "children": "child", "people": "person"}


@dataclass(frozen=True)
class HeldOut:
    """What is asked for without having been trained.

    Attributes:
        texts: the prompts.
        groups: the group of each.
        noted: prompt and why: of the bank those that are left out, of a user's own those that say a word of the target.
        source: where the prompts come from.
        is_given: they are a user's own, which are asked as they are.
    """

    texts: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    noted: tuple[tuple[str, str], ...] = ()
    source: str = ""
    is_given: bool = False

    @property
    def members(self) -> dict[str, list[int]]:
        """Group -> the indices of its prompts."""
        found: dict[str, list[int]] = {}
        for i, group in enumerate(self.groups):
            found.setdefault(group, []).append(i)
        return found


def bank() -> dict[str, list[str]]:
    """Group -> prompts, in the order in which they are asked."""
    read: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return read


def own_words(found: Sequence[Target]) -> set[str]:
    """The words of the targets and of what replaces them, in lower case, without articles and the like."""
    said = " ".join(f"{target.phrase} {target.replacement}" for target in found)
    return {word for word in _words(said) if word not in _SMALL and (len(word) > 1 or not word.isascii())}


def _words(text: str) -> list[str]:
    return [_PLURALS.get(word, word) for word in re.findall(r"[^\W_]+", text.casefold())]


def same_word(a: str, b: str) -> bool:
    """Whether two words in lower case are the same, but for an English ending of one of them."""
    short, long = sorted((a, b), key=len)
    stem = short.removesuffix("y") if long.endswith("ies") else short
    return a == b or (long.startswith(stem) and long[len(stem) :] in _ENDINGS)


def shared(text: str, taught: Iterable[str]) -> str:
    """The first word of a prompt that is one of the target's; empty where there is none."""
    taught = list(taught)
    return next((word for word in _words(text) if any(same_word(word, other) for other in taught)), "")


def choose(
    wanted: int, found: Sequence[Target], trained: Iterable[str], groups: Mapping[str, Sequence[str]] | None = None
) -> HeldOut:
    """The first prompts of the bank, of every group in turn, but none that says a word of the target or was trained.

    Args:
        wanted: how many; 0 is none.
        found: the targets.
        trained: captions, or parts of them.
        groups: another bank.

    Raises:
        SPFError: the bank holds less.
    """
    groups = bank() if groups is None else groups
    total = sum(map(len, groups.values()))
    if wanted > total:
        raise SPFError(
            f"--held-out {wanted}: the bank has {total} prompts. Ask for fewer, or give a text file with one a line."
        )
    taught, seen = own_words(found), {" ".join(_words(text)) for text in trained}
    left: list[tuple[str, str]] = []
    kept: dict[str, list[str]] = {}
    for group, texts in groups.items():
        for text in texts:
            word = shared(text, taught)
            if word or " ".join(_words(text)) in seen:
                left.append((text, f"says “{word}”" if word else "is a caption"))
            else:
                kept.setdefault(group, []).append(text)
    turns = zip_longest(*([(group, text) for text in texts] for group, texts in kept.items()))
    chosen = [pair for pair in chain.from_iterable(turns) if pair is not None][:wanted]
    chosen.sort(key=lambda pair: list(groups).index(pair[0]))
    return HeldOut(
        tuple(text for _, text in chosen),
        tuple(group for group, _ in chosen),
        tuple(left) if wanted else (),
        f"{len(chosen)} of the {total} in the plugin's own bank",
    )


def given(texts: Sequence[str], found: Sequence[Target]) -> HeldOut:
    """A user's own: all of them, also those that say a word of the target, which are named."""
    taught = own_words(found)
    named = [(text, f"says “{word}”") for text in texts if (word := shared(text, taught))]
    return HeldOut(tuple(texts), (GIVEN,) * len(texts), tuple(named), f"{len(texts)} given with --held-out", True)
