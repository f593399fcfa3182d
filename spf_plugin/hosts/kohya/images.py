"""The images of a data set, as far as they are known before training: what a run and `spf check` look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spf_plugin.files import read_json, read_toml
from spf_plugin.hosts.kohya.captions import dropout, prompts, taken

CUSTOM_TARGET = "spf_target"  # in a subset's custom_attributes: its own targets
TEXT_CACHE = "_te_outputs.npz"  # after an image's name: both releases' cache of its caption's encoding


def subset_of(dataset: Any, key: str) -> Any:
    """The subset of an image in a data set of the host; None where the data set does not say it.

    With masks (`conditioning_data_dir`) the data set is a ControlNetDataset, which leaves all but the masks to another.
    """
    for holder in (dataset, getattr(dataset, "dreambooth_dataset_delegate", None)):
        subset = getattr(holder, "image_to_subset", {}).get(key)
        if subset is not None:
            return subset
    return None


def dropped_targets(args: Any) -> list[str]:
    """The targets that subsets of a dataset TOML name and the host drops: a ControlNetDataset has no custom_attributes.

    Read from the file, because the data set has nothing of them any more.
    """
    path = str(getattr(args, "dataset_config", None) or "")
    if not os.path.isfile(path):
        return []
    try:
        config = (read_json if path.lower().endswith(".json") else read_toml)(Path(path))
        found = []
        for dataset in config.get("datasets", []):
            subsets = dataset.get("subsets", [])
            if subsets and all("conditioning_data_dir" in subset for subset in subsets):
                levels = (config.get("general", {}), dataset, *subsets)
                found += [level.get("custom_attributes", {}).get(CUSTOM_TARGET) for level in levels]
    except (ValueError, LookupError, TypeError, AttributeError):  # not the shape that the host takes
        return []
    return list(dict.fromkeys(map(str, filter(None, found))))


@dataclass(frozen=True)
class Image:
    """One image of a data set, and what its subset makes of its caption.

    Attributes:
        prompts: what the text encoder may be given, without shuffling and dropout.
        captions: what its caption file or metadata says, which is what the host encodes when it caches text.
        is_reg: a regularisation image.
        path: the image; empty where a data set of the user's own class does not say it.
        caption_extension: of its caption file.
        metadata: the file that its caption is from, where that is no caption file.
        framed: its subset has a caption_prefix or caption_suffix.
        taken: what tag dropout and token warm-up may leave of it (`captions.taken`).
        dropout: the share of steps in which its caption is left out.
        kept: its caption is from the file that `cache_info` keeps.
        wildcards: its subset has enable_wildcard.
        target: the subset's own `spf_target` as it is written, or None.
    """

    prompts: tuple[str, ...]
    captions: tuple[str, ...] = ()
    is_reg: bool = False
    path: str = ""
    caption_extension: str = ""
    metadata: str = ""
    framed: bool = False
    taken: tuple[tuple[str, str], ...] = ()
    dropout: float = 0.0
    kept: bool = False
    wildcards: bool = False
    target: str | Sequence[str] | None = None

    @classmethod
    def of(cls, captions: Sequence[str], subset: Any, *, is_reg: bool, path: str) -> Image:
        """An image as a data set holds it.

        Args:
            captions: what its caption file or metadata says; several where the host draws one of them.
            subset: the host's, or anything with (some of) its attributes.
            is_reg: a regularisation image.
            path: the image, or empty.
        """
        return cls(
            tuple(text for caption in captions for text in prompts(caption, subset)),
            tuple(captions),
            is_reg,
            path,
            getattr(subset, "caption_extension", None) or "",
            getattr(subset, "metadata_file", None) or "",
            any(getattr(subset, f"caption_{end}", None) for end in ("prefix", "suffix")),
            tuple(pair for caption in captions for pair in taken(caption, subset)),
            dropout(subset),
            bool(getattr(subset, "cache_info", False)) and not getattr(subset, "metadata_file", None),
            bool(getattr(subset, "enable_wildcard", False)),
            (getattr(subset, "custom_attributes", None) or {}).get(CUSTOM_TARGET) or None,
        )

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def source(self) -> str:
        """The file that its caption should be from."""
        return self.metadata or os.path.splitext(self.path)[0] + self.caption_extension

    def cache(self, ending: str = TEXT_CACHE) -> str:
        """Where the host keeps the encoding of its caption; `ending` is that of the trainer's files."""
        return os.path.splitext(self.path)[0] + ending if self.path else ""
