"""What any trainer's run can get wrong, whichever trainer it is: where it would write, options given twice, one
target or another.

Functions of plain data, without torch, that a run and `spf check` share.
"""

from __future__ import annotations

import ntpath
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spf_plugin.core.prompt import Target
from spf_plugin.files import NAME_BYTES, PATH_LETTERS, impossible, long_paths, name_length

#: What the host puts behind the name, by the option that asks for it.
_ENDINGS = {
    "": ".safetensors",
    "save_every_n_epochs": "-000001.safetensors",
    "save_n_epoch_ratio": "-000001.safetensors",
    "save_every_n_steps": "-step00000001.safetensors",
}
_CUT, _ASIDE = 100, 34  # while it is written, a file has so much of its name, and so much more (`writer.aside`)


@dataclass(frozen=True)
class Found:
    """What is wrong with a run: `errors` stop it; `warnings` of its options and `of_captions` may be wanted."""

    errors: list[str]
    warnings: list[str]
    of_captions: list[str]


def sought(targets: Iterable[Target]) -> set[tuple[str, str]]:
    """What is looked for in captions, and what takes its place: `blonde_hair` is `Blonde hair`, in any order."""
    return {(replace(target, phrase=target.phrase.lower()).pattern.pattern, target.replacement) for target in targets}


def repeated(words: Sequence[str], host: str) -> list[str]:
    """Why words of the user would be lost: of an option that is given twice, the host keeps the last.

    Args:
        words: of the command line.
        host: how the trainer is called.
    """
    names = [word.partition("=")[0] for word in words]
    # The host takes short forms of it, too.
    given = [name for name in names if name.startswith("--network_ar") and "--network_args".startswith(name)]
    if len(given) < 2:
        return []
    return [
        f"--network_args is given {len(given)} times, and {host} reads only the last. Write all items behind one: "
        '--network_args "spf_target=blonde hair" "conv_dim=4"'
    ]


def unwritable(folder: Path, *, trying: bool) -> str | None:
    """Why nothing could be written into a folder, which need not be there yet; None where it could. Leaves nothing.

    Args:
        folder: the folder.
        trying: make what is missing of it for a moment, under another name, and a file in it. Else only look at the
            nearest folder that is there: its permissions, and on Windows not even all of these.
    """
    for there in (folder.absolute(), *folder.absolute().parents):
        try:
            os.lstat(there)
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
            return getattr(error, "strerror", None) or str(error)
    if not there.is_dir():
        return "Not a directory"
    if not trying:
        return None if os.access(there, os.W_OK | os.X_OK) else "Permission denied"
    try:
        with tempfile.TemporaryDirectory(dir=there) as inside:
            aside = Path(inside, folder.absolute().relative_to(there))
            os.makedirs(aside, exist_ok=True)
            with tempfile.TemporaryFile(dir=aside):
                pass
    except OSError as error:
        return error.strerror or str(error)
    return None


def folder_problems(folder: str | None, *, trying: bool) -> list[str]:
    """Why the run could not save into its folder.

    Args:
        folder: `output_dir`.
        trying: it may be touched (`unwritable`).
    """
    if not folder:
        return []
    if folder != folder.strip():  # of "/data" it makes another, relative path, and nobody sees it
        return [f"--output_dir {folder!r} begins or ends with a space: files would lie elsewhere. Take it away."]
    reason = unwritable(Path(folder), trying=trying)
    if reason is None:
        return []
    # The host would find out when it saves, after hours.
    return [f"--output_dir {folder}: nothing can be written there: {reason}."]


def name_problems(args: Any, host: str, *, windows: bool = os.name == "nt") -> list[str]:
    """Why the run could not save under its name.

    Args:
        args: the host's arguments.
        host: how the trainer is called.
        windows: what holds there is asked for, too.
    """
    name = getattr(args, "output_name", None)
    if not isinstance(name, str):
        return []
    folder, own = (ntpath if windows else os.path).split(name)
    if not own:
        return [
            "--output_name is empty: the file would be called '.safetensors'. Give a name, or leave the option out."
        ]
    found = []
    reason = impossible(own + _ENDINGS[""], windows=windows)
    if not reason and windows and ntpath.splitdrive(name)[0] and not ntpath.isabs(name):  # "a: first"
        reason = impossible(ntpath.splitdrive(name)[0], windows=True)
    if reason:
        found.append(f"--output_name {name!r}: {reason}. Give another name.")
    elif folder and not Path(getattr(args, "output_dir", None) or "", folder).is_dir():
        found.append(
            f"--output_name {name!r} is in a folder {folder!r} that is not there, and {host} makes none for it: "
            "the first save would fail. Make it, or put it into --output_dir."
        )
    endings = [ending for option, ending in _ENDINGS.items() if not option or getattr(args, option, None)]
    longest = name_length(own, windows=windows) + max(map(len, endings))
    if longest > NAME_BYTES:
        found.append(
            f"--output_name makes file names of {longest} bytes, and {NAME_BYTES} is the most (a letter beyond ASCII "
            "has two to four). Give a shorter one."
        )
    path = len(os.path.abspath(os.path.join(getattr(args, "output_dir", None) or "", folder))) + 1
    path += max(longest, min(longest, _CUT) + _ASIDE)
    if windows and longest <= NAME_BYTES and path > PATH_LETTERS and not long_paths():
        found.append(
            f"--output_dir and --output_name make paths of more than {PATH_LETTERS} letters while a file is written, "
            "which this Windows does not open. Shorten them, or turn on long paths (LongPathsEnabled)."
        )
    return found
