"""A process of its own, in which a trainer's own code is asked what it makes of a run.

`spf check` starts this file (`spf_plugin/tools/check/asking.py`); which trainer, the request's `program` says, a module
of this package with a function `answer`: request -> what `told` gives.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Refused(Exception):
    """The host takes no such run; it says so otherwise than by an exception."""


class Unknown(Exception):
    """The host would do what is not done here."""


def told(prepare: Callable[[], list[dict[str, Any]]], file: str) -> dict[str, Any]:
    """What a host makes of a run.

    Args:
        prepare: has the host make its data sets, and describes them.
        file: in which that is written.

    Returns:
        `datasets`; or `stops`, why the host stops, in its words; or `cannot`, why it could not be asked.
    """
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    try:
        return {"datasets": prepare()}
    except (Unknown, MemoryError) as error:
        return {"cannot": words(error)}
    except (Exception, SystemExit) as error:
        # Where the host is another than those that are known, it is the call that fails, and not what is called.
        ours = traceback.extract_tb(error.__traceback__)[-1].filename == file and not isinstance(error, Refused)
        return {"cannot" if ours else "stops": ": ".join([*errors.last, words(error)])}
    finally:
        logging.getLogger().removeHandler(errors)


class _Errors(logging.Handler):
    """Keeps the last error that was logged: some of a host's exceptions do not name the file."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.last = [record.getMessage()]


def words(error: BaseException) -> str:
    """An exception as a user reads it."""
    if isinstance(error, Refused | Unknown):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def main() -> None:
    """One request on the standard input, JSON; one answer on the standard output."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever the host prints must not mix with the answer
    request = json.load(sys.stdin)
    here = Path(os.path.abspath(__file__)).parent  # Python puts it first
    others = (place for place in sys.path if os.path.abspath(place or ".") != str(here))
    sys.path[:] = [request["host"], *others, str(here.parents[1])]
    json.dump(importlib.import_module(request["program"]).answer(request), answers, default=str)
    answers.flush()
    os._exit(0)  # no thread of an imported package holds it up


if __name__ == "__main__":
    main()
