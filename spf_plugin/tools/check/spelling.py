"""Near-misses: what was probably meant to be the target, and is not."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from spf_plugin.core.prompt import Target

_WORD = re.compile(r"[^\s,.;:()\[\]{}|\"“”]+")
_PLURAL = re.compile(r"(?<=[a-z]{2})(?:ies|(?<=[sxzh])es|(?<!s)s)$")
_SIMILAR = 0.8


@dataclass(frozen=True)
class NearMiss:
    """A stretch of text that resembles a target: `kind` is plural, hyphen, order, or typo."""

    text: str
    kind: str


def _plain(text: str) -> str:
    return " ".join(re.split(r"[\s_]+", text.lower().strip()))


def _joined(text: str) -> str:
    return re.sub(r"[\s_\-]+", "", text.lower())


def _singular(text: str) -> str:
    return " ".join(_PLURAL.sub(_ending, word) for word in _plain(text).split())


def _ending(match: re.Match[str]) -> str:
    return "y" if match.group() == "ies" else ""


def kind_of(text: str, target: str) -> str | None:
    """How `text` misses `target`, or None if it does not resemble it."""
    if _joined(text) == _joined(target):
        return "hyphen"
    a, b = _singular(text), _singular(target)
    if a == b:
        return "plural"
    if len(a.split()) > 1 and sorted(a.split()) == sorted(b.split()):
        return "order"
    words, wanted = _plain(text).split(), _plain(target).split()
    if len(words) != len(wanted) or min(len(w) for w in wanted) == 0:
        return None
    for word, want in zip(words, wanted, strict=True):
        if word != want and not _typo(word, want):
            return None
    return "typo"


def _typo(word: str, wanted: str) -> bool:
    """One slip in a short word, a few in a long one; never a different word of two or three letters."""
    if min(len(word), len(wanted)) < 4 or word[:1] != wanted[:1]:
        return False
    swapped = len(word) == len(wanted) and sorted(word) == sorted(wanted)
    return swapped or difflib.SequenceMatcher(None, word, wanted).ratio() >= _SIMILAR


def near_misses(text: str, target: Target) -> list[NearMiss]:
    """Near-misses of a target in a text that does not hold the target itself (a base prompt)."""
    wanted = len(re.split(r"[\s_]+", target.phrase.strip()))
    found: list[NearMiss] = []
    for part in text.split(","):
        words = [m.group() for m in _WORD.finditer(part)]
        for size in sorted({wanted, max(wanted - 1, 1), wanted + 1, len(re.split(r"[\s_\-]+", target.phrase))}):
            for i in range(len(words) - size + 1):
                stretch = " ".join(words[i : i + size])
                kind = kind_of(stretch, target.phrase)
                if kind and not target.pattern.search(stretch):
                    found.append(NearMiss(stretch, kind))
    return list(dict.fromkeys(found))
