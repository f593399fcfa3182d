"""What sd-scripts can and cannot do with SPF: rules that a run and `spf check` share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

SUPPORTED = "SPF supports train_network.py and sdxl_train_network.py of sd-scripts v0.8.7 to v0.10.x"


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


def _overrides(cls: type, name: str) -> type | None:
    """The most derived class that defines `name`."""
    return next((c for c in cls.__mro__ if name in vars(c)), None)


def trainer_problem(trainer: Any) -> str | None:
    """Why this trainer cannot be used, or None. Every reason names the trainer."""
    cls = type(trainer)
    seam, prediction = _overrides(cls, "call_unet"), _overrides(cls, "get_noise_pred_and_target")
    if seam is None:
        return f"{cls.__name__} has no call_unet, the call that SPF wraps. {SUPPORTED}"
    if prediction is not None and prediction is not seam and issubclass(prediction, seam):
        return (
            f"{cls.__name__} is not supported: it predicts without call_unet, so SPF could not see it (FLUX, SD3, "
            f"Lumina, HunyuanImage and Anima trainers do). {SUPPORTED}"
        )
    if prediction is not None and not hasattr(cls, "process_batch"):
        return f"{cls.__name__} belongs to a 2024 development branch of sd-scripts (no process_batch). {SUPPORTED}"
    return None
