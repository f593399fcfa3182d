"""The data set as the host would see it: subsets, images, and the prompts that the text encoder gets.

The rules are those of sd-scripts' `library/config_util.py` and `train_util.py` (v0.9.1 to v0.11.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_plugin.hosts.kohya.captions import prompts
from spf_plugin.tools.check.findings import Finding


@dataclass(frozen=True)
class Subset:
    """One subset with everything that decides its captions; the names are the host's."""

    image_dir: str | None = None
    metadata_file: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    caption_separator: str = ","
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    shuffle_caption: bool = False
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_step: float = 0.0
    token_warmup_min: int = 1
    cache_info: bool = False
    batch_size: int = 1
    enable_bucket: bool = False
    bucket_reso_steps: int = 64
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return str(self.image_dir or self.metadata_file)


@dataclass(frozen=True)
class Entry:
    """One training image.

    Attributes:
        path: the image.
        name: as it is shown.
        caption: as the host's data set holds it.
        source: where it came from: `file`, `class` (the folder's name or class_tokens), `metadata` or `nothing`.
        subset: the subset.
    """

    path: Path
    name: str
    caption: str
    source: str
    subset: Subset

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the text encoder may be given, without shuffling and dropout; more than one only with wildcards."""
        return prompts(self.caption, self.subset)


@dataclass
class Data:
    """Everything that was read."""

    subsets: list[Subset] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, code: str, message: str, fix: str = "", images: Sequence[str] = ()) -> None:
        self.findings.append(Finding(level, code, message, fix, tuple(images)))
