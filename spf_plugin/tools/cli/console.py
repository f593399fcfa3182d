"""How the commands write: rich's console and plain lines, with everything that a terminal would obey escaped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from spf_plugin.terminal import escaped


class Console(rich.console.Console):
    """rich's, which lets escape characters in texts through. Its own colours and cursor movements are none of these."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


def say(text: str, *, file: Any = None) -> None:
    """One line, or a JSON text, as it is but for what is escaped; a letter that the terminal lacks becomes `?`."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(escaped(text).encode(encoding, errors="replace").decode(encoding), file=stream)
