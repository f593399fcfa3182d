"""The names of the files that the host makes of `output_name`: where they cannot be, the first save would fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NAME_BYTES = 255  # the most that a file's name can have
#: What the host puts behind the name, by the option that asks for it.
_ENDINGS = {
    "": ".safetensors",
    "save_every_n_epochs": "-000001.safetensors",
    "save_n_epoch_ratio": "-000001.safetensors",
    "save_every_n_steps": "-step00000001.safetensors",
}
_NEVER = "\0"
_NOT_ON_WINDOWS = '<>:"|?*' + "".join(map(chr, range(32)))  # behind a colon the file would be there, and hidden


def name_problems(args: Any, *, windows: bool = os.name == "nt") -> list[str]:
    """Why the run could not save under its name.

    Args:
        args: the host's arguments.
        windows: what holds there is asked for, too.
    """
    name = getattr(args, "output_name", None)
    if not isinstance(name, str):
        return []
    folder, own = os.path.split(name)
    if not own:
        return [
            "--output_name is empty: the file would be called '.safetensors'. Give a name, or leave the option out."
        ]
    found = []
    refused = [sign for sign in own if sign in (_NOT_ON_WINDOWS if windows else _NEVER)]
    if refused:
        found.append(f"--output_name {name!r}: no file can have {refused[0]!r} in its name. Leave it out.")
    elif folder and not Path(getattr(args, "output_dir", None) or "", folder).is_dir():
        found.append(
            f"--output_name {name!r} is in a folder {folder!r} that is not there, and sd-scripts makes none for it: "
            "the first save would fail. Make it, or put it into --output_dir."
        )
    endings = [ending for option, ending in _ENDINGS.items() if not option or getattr(args, option, None)]
    longest = len(own.encode(errors="replace")) + max(map(len, endings))
    if longest > NAME_BYTES:
        found.append(
            f"--output_name makes file names of {longest} bytes, and {NAME_BYTES} is the most (a letter beyond ASCII "
            "has two to four). Give a shorter one."
        )
    return found
