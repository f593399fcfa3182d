"""A process that imports a host's heavy packages once, and forks for every job, so that each run is fresh nevertheless.

Jobs come as JSON, one a line, on the standard input, each with the file of its `log`; for each one line of JSON goes to
the standard output: its `returncode`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(prepare: Callable[[], None], run: Callable[[dict[str, Any]], None]) -> None:
    """Until the input ends.

    Args:
        prepare: makes the host importable, and imports what is slow.
        run: a job.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed while importing must not mix with the answers
    prepare()
    # The hosts collect garbage a few times a run: without this each child walks, and so copies, all those modules.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job, run)
        _, status = os.waitpid(pid, 0)
        answers.write(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()


def _child(job: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        run(job)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
