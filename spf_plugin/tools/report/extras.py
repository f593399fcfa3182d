"""The measures that need another model: each only where it was asked for, and where not, the page says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from spf_plugin.errors import SPFError
from spf_plugin.tools.report import metrics
from spf_plugin.tools.report.dino import Dino
from spf_plugin.tools.report.faces import Faces
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.prompts import Question
from spf_plugin.tools.report.results import Request, Row, Variant
from spf_plugin.tools.report.segmentation import Segmenter, target_classes
from spf_plugin.tools.report.subject import Photos

Show = Callable[[str, int, int], None]


@dataclass
class Extras:
    """The models that measure.

    Attributes:
        clip: for CLIP-I, CLIP-T, KID and FID.
        dino: for DINOv2's drift.
        lpips: for LPIPS.
        faces: for face identity.
        segmenter: for segmentation consistency.
        target_classes: of the segmenter.
        missing: what is not measured -> why.
    """

    clip: metrics.Clip | None = None
    dino: Dino | None = None
    lpips: metrics.Lpips | None = None
    faces: Faces | None = None
    segmenter: Segmenter | None = None
    target_classes: set[int] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)


def load(settings: Request, questions: list[Question], warn: Callable[[str], None]) -> Extras:
    """Everything that shall measure, on the CPU; before anything is drawn, so that a wrong path costs no time.

    A library that cannot be imported leaves its measure out, with a warning.

    Raises:
        SPFError: weights that cannot be used.
    """
    out = Extras()

    def absent(what: str, error: Exception, extra: str = "report") -> None:
        reason = f'{error}: pip install "spf-plugin[{extra}]"' if isinstance(error, ModuleNotFoundError) else str(error)
        out.missing[what] = f"its library cannot be imported: {reason}"
        warn(f"{what} is not measured: {out.missing[what]}")

    if settings.clip:
        out.clip = metrics.Clip(settings.clip)
        n = len(questions) * len(settings.seeds)
        if n < metrics.SET_IMAGES:
            out.missing["KID, FID"] = f"{n} images; they need {metrics.SET_IMAGES} or more (prompts times seeds)"
        else:
            try:
                import torchmetrics.image.fid  # noqa: F401
            except (ImportError, RuntimeError) as error:
                absent("KID, FID", error)
    else:
        out.missing["CLIP-I, CLIP-T, KID, FID"] = "no CLIP model was given (--clip)"
    if settings.dino:
        out.dino = Dino(settings.dino)
        if settings.subject is None:
            out.missing["likeness to the subject"] = "no photos were given (--subject)"
    elif settings.subject is not None:
        raise SPFError("--subject compares pictures with photos by DINOv2. Give the model with --dino.")
    else:
        out.missing["DINOv2 drift, likeness to the subject"] = "no DINOv2 was given (--dino)"
    if settings.lpips:
        try:
            out.lpips = metrics.Lpips(settings.lpips)
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit this torch raises the latter
            absent("LPIPS", error)
    else:
        out.missing["LPIPS"] = "not asked for (--lpips)"
    if settings.faces:
        try:
            out.faces = Faces(settings.faces)
        except ImportError as error:
            absent("face identity", error, "faces")
    else:
        out.missing["face identity"] = "no identity model was given (--faces)"
    if settings.segmentation:
        out.segmenter = Segmenter(settings.segmentation)
        phrases = [question.target.phrase for question in questions]
        out.target_classes = target_classes(out.segmenter.classes, settings.target_class, phrases)
    elif settings.target_class:
        raise SPFError("--target-class names a class of a segmentation model. Give the model with --segmentation.")
    else:
        out.missing["segmentation consistency"] = "no segmentation model was given (--segmentation)"
    return out


def measure(
    extras: Extras, variants: list[Variant], shots: list[tuple[Question, int]], held: HeldOut, photos: Photos,
    device: torch.device, show: Show,
) -> tuple[list[Row], dict[str, str]]:  # fmt: skip
    """The rows, and the hashes of the weights that measured."""
    rows: list[Row] = []
    used: dict[str, str] = {}
    if extras.clip:
        show("CLIP", 0, 1)
        extras.clip.to(device)
        found, features = extras.clip.rows(variants, shots)
        rows += [*found, *extras.clip.change_rows(variants, shots, held)]
        used[f"CLIP {extras.clip.name}"] = extras.clip.digest
        if "KID, FID" not in extras.missing:
            rows += metrics.set_rows(extras.clip, variants, features)
        show("CLIP", 1, 1)
    if extras.dino:
        show("DINOv2", 0, 1)
        extras.dino.to(device)
        rows += extras.dino.rows(variants, held, photos)
        used[f"DINOv2 {extras.dino.name}"] = extras.dino.digest
        show("DINOv2", 1, 1)
    if extras.lpips:
        show("LPIPS", 0, 1)
        extras.lpips.to(device)
        rows += extras.lpips.rows(variants)
        used["AlexNet (LPIPS)"] = extras.lpips.digest
        show("LPIPS", 1, 1)
    if extras.faces:
        show("faces", 0, 1)
        rows += extras.faces.rows(variants)
        used |= extras.faces.digests
        show("faces", 1, 1)
    if extras.segmenter:
        show("segmentation", 0, 1)
        extras.segmenter.to(device)
        rows += extras.segmenter.rows(variants, extras.target_classes, held)
        used[f"segmentation {extras.segmenter.name}"] = extras.segmenter.digest
        show("segmentation", 1, 1)
    return rows, used
