"""What reaches a terminal: text that comes from files is shown, and never obeyed.

Captions, file names and metadata are other people's text. A terminal obeys what begins with an escape character: it
sets its title, clears the screen, makes a link that leads elsewhere than it says. So every way out passes `escaped`:
our exceptions, the log lines (`logger`), and the commands' console (`tools.cli.console`).
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys

# Control characters but line break and tab, what turns the direction of writing or breaks a line, and lone surrogates,
# which no terminal's encoding has. Joiners stay: emoji and Indian scripts need them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """A text with `\\u001b` in place of an escape character, and so on: as JSON writes them, so JSON stays JSON."""
    return _OBEYED.sub(lambda match: json.dumps(match.group())[1:-1], text)


def forgiving() -> None:
    """Let what standard output cannot show become `?`: a pipe on Windows has some 200 letters, captions have others.

    Standard error writes them as `\\u9aea` by itself.
    """
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a stream of text has `errors`


class _Escaping(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage()), ()
        return True


_ESCAPING = _Escaping()


class _Logger(logging.Logger):
    """rich, which sd-scripts logs with, draws numbers for every style from Python's own generator: a line of ours would
    change how the run shuffles captions and which it drops.
    """

    def handle(self, record: logging.LogRecord) -> None:
        state = random.getstate()
        try:
            super().handle(record)
        finally:
            random.setstate(state)


def logger(name: str) -> logging.Logger:
    """The logger of a module; what it logs is escaped, and leaves Python's random state as it is."""
    usual = logging.getLoggerClass()
    logging.setLoggerClass(_Logger)
    try:
        found = logging.getLogger(name)
    finally:
        logging.setLoggerClass(usual)
    found.addFilter(_ESCAPING)  # the same object: added once
    return found
