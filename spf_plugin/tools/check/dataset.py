"""The data set as the host would see it: subsets, images, and the prompts that the text encoder gets.

The rules are those of sd-scripts' `library/config_util.py` and `train_util.py` (v0.9.1 to v0.11.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_plugin.hosts.kohya.captions import prompts
from spf_plugin.tools.check.buckets import Buckets, Size
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import FOLDERS


@dataclass(frozen=True)
class Subset:
    """One subset with everything that decides its images and captions; the names are the host's."""

    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
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
    color_aug: bool = False
    random_crop: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return str(self.image_dir or self.metadata_file)


@dataclass(frozen=True)
class Dataset:
    """Subsets that are trained at one size; the names are the host's.

    Attributes:
        kind: `FOLDERS`, `METADATA` or `MASKS`: of which class the host makes it.
        subsets: in their order.
        label: as it is shown.
        resolution: width and height; None where nobody says it.
    """

    kind: str = FOLDERS
    subsets: tuple[Subset, ...] = ()
    label: str = "the data set"
    resolution: Size | None = None
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    skip_image_resolution: Size | None = None
    validation_split: float = 0.0
    resize_interpolation: str | None = None

    @property
    def sizes(self) -> Buckets | None:
        """What decides the size of an image; None without a resolution."""
        if self.resolution is None:
            return None
        return Buckets(
            self.resolution,
            self.enable_bucket,
            self.min_bucket_reso,
            self.max_bucket_reso,
            self.bucket_reso_steps,
            self.bucket_no_upscale,
        )


@dataclass(frozen=True)
class Entry:
    """One training image.

    Attributes:
        path: the image.
        name: as it is shown.
        caption: as the host's data set holds it.
        source: where it came from: `file`, `class` (the folder's name or class_tokens), `metadata` or `nothing`.
        subset: the subset.
        key: what the host calls it: two images of one name in a data set are one.
        repeats: how often it is shown in an epoch, where that is not what the subset says: regularisation images.
        whole: the host gives all of the caption to the text encoder, line breaks too.
    """

    path: Path
    name: str
    caption: str
    source: str
    subset: Subset
    key: str = ""
    repeats: int | None = None
    whole: bool = False

    @property
    def shown(self) -> int:
        """How often it is shown in an epoch."""
        return self.subset.num_repeats if self.repeats is None else self.repeats

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the text encoder may be given, without shuffling and dropout; more than one only with wildcards."""
        return (self.caption,) if self.whole else prompts(self.caption, self.subset)


@dataclass(frozen=True)
class Count:
    """What one data set comes to.

    Attributes:
        images: training images, without those that `validation_split` holds back.
        repeats: the same with their repeats.
        regular: regularisation images, with their repeats.
        buckets: images with repeats at each size, regularisation images too; None where sizes could not be read.
        batches: steps of an epoch, before any accumulation; None where the buckets are not known.
    """

    images: int
    repeats: int
    regular: int
    buckets: Mapping[Size, int] | None
    batches: int | None


@dataclass
class Data:
    """Everything that was read."""

    datasets: list[Dataset] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def subsets(self) -> list[Subset]:
        return [subset for dataset in self.datasets for subset in dataset.subsets]

    def add(self, level: str, code: str, message: str, fix: str = "", images: Sequence[str] = ()) -> None:
        self.findings.append(Finding(level, code, message, fix, tuple(images)))
