"""The names of the files that the host makes of `output_name`: too long for the disk, the first save would fail."""

from __future__ import annotations

from typing import Any

NAME_BYTES = 255  # the most that a file's name can have
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
    endings = [ending for option, ending in _ENDINGS.items() if not option or getattr(args, option, None)]
    longest = len(name.rpartition("/")[2].encode(errors="replace")) + max(map(len, endings))
    if longest <= NAME_BYTES:
        return []
    return [
        f"--output_name makes file names of {longest} bytes, and {NAME_BYTES} is the most (a letter beyond ASCII has "
        "two to four). Give a shorter one."
    ]
