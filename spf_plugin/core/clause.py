"""The words of a part of a caption, and what they begin. Pure text, no torch."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass

from spf_plugin.core import words as w

_TOKEN = re.compile(
    r"(?:[ldnsjmtc]|qu)['’](?=\w)"  # French "l'"
    r"|(?<!\w)(?:she|he|it|they|there|who)(?=['’](?:s|re)\b)|['’](?:s|re)\b|w/(?=\s)"  # "she's", but "woman's" is one
    r"|[\w\u0300-\u036f]+(?:['’-][\w\u0300-\u036f]+)*|\S",
    re.IGNORECASE,
)
LONG = 4  # words of a phrase behind "of" and the like
OWN = w.PREPOSITIONS | w.VERBS | w.AUXILIARIES | w.RELATIVES | w.WHILE | w.BEGINS | w.PRONOUNS | w.ADVERBS | w.AND
_UNITS = w.PREPOSITION_UNITS | w.VERB_UNITS


@dataclass(frozen=True)
class Clause:
    """The words of a part of a caption, with `""` for a sign, and where each lies."""

    words: list[str]
    starts: list[int]
    ends: list[int]
    signs: list[int]  # which of them are

    @classmethod
    def read(cls, text: str, unread: Collection[int] = ()) -> Clause:
        """`unread`: characters that are no sign here."""
        words, starts, ends = [], [], []
        for match in _TOKEN.finditer(text):
            if match.start() in unread:
                continue
            word = unicodedata.normalize("NFC", match.group().lower().replace("’", "'"))
            words.append(word if word[0].isalnum() or word in w.AND | w.AUXILIARIES else "")
            starts.append(match.start())
            ends.append(match.end())
        return cls(words, starts, ends, [i for i, word in enumerate(words) if not word])

    def end_from(self, i: int) -> int:
        """The next sign, or the end."""
        found = bisect_left(self.signs, i)
        return self.signs[found] if found < len(self.signs) else len(self.words)

    def word(self, i: int) -> str:
        return self.words[i] if 0 <= i < len(self.words) else ""


def unit_before(clause: Clause, end: int, units: frozenset[tuple[str, ...]]) -> int:
    """Where a unit of several words that ends at `end` begins; `end` if there is none."""
    for size in (4, 3, 2):
        if end >= size and tuple(clause.words[end - size : end]) in units:
            return end - size
    return end


def _unit_behind(clause: Clause, begin: int) -> bool:
    return any(tuple(clause.words[begin : begin + n]) in _UNITS for n in (2, 3, 4))


def is_participle(word: str) -> bool:
    return word.endswith("ing") and len(word) > 4 and word not in w.NO_VERBS


def begins_own(clause: Clause, i: int) -> bool:
    """Whether the word begins something of its own, or there is none."""
    word = clause.word(i)
    return (
        not word
        or word in OWN
        or (word.endswith("ed") and clause.word(i + 1) in w.PREPOSITIONS)
        or _unit_behind(clause, i)
    )


def phrase_end(clause: Clause, i: int) -> int:
    """The end of a phrase of at most a few words that begins at `i`."""
    while clause.word(i) in w.DETERMINERS:
        i += 1
    for _ in range(LONG):
        if begins_own(clause, i) or is_participle(clause.word(i)) or clause.word(i) in w.OF:
            break
        i += 1
    return i
