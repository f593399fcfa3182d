"""The training folder: which images, which captions, and the order in which they are seen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spf_plugin.core import coverage
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.files import CAPTION_BYTES, read_text

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_REPEATS = re.compile(r"^(\d+)_")
_SHOWN = 5


@dataclass(frozen=True)
class Picture:
    """One training image, its caption, and how often an epoch shows it."""

    path: Path
    caption: str
    repeats: int = 1


def _some(items: Sequence[Any]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(str(item) for item in items[:_SHOWN]) + more


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith("."))


def read_folder(folder: Path, option: str = "--data") -> list[Picture]:
    """The images of a folder with their captions, sorted by path.

    Args:
        folder: kohya's layout (`FOLDER/10_name/*.png`, ten repeats each), or images directly in it; every image has a
            caption file of the same name ending in `.txt`.
        option: that named it.

    Raises:
        SPFError: no folder, no images, or images without caption (all of them at once).
    """
    if not os.path.isdir(folder):
        raise SPFError(
            f"{option} {folder}: {'is not a folder' if os.path.exists(folder) else 'there is no such folder'}."
        )
    groups = [(folder, 1)]
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        named = _REPEATS.match(sub.name)
        if named:
            groups.append((sub, int(named.group(1))))
    found = [(path, repeats) for group, repeats in groups for path in _images(group)]
    if not found:
        raise SPFError(
            f"{option} {folder} holds no images ({', '.join(IMAGE_ENDINGS)}). Put them there with a .txt caption "
            "beside each, or in subfolders named by repeats, such as 10_name."
        )
    missing = [path.relative_to(folder) for path, _ in found if not path.with_suffix(".txt").is_file()]
    if missing:
        raise SPFError(
            f"{len(missing)} of {len(found)} images in {folder} have no caption: {_some(missing)}. Write a text file "
            f"of the same name beside each, for example {missing[0].with_suffix('.txt').name}."
        )
    pictures = []
    for path, repeats in found:
        caption = read_text(path.with_suffix(".txt"), CAPTION_BYTES, "utf-8-sig")
        pictures.append(Picture(path, " ".join(caption.split()), repeats))
    if not any(picture.repeats for picture in pictures):
        raise SPFError(f"{option} {folder}: every subfolder is named 0_..., so nothing would be trained.")
    return pictures


def check_targets(
    targets: Sequence[Target],
    captions: Sequence[str],
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int = 0,
) -> tuple[list[str], list[str]]:
    """Why nothing would be learned or preserved, and what is learned of fewer images than it may seem: in the words of
    a run in sd-scripts.

    Args:
        targets: the run's.
        captions: of every image.
        tokenize: text -> token ids without begin, end and padding; None before the model is loaded.
        limit: tokens of text that the text encoder takes.
    """
    if not targets:
        return [
            'no target. Say what the LoRA shall learn, as the captions say it: --target "blonde hair" '
            "(or --plain for a plain LoRA)."
        ], []
    said = coverage.coverage([((caption,), None) for caption in captions], targets, tokenize, limit)
    return coverage.problems(said, targets, limit), coverage.warnings(said, limit)


@dataclass(frozen=True)
class Cropped:
    """A picture at training size: `[3, R, R]` in [-1, 1], and SDXL's size conditioning (original height and width, top,
    left, target height and width)."""

    pixels: Tensor
    sizes: tuple[int, int, int, int, int, int]


def upright(opened: Any) -> Any:
    """A Pillow image as it is meant to be seen, in RGB; transparent ones get a white background."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def load_image(path: Path, resolution: int) -> Cropped:
    """Resize the shorter side to `resolution` and crop the centre. Transparent images get a white background.

    Raises:
        OSError: (or one of Pillow's subclasses and ValueError) the file cannot be read as an image.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        image = upright(opened)
    width, height = image.size
    scale = resolution / min(width, height)
    scaled = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
    array = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()
    return Cropped(pixels, (height, width, top, left, resolution, resolution))


def endless_batches(repeats: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Indices of the pictures in each step's batch: epoch after epoch, each in a new order, with no short batch."""
    epoch = torch.tensor([i for i, count in enumerate(repeats) for _ in range(count)])
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += epoch[torch.randperm(len(epoch), generator=generator)].tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
