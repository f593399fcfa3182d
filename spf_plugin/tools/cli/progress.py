"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Show = Callable[[str, int, int, Mapping[str, float]], None]
"""`(what is being done, units done, units in all, numbers worth showing)`"""


@contextmanager
def progress_bars(console: Console, every: float = 20.0) -> Iterator[Show]:
    """One bar per piece of work; where the console is no terminal, one line every so many seconds.

    Yields:
        The function that work reports to.
    """
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    tasks: dict[str, Any] = {}
    printed = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            nonlocal printed
            text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, numbers=text)
            bars.update(tasks[what], completed=done, total=total, numbers=text)
            if not console.is_terminal and (done >= total or time.monotonic() - printed > every):
                printed = time.monotonic()
                console.print(f"{what} {done}/{total}  {text}".rstrip(), highlight=False)

        yield show
