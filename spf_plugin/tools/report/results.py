"""What a report is made of, between measuring and writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spf_plugin.tools.report.held_out import PROMPTS, HeldOut
from spf_plugin.tools.report.maps import Maps
from spf_plugin.tools.report.prompts import Question
from spf_plugin.tools.report.subject import Photos

Images = NDArray[np.uint8]


def _no_images() -> Images:
    return np.zeros((0, 1, 1, 3), np.uint8)


@dataclass(frozen=True)
class Request:
    """One report; the options of `spf report`.

    Attributes:
        model: diffusers folder, hub name or single file.
        loras: one or two LoRA files.
        out: the folder to write.
        prompts: given texts; empty takes the first LoRA's captions.
        target: given target; None takes the first LoRA's.
        seeds: of the samples.
        steps: sampler steps.
        guidance: classifier-free guidance.
        size: side in pixels; None is the model's own.
        weight: of the LoRAs.
        batch: images at a time.
        device: `cpu` or `cuda`; None takes the GPU if there is one.
        dtype: `fp32`, `fp16` or `bf16`; None is fp16 on a GPU.
        clip: a CLIP model to measure with, see `spf_plugin.enhancement.clip.load`.
        dino: a DINOv2 of transformers, folder or hub name; None leaves its drift out.
        lpips: `alex` or a file of AlexNet weights; None leaves LPIPS out.
        faces: a folder with OpenCV's face detector and recogniser; None leaves face identity out.
        segmentation: a segmentation model of transformers; None leaves segmentation consistency out.
        target_class: its classes that are the target, with `|`; None takes those that the target's words say.
        subject: a folder of photos with captions, kept back from training; None leaves the likeness to them out.
        held_out: how many prompts of the bank of those that nobody trained; or a text file with others.
    """

    model: str
    loras: tuple[Path, ...]
    out: Path
    prompts: tuple[str, ...] = ()
    target: str | None = None
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 25
    guidance: float = 7.0
    size: int | None = None
    weight: float = 1.0
    batch: int = 1
    device: str | None = None
    dtype: str | None = None
    clip: str | None = None
    dino: str | None = None
    lpips: str | None = None
    faces: str | None = None
    segmentation: str | None = None
    target_class: str | None = None
    subject: Path | None = None
    held_out: int | Path = PROMPTS


@dataclass(frozen=True)
class Variant:
    """The base model, or the base model with one LoRA.

    Attributes:
        kind: the page's class: `base`, `spf` (the first LoRA) or `plain` (the second).
        label: short, for bars and columns.
        name: of the file or model.
        digest: sha256 of the LoRA file, or of the model's UNet or only file; empty where unknown.
        without: images for the base prompts, one per question and seed, uint8 `[N, H, W, 3]`.
        with_: images for the full prompts.
        maps: one per question; empty for the base model.
        held: images for the held-out prompts, one each, from the first seed.
        held_drift: of the predicted noise for each of these; empty for the base model.
        subject: images for the captions of the kept-back photos, one per photo and seed.
    """

    kind: str
    label: str
    name: str
    digest: str
    without: Images
    with_: Images
    maps: Sequence[Maps] = ()
    held: Images = field(default_factory=_no_images)
    held_drift: Sequence[float] = ()
    subject: Images = field(default_factory=_no_images)


@dataclass(frozen=True)
class Row:
    """One measure: its value for every variant (None where it says nothing).

    Attributes:
        key: its name in `numbers.json`.
        name: what is measured.
        note: how to read it.
        by: what measured it: library, weights, hash, licence.
        n: how many values the mean is over, in words.
        form: format of a value.
        values: one per variant.
        tile: title of its bars on the page; empty for the table only.
        groups: of a row of held-out prompts: group -> one value per variant.
        beside: key of the row that has the same of the trained prompts.
    """

    key: str
    name: str
    note: str
    by: str
    n: str
    form: str
    values: Sequence[float | None]
    tile: str = ""
    groups: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    beside: str = ""


@dataclass(frozen=True)
class Result:
    """Everything the page shows.

    Attributes:
        settings: what was asked for.
        questions: the prompts.
        source: where they come from, one sentence.
        variants: the base model first.
        rows: the measures.
        missing: what was not measured -> why.
        facts: label -> text, at the end of the page.
        hashes: file -> sha256, of everything that was loaded.
        timesteps: of the maps.
        draws: noise samples per timestep.
        notes: warnings, also on the page.
        held: the prompts that nobody trained.
        photos: what was kept back.
    """

    settings: Request
    questions: Sequence[Question]
    source: str
    variants: Sequence[Variant]
    rows: Sequence[Row]
    missing: Mapping[str, str]
    facts: Sequence[tuple[str, str]]
    hashes: Mapping[str, str]
    timesteps: Sequence[int]
    draws: int
    notes: Sequence[str] = field(default=())
    held: HeldOut = field(default_factory=HeldOut)
    photos: Photos = field(default_factory=Photos)

    @property
    def shots(self) -> list[tuple[Question, int]]:
        """Question and seed of every image, in the order of the images."""
        return [(question, seed) for question in self.questions for seed in self.settings.seeds]
