"""SPF's numbers on the progress bar of a trainer of kohya's."""

from __future__ import annotations

from typing import Any

from spf_plugin.hosts.frames import callers_variable


class Postfix:
    """What is shown behind the bar, beside what the trainer shows there itself."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._seen = False

    def show(self, values: dict[str, float]) -> None:
        """Show these from now on. The bar, a caller's variable `progress_bar`, is there when training has begun."""
        self._values = {name: round(value, 4) for name, value in values.items()}
        if self._seen:
            return
        self._seen = True
        bar = callers_variable("progress_bar")
        if bar is not None:
            original = bar.set_postfix

            def set_postfix(*args: Any, **kwargs: Any) -> None:
                original(*args, **{**kwargs, **self._values})

            bar.set_postfix = set_postfix  # the bar belongs to this run and ends with it: nothing to put back
