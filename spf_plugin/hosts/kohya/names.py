"""The names of the files that the host makes of `output_name`: where they cannot be, the first save would fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NAME_BYTES = 255  # the most that a file's name can have
#: What no name can hold on Windows; behind a colon the file would be a hidden part of another one.
_FORBIDDEN = '<>:"|?*' if os.name == "nt" else ""
#: What the host puts behind the name, by the option that asks for it.
_ENDINGS = {
    "": ".safetensors",
    "save_every_n_epochs": "-000001.safetensors",
    "save_n_epoch_ratio": "-000001.safetensors",
    "save_every_n_steps": "-step00000001.safetensors",
}


def name_problems(args: Any) -> list[str]:
    """Why the run could not save under its name.

    Args:
        args: the host's arguments.
    """
    name = getattr(args, "output_name", None)
    if not isinstance(name, str):
        return []
    if not name or name.endswith("/"):
        return [
            "--output_name is empty: the file would be called '.safetensors'. Give a name, or leave the option out."
        ]
    folder = Path(getattr(args, "output_dir", None) or ".", name).parent
    if "/" in name.replace(os.sep, "/") and not os.path.isdir(folder):
        return [
            f"--output_name {name} names a folder, and sd-scripts does not make it: the LoRA could not be saved. Make "
            f"{folder}, or name it in --output_dir."
        ]
    if bad := [sign for sign in Path(name).name if sign in _FORBIDDEN]:
        return [f"--output_name {name} has {' '.join(bad)}, which Windows allows in no file name. Leave it out."]
    endings = [ending for option, ending in _ENDINGS.items() if not option or getattr(args, option, None)]
    longest = len(name.rpartition("/")[2].encode(errors="replace")) + max(map(len, endings))
    if longest <= NAME_BYTES:
        return []
    return [
        f"--output_name makes file names of {longest} bytes, and {NAME_BYTES} is the most (a letter beyond ASCII has "
        "two to four). Give a shorter one."
    ]
