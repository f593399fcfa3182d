"""The frames of a trainer that is calling: its network module is given neither trainer nor accelerator."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def local_variables(frame: FrameType, *names: str) -> dict[str, Any]:
    """Those of a function's variables that are set; nothing of the others stays behind.

    Up to Python 3.12 `f_locals` is a dictionary that the frame keeps: every variable as it was, here a step's tensors
    and their graph, until somebody reads it again. So it is read only in a function that has such a variable, and
    emptied. That writes nothing back, but for a debugger or profiler that is looking at this very frame; and whoever
    called `locals()` there holds the same dictionary. Then it is left alone.
    """
    code = frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:  # a module or class body: the dictionary is the variables themselves
        return {}
    if not set(names) & {*code.co_varnames, *code.co_cellvars, *code.co_freevars}:
        return {}
    variables = frame.f_locals
    found = {name: variables[name] for name in names if name in variables}
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    # Held by the frame, by us and by the call that counts; from 3.13 on it is a view, which keeps nothing.
    if isinstance(variables, dict) and not watched and sys.getrefcount(variables) <= 3:
        variables.clear()
    return found


def callers_variable(name: str) -> Any:
    """A variable of the nearest caller that has one of this name; None where there is none."""
    return next((found[name] for frame in _frames() if (found := local_variables(frame, name))), None)


def training_frame() -> FrameType | None:
    """The frame of the host's training function, looked for among the callers."""
    for frame in _frames():
        found = local_variables(frame, "self", "args", "train_dataset_group")
        if len(found) == 3 and found["self"] is not None:
            return frame
    return None


def raw_network_args() -> Sequence[str]:
    """The words of `--network_args` of the trainer that is calling us; empty where there is none. A text where a
    configuration file gave one in place of a list."""
    for frame in _frames():
        args: Any = local_variables(frame, "args").get("args")
        if hasattr(args, "network_module") and hasattr(args, "network_args"):
            return args.network_args or []
    return []
