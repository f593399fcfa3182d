"""What reaches a terminal: text that comes from files is shown, and never obeyed.

Captions, file names and metadata are other people's text. A terminal obeys what begins with an escape character: it
sets its title, clears the screen, makes a link that leads elsewhere than it says. So every way out passes `escaped`:
our exceptions, the log lines (`logger`), and the commands' console (`tools.cli.console`).
"""

from __future__ import annotations

import json
import logging
import re

# Control characters but line break and tab, what turns the direction of writing or breaks a line, and lone surrogates,
# which no terminal's encoding has. Joiners stay: emoji and Indian scripts need them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """A text with `\\u001b` in place of an escape character, and so on: as JSON writes them, so JSON stays JSON."""
    return _OBEYED.sub(lambda match: json.dumps(match.group())[1:-1], text)


class _Escaping(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage()), ()
        return True


_ESCAPING = _Escaping()


def logger(name: str) -> logging.Logger:
    """The logger of a module; what it logs is escaped."""
    found = logging.getLogger(name)
    found.addFilter(_ESCAPING)  # the same object: added once
    return found
