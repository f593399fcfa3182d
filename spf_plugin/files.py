"""Reading the small files that a run is made of: texts, TOML, JSON. Nothing is read that is no file or is far too long.

A device or a pipe in a file's place would never end, and a file of gigabytes in a caption's place is a mistake; the
readers of TOML and JSON leak exceptions of their own on broken files, and values that nobody can use on odd ones.
"""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import toml

from spf_plugin.errors import SPFError

MIB = 2**20
CONFIG_BYTES = MIB  # of a TOML file, or of a model's config.json
CAPTION_BYTES = MIB  # the longest that a text encoder reads has a few hundred
METADATA_BYTES = 256 * MIB  # in_json: a few hundred bytes for each image
IMAGE_BYTES = 64 * MIB  # of a preview
DEEPEST = 32  # levels; anything that goes through a value by recursion could fail on more
SLASHES = "In double quotes a backslash begins an escape: write paths with / or in single quotes."
NAME_BYTES = 255  # the most that a file's name can have: bytes, or on Windows letters of UTF-16
PATH_LETTERS = 259  # the most that Windows' programs open, where long paths are not turned on
_DIGITS = "123456789\u00b9\u00b2\u00b3"
#: Names that Windows has for devices, whatever stands behind their first dot: what is written there is gone.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in _DIGITS)}
_NOT_ON_WINDOWS = '<>:"/\\|?*' + "".join(map(chr, range(32)))  # behind a colon the file would be there, and hidden
_TRIES, _PAUSE = 20, 0.1  # seconds
_SHOWN = 60


def expanded(name: str | Path) -> Path:
    """A path whose `~` is the home folder, where there is one."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises RuntimeError for a user that is unknown


def impossible(name: str, *, windows: bool = os.name == "nt") -> str | None:
    """Why no file can be called so; None where one can.

    Args:
        name: of a file, without its folder.
        windows: what holds there is asked for, too.
    """
    refused = [sign for sign in name if sign in (_NOT_ON_WINDOWS if windows else "/\0")]
    if refused:
        return f"no file can have {refused[0]!r} in its name"
    device = name.partition(".")[0].rstrip(" ").upper()
    if windows and device in RESERVED:
        return f"{device} is a device on Windows, and what is written there is gone"
    if windows and name.endswith((".", " ")):
        return "Windows takes away the dot or space at the end of the name"
    return None


def name_length(name: str, *, windows: bool = os.name == "nt") -> int:
    """How long a file's name is, in what `NAME_BYTES` counts."""
    return len(name.encode("utf-16-le", errors="replace")) // 2 if windows else len(name.encode(errors="replace"))


def long_paths() -> bool:
    """Whether this process opens paths of more than `PATH_LETTERS`."""
    if os.name != "nt":
        return True
    import ctypes

    try:
        return bool(ctypes.windll.ntdll.RtlAreLongPathsEnabled())  # type: ignore[attr-defined]
    except (AttributeError, OSError):  # before Windows 10 of 2016
        return False


def replace(source: Path, target: Path, *, windows: bool = os.name == "nt") -> None:
    """`os.replace`, which on Windows fails while another program has one of the two open.

    A virus scanner or an indexer looks into every new file, for a moment: it is tried for two seconds.

    Raises:
        OSError: as `os.replace`.
    """
    for _ in range(_TRIES - 1):
        try:
            return os.replace(source, target)
        except PermissionError:
            if not windows:
                raise
            time.sleep(_PAUSE)
    os.replace(source, target)


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, and no longer than a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes.

    Raises:
        SPFError: there is none, it is something else, or it is longer.
    """
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise SPFError(f"{path} cannot be read: it is a folder.")
        if not stat.S_ISREG(info.st_mode):  # before it is opened: a pipe would block
            raise SPFError(f"{path} cannot be read: it is a device or a pipe. Name the file itself.")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise SPFError(f"{_short(path)} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # SPFErrors too; else a name that no file can have
        if isinstance(error, SPFError):
            raise
        raise SPFError(f"{_short(path)} cannot be read: no file can have this name.") from None
    if len(content) > limit:
        most = f"{limit // MIB} MiB"
        raise SPFError(f"{path} cannot be read: it is longer than {most}. Is it the file that was meant?")
    return content


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 4 * _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def read_text(path: Path, limit: int, encoding: str = "utf-8") -> str:
    """A text of at most `limit` bytes.

    Raises:
        SPFError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise SPFError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None


def _unmarked(path: Path, text: str) -> str:
    """The text, which no byte order mark begins: trainers take that for a part of the first setting's name.

    Raises:
        SPFError: one does.
    """
    if text.startswith("\ufeff"):
        raise SPFError(
            f"{path} begins with a byte order mark, which is read as a part of it. Save it as UTF-8 without BOM."
        )
    return text


def read_toml(path: Path, encoding: str = "utf-8") -> dict[str, Any]:
    """A TOML file, as the host's library reads it.

    Raises:
        SPFError: as `read_text`, or it is no TOML or begins with a byte order mark, or it holds what no setting can be.
    """
    text = _unmarked(path, read_text(path, CONFIG_BYTES, encoding))
    hint = f" {SLASHES}" if "\\" in text else ""
    try:
        values = toml.loads(text)
    except RecursionError:
        raise SPFError(f"{path} is not valid TOML: it is nested too deeply.{hint}") from None
    except Exception as error:  # besides its own, the library leaks IndexError, TypeError, AttributeError, KeyError
        said = str(error) if isinstance(error, ValueError) else "a name is used for two things, or a value is broken"
        raise SPFError(f"{path} is not valid TOML: {said.rstrip('.')}.{hint}") from None
    _check(path, values)
    return values


def read_json(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """A JSON file.

    Raises:
        SPFError: as `read_text`, or it is no JSON or begins with a byte order mark, or it holds what no setting can be.
    """
    text = _unmarked(path, read_text(path, limit))
    try:
        value = json.loads(text)
    except RecursionError:
        raise SPFError(f"{path} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise SPFError(f"{path} is not valid JSON: {error}.") from None
    _check(path, value)
    return value


def _check(path: Path, value: Any) -> None:
    """What JSON and TOML can write down and nothing can work with: deep nesting, and numbers beyond 64 bits."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if any(isinstance(inner, int) and not -(2**63) <= inner < 2**64 for inner in level):
            raise SPFError(f"{path} has a whole number of more than 64 bits, which nothing can work with.")
        if not level:
            return
    raise SPFError(f"{path} is nested more than {DEEPEST} levels deep, as no settings are.")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
