"""A data set of musubi-tuner, as far as SPF looks at one: plain data, of the host's own objects or of its TOML."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """An image or a video.

    Attributes:
        path: what the host calls it; the name in it, without its ending, is that of its cached text.
        caption: all that the text encoder is given.
    """

    path: str
    caption: str

    @property
    def stem(self) -> str:
        return os.path.splitext(os.path.basename(self.path))[0]


@dataclass(frozen=True)
class Dataset:
    """One `[[datasets]]`.

    Attributes:
        items: in the host's order.
        label: as it is shown.
        video: it is of videos.
        control: it has control images or videos.
        multiple_target: an item may be several images.
        one_frame: settings of one-frame training (`fp_1f_...`).
        cache: the folder of its latents and text; empty where it is looked at elsewhere.
        batch_size: samples of a step.
    """

    items: tuple[Item, ...] = ()
    label: str = "[[datasets]] 1"
    video: bool = False
    control: bool = False
    multiple_target: bool = False
    one_frame: tuple[str, ...] = ()
    cache: str = ""
    batch_size: int = 1

    @property
    def captions(self) -> list[str]:
        return [item.caption for item in self.items]


#: Settings of a data set for one-frame training, which begins with an image.
ONE_FRAME = ("fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post")


def of_host(group: Any) -> list[Dataset]:
    """The data sets of the host's group, as it would cache their captions now.

    Raises:
        OSError: a caption file is gone.
    """
    return [_of_host(dataset, f"[[datasets]] {i}") for i, dataset in enumerate(group.datasets, 1)]


def _of_host(dataset: Any, label: str) -> Dataset:
    return Dataset(
        tuple(_items(dataset.datasource)),
        label,
        hasattr(dataset, "target_frames"),
        bool(dataset.has_control),
        bool(getattr(dataset, "multiple_target", False)),
        tuple(name for name in ONE_FRAME if getattr(dataset, name, None)),
        str(dataset.cache_directory or ""),
        int(dataset.batch_size),
    )


def _items(source: Any) -> Iterator[Item]:
    for i in range(len(source)):
        path, caption = source.get_caption(i)
        yield Item(str(path), str(caption))


def in_one_cache(datasets: Sequence[Dataset]) -> list[tuple[Dataset, Dataset]]:
    """Data sets whose cache is one folder, by whatever names."""
    first: dict[str, Dataset] = {}
    pairs = ((first.setdefault(os.path.realpath(each.cache), each), each) for each in datasets if each.cache)
    return [(one, other) for one, other in pairs if one is not other]


def clashes(datasets: Sequence[Dataset]) -> list[tuple[str, str]]:
    """Items that share one file of cached text: pairs of their paths, by data set."""
    found = []
    for dataset in datasets:
        first: dict[str, str] = {}
        for item in dataset.items:
            other = first.setdefault(item.stem, item.path)
            if other != item.path:
                found.append((other, item.path))
    return found
