"""Asks sd-scripts itself what it makes of a data set, where a copy of it is at hand; how any trainer is asked.

It is asked in a process of its own, with the run's options (`spf_plugin/hosts/kohya/preparing.py`): its imports are
heavy and may fail, and it may take long. It loads no model, trains nothing, downloads nothing and writes nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import toml

from spf_plugin.errors import SPFError
from spf_plugin.files import CONFIG_BYTES, read_text
from spf_plugin.hosts import answering
from spf_plugin.tools.check.family import Family
from spf_plugin.tools.check.host_options import OF_SCRIPT, SWITCHES

Progress = Callable[[str, int, int], None]
"""`(what is being done, units done, units in all)`"""
Show = Callable[[int, int], None]
"""The last two."""

SECONDS = 300.0  # for its imports, from a slow disk
SECONDS_PER_IMAGE = 0.05  # for its caption and its size, from a slow one
_LONGEST = 1000  # characters of its words that are passed on: some of its messages list every image
_BAR = re.compile(rb"(\d+)/(\d+) \[")  # of tqdm
_PROGRAM = "spf_plugin.hosts.kohya.preparing"


@dataclass(frozen=True)
class Answer:
    """What a trainer says; one of the last three.

    Attributes:
        host: its folder.
        datasets: its data sets, as `answer` of the host's `preparing` describes them.
        stops: why it stops, in its own words.
        cannot: why it could not be asked.
    """

    host: Path
    datasets: list[dict[str, Any]] | None = None
    stops: str = ""
    cannot: str = ""


def at_hand(script: Path | None = None) -> Path | None:
    """The copy of sd-scripts that the run would be started in, by what lies there.

    It is looked for where the trainer is that the user names, in the working folder, and where the `library` is that is
    installed in this Python: sd-scripts' own requirements install its folder.

    Args:
        script: the trainer, as the user writes it.
    """
    folders = [Path.cwd()] if script is None else [script.parent, Path.cwd()]
    try:
        found = importlib.util.find_spec("library")
    except (ImportError, ValueError):
        found = None
    folders += [Path(place).parent for place in (found and found.submodule_search_locations) or ()]
    return next((folder.absolute() for folder in folders if _is_copy(folder)), None)


def _is_copy(folder: Path) -> bool:
    """Whether a folder has what is asked here."""
    needed = {"train_network.py": "def setup_parser", "library/config_util.py": "class BlueprintGenerator"}
    try:
        return all(words in read_text(folder / name, CONFIG_BYTES) for name, words in needed.items())
    except SPFError:
        return False


def ask(
    host: Path,
    model: Family,
    *,
    config: Path | None = None,
    options: Mapping[str, Any] | None = None,
    words: Mapping[str, Any] | None = None,
    images: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Answer:
    """What sd-scripts makes of a run.

    Args:
        host: its folder.
        model: what the run trains, and so with which trainer.
        config: the `--config_file`.
        options: what it would say, where there is none.
        words: options of the command line; they win.
        images: about how many the data set has, which sets the time that it may take.
        progress: called while it reads.
    """
    script = model.script
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        if options is not None:
            config = Path(place, "run.toml")
            config.write_text(toml.dumps(dict(options)), encoding="utf-8")
        # What its trainer does not know is only an error where it is certain that it is the run's.
        known = {k: v for k, v in (words or {}).items() if model.certain or k in OF_SCRIPT[script.name]}
        request = {
            "host": str(host),
            "script": script.name,
            "trainer": script.trainer,
            "words": [*(["--config_file", str(config)] if config else []), *_command_line(known)],
            "certain": bool(model.certain),
        }
        return put("sd-scripts", _PROGRAM, request, SECONDS + SECONDS_PER_IMAGE * images, progress)


def put(name: str, program: str, request: Mapping[str, Any], limit: float, progress: Progress) -> Answer:
    """Ask a trainer, in a process of its own.

    Args:
        name: how it is called.
        program: the module that asks it (`spf_plugin/hosts/answering.py`).
        request: what that is told; `host` is the folder that its imports come from.
        limit: seconds that it may take.
        progress: called while it reads.
    """
    host, asking = Path(request["host"]), f"asking {name}"
    with tempfile.TemporaryFile() as file:  # no pipe: nobody reads it before the end
        progress(asking, 0, 1)
        problem = _run({**request, "program": program}, file, limit, lambda done, of: progress(asking, done, of))
        progress(asking, 1, 1)
        file.seek(0)
        said = file.read()
    try:
        answer = {} if problem else json.loads(said)
    except ValueError:
        problem = "it gave no answer"
    if problem:
        return Answer(host, cannot=problem)
    return Answer(host, answer.get("datasets"), _short(answer.get("stops", "")), _short(answer.get("cannot", "")))


def _command_line(words: Mapping[str, Any]) -> list[str]:
    line: list[str] = []
    for name, value in words.items():
        if name == "output_config":  # which writes the file, and ends
            continue
        if name in SWITCHES:
            line += [f"--{name}"] if value else []
        elif isinstance(value, list):
            line += [f"--{name}", *map(str, value)]
        else:
            line.append(f"--{name}={value}")
    return line


def _run(request: Mapping[str, Any], answers: IO[bytes], limit: float, show: Show) -> str:
    """Start the process, pass its bars on, and wait. Returns why there is no answer; empty where there is one."""
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    try:
        process = subprocess.Popen(
            [sys.executable, answering.__file__],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=subprocess.PIPE,
            env={**os.environ, **quiet},
        )
    except OSError as error:
        return f"this Python cannot be started: {error}"
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdin
        assert process.stderr
        last = _listen(process.stdin, process.stderr, json.dumps(request).encode(), show)
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()  # where the user stops the check
        process.wait()
    if late.is_set():
        return f"it was not done after {limit:.0f} seconds"
    return f"it ended with status {status}: {_short(last)}" if status else ""


def _listen(request: IO[bytes], said: IO[bytes], text: bytes, show: Show) -> str:
    """Send the request; read what the process prints until it ends. Returns its last line."""
    try:
        request.write(text)
        request.close()
    except OSError:  # it ended first; its last line says why
        pass
    last = left = b""
    while piece := said.read1(65536):  # type: ignore[attr-defined]  # a pipe is buffered
        *lines, left = re.split(rb"[\r\n]+", left[-65536:] + piece)
        for line in filter(None, lines):
            last = line
            if bar := _BAR.search(line):
                show(int(bar[1]), int(bar[2]))
    return (left or last).decode("utf-8", errors="replace")


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else words[:_LONGEST] + "..."
