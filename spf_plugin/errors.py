"""The one exception that users see, and the helper that names the nearest valid spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from spf_plugin.terminal import escaped


class SPFError(ValueError):
    """A mistake that the user can mend. The message lists every problem found, each with its fix.

    Args:
        problems: one sentence (or short paragraph) per mistake.
    """

    def __init__(self, problems: str | Sequence[str]):
        # They quote captions, file names and metadata, and a traceback prints them as they are.
        self.problems = [escaped(text) for text in ([problems] if isinstance(problems, str) else problems)]
        if len(self.problems) == 1:
            message = f"SPF: {self.problems[0]}"
        else:
            lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            message = f"SPF: {len(self.problems)} problems\n{lines}"
        super().__init__(message)


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add the problems of an `SPFError` in the block to the others, and go on behind it."""
    try:
        yield
    except SPFError as error:
        problems += error.problems


def closest(name: str, choices: Iterable[str], n: int = 1, cutoff: float = 0.5) -> list[str]:
    """Those of `choices` that are most like `name`, by at least `cutoff` (1: equal)."""
    return difflib.get_close_matches(name, list(choices), n=n, cutoff=cutoff)


def nearest(name: str, choices: Iterable[str], n: int = 1) -> str:
    """`"; did you mean X?"` for the closest of `choices`, or an empty string when nothing is close."""
    found = closest(name, choices, n)
    return f"; did you mean {' or '.join(found)}?" if found else ""
