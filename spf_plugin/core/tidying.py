"""Signs and spaces that are left over where words were taken out of a text. Pure text, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_CLOSES = re.compile(r"(?::[+-]?[.\d]+)?\\?[)\]}\uff09]")  # with an attention weight
_SIGNS = (
    ("open", re.compile(r"\\?[(\[{\uff08]")),
    ("close", _CLOSES),
    ("separator", re.compile(r"[,\uff0c\u3001;\uff1b|]|(?<=\s)[-\u2013\u2014](?=\s)")),
    ("stop", re.compile(r"[.!?](?=\s|$|[)\]\"'])|[\u3002\uff01\uff1f]")),
)


def _sign(text: str, i: int) -> tuple[str, int]:
    """What begins at a position, and where it ends."""
    if i >= len(text):
        return "end", i
    for what, pattern in _SIGNS:
        if match := pattern.match(text, i):
            return what, match.end()
    return "word", i + 1


def with_signs(text: str, start: int, end: int) -> tuple[int, int]:
    """The range with the brackets right around it that close each other, and their weight."""
    while start and text[start - 1] in "([" and (closing := _CLOSES.match(text, end)):
        start -= 1 + (start > 1 and text[start - 2] == "\\" and "\\" in closing.group())
        end = closing.end()
    return start, end


def leftovers(text: str, gone: Sequence[bool], replaced: Collection[int]) -> list[int]:
    """Characters that have to go with those that are gone: a comma of two, empty brackets, a space of two.

    Nothing is touched but what is beside a gap.

    Args:
        text: the text.
        gone: per character, whether it was taken out.
        replaced: before which characters something else stands now, so that there is no gap.
    """
    return _Tidier(text, gone, replaced).run()


class _Tidier:
    """One pass from left to right.

    Attributes:
        kept: the signs and words that stay, but no spaces: what each is, from where to where.
        spaces: that stay, since the last of those; the last `behind` of them stand behind the gap.
        gap: whether something is gone there.
    """

    def __init__(self, text: str, gone: Sequence[bool], replaced: Collection[int]):
        self.text, self.replaced = text, replaced
        self.gone = list(gone)
        self.kept: list[tuple[str, int, int]] = []
        self.spaces: list[int] = []
        self.behind = 0
        self.gap = False
        self.out: list[int] = []

    def run(self) -> list[int]:
        i = 0
        while i <= len(self.text):
            if i in self.replaced:
                self._keep("word", i, i)
            if i < len(self.text) and self.gone[i]:
                self.gap, self.behind = True, 0
                i += 1
            elif i < len(self.text) and self.text[i].isspace():
                self.spaces.append(i)
                self.behind += 1
                i += 1
            else:
                what, end = _sign(self.text, i)
                if not self.gap or self._stays(what, i, end):
                    self._keep(what, i, end)
                i = max(end, i + 1)
        return self.out

    @property
    def left(self) -> str:
        return self.kept[-1][0] if self.kept else "open"

    def _keep(self, what: str, start: int, end: int) -> None:
        self.kept.append((what, start, end))
        self.spaces, self.behind, self.gap = [], 0, False

    def _drop(self, positions: Iterable[int]) -> None:
        for position in positions:
            self.gone[position] = True
            self.out.append(position)

    def _drop_left(self) -> int:
        _, start, end = self.kept.pop()
        self._drop([*range(start, end), *self.spaces])
        self.spaces, self.behind = [], 0
        return start

    def _stays(self, what: str, start: int, end: int) -> bool:
        """Whether a sign or word behind the gap stays; what is before it is set right."""
        if self.left == "separator" and what in ("separator", "close", "stop", "end"):
            self._drop_left()  # "a woman[, blonde hair], park"
        if self.kept and self.left == "open" and what == "close":
            i = self._drop_left()
            self._drop(range(start, end))
            while i and self.text[i - 1].isspace() and not self.gone[i - 1]:
                i -= 1
                self.spaces.insert(0, i)  # those before the brackets are before the gap now
            return False
        first = what == "separator" and self.left in ("open", "stop")
        if first or (what == "stop" and (self.left == "stop" or not self.kept)):
            self._drop(range(start, end))  # "[blonde hair,] a woman"
            self.behind = 0
            return False
        before = len(self.spaces) - self.behind
        if self.left == "open" or what == "end":
            self._drop(self.spaces)
        elif what not in ("word", "open"):
            self._drop(self.spaces[:before])  # "a woman[ with a hat], park"
        elif before:
            self._drop(self.spaces[before:])  # "a [blonde ]woman"
        return True
