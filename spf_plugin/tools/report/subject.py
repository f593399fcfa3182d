"""Photos of the target that were kept back from training: what a picture for their captions should look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.errors import SPFError
from spf_plugin.trainer.data import read_folder, upright


@dataclass(frozen=True)
class Photos:
    """Images uint8 `[H, W, 3]`, of any sizes, and the caption of each."""

    images: Sequence[NDArray[np.uint8]] = ()
    captions: Sequence[str] = ()


def read(folder: Path) -> Photos:
    """Every image of a folder with its caption, whole and in its own size.

    Raises:
        SPFError: see `spf_plugin.trainer.data.read_folder`; or a file is no image.
    """
    from PIL import Image

    pictures = read_folder(folder, "--subject")
    images: list[Any] = []
    for picture in pictures:
        try:
            with Image.open(picture.path) as opened:
                images.append(np.asarray(upright(opened)))
        except (OSError, ValueError) as error:
            raise SPFError(f"--subject: {picture.path} cannot be read as an image: {error}") from None
    return Photos(images, [picture.caption for picture in pictures])
