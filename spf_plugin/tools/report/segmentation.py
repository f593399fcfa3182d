"""Segmentation consistency: does the layout of the picture stay, outside of what the LoRA was taught?"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from spf_plugin.errors import SPFError, nearest
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.measures import grouped
from spf_plugin.tools.report.metrics import UNKNOWN_LICENCE, card_licence, weights_digest
from spf_plugin.tools.report.models import from_transformers, short
from spf_plugin.tools.report.results import Images, Row, Variant

Labels = NDArray[np.int64]


class Segmenter:
    """A segmentation model of transformers, with what the page must say about it.

    Args:
        name: a folder, or a hub name.

    Raises:
        ImportError: transformers is not installed.
        SPFError: it cannot be loaded.
    """

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        with from_transformers("--segmentation", name, "semantic segmentation model", "a face parsing SegFormer"):
            self._processor: Any = AutoImageProcessor.from_pretrained(name)
            self._model: Any = AutoModelForSemanticSegmentation.from_pretrained(name, use_safetensors=True).eval()
        self.name, self.device = name, torch.device("cpu")
        self.classes: dict[int, str] = {int(i): str(label) for i, label in self._model.config.id2label.items()}
        self.digest = weights_digest(name, self._model)
        licence = card_licence(name) or UNKNOWN_LICENCE
        self.by = f"{type(self._model).__name__} {Path(name).name} {short(self.digest)}, licence {licence}"

    def to(self, device: torch.device) -> None:
        """Where it runs from now on."""
        self._model, self.device = self._model.to(device), device

    @torch.no_grad()
    def labels(self, images: Images) -> Labels:
        """The class of every pixel, `[N, H, W]`."""
        out = []
        for image in images:
            inputs = self._processor(images=image, return_tensors="pt").to(self.device)
            scores = F.interpolate(self._model(**inputs).logits.float(), size=image.shape[:2], mode="bilinear")
            out.append(scores.argmax(dim=1)[0].cpu().numpy())
        return np.stack(out)

    def rows(self, variants: Sequence[Variant], left_out: Collection[int], held: HeldOut) -> list[Row]:
        """Mean IoU with the base model's images for the base prompts, and for the held-out ones.

        Args:
            variants: the base model first.
            left_out: the target's classes; they may change where the target is asked for.
            held: the held-out prompts; with none of them their row is left out.
        """
        base = self.labels(variants[0].without)
        without = [consistency(self.labels(v.without), base, ()) for v in variants[1:]]
        with_ = [consistency(self.labels(v.with_), base, left_out) for v in variants]
        names = ", ".join(f"“{self.classes[i]}”" for i in sorted(left_out))
        where = f"outside {names}" if names else "everywhere: no class is the target's (--target-class)"
        note, n = "mean IoU; 1 is the base model's segmentation", f"{len(base)} images"
        rows = [
            Row("segmentation_without", "segmentation, target not asked for", note, self.by, n, "{:.3f}",
                [None, *without], "Layout kept when not asked"),
            Row("segmentation_with", "segmentation, target asked for", f"{note}; {where}", self.by, n, "{:.3f}", with_),
        ]  # fmt: skip
        if held.texts:
            labels = {v.label: self.labels(v.held) for v in variants}
            reference = labels[variants[0].label]
            row = grouped(
                "segmentation_held_out", "segmentation, held-out prompts", note, self.by, f"{len(held.texts)} images",
                "{:.3f}", variants, held,
                lambda v, chosen: consistency(labels[v.label][chosen], reference[chosen], ()), "Layout kept",
                "segmentation_without",
            )  # fmt: skip
            rows.append(row)
        return rows


def target_classes(classes: Mapping[int, str], wanted: str | None, phrases: Sequence[str]) -> set[int]:
    """The classes of a segmentation model that belong to the target.

    Args:
        classes: number -> name.
        wanted: names with `|` (`--target-class`), or None for those that the phrases say.
        phrases: of the targets: "blonde hair" says "hair".

    Raises:
        SPFError: a wanted name is no class of the model.
    """
    spoken = {i: name.lower().replace("_", " ") for i, name in classes.items()}
    if wanted is None:
        said = " | ".join(phrases).lower().replace("_", " ")
        return {i for i, name in spoken.items() if re.search(rf"\b{re.escape(name)}(?:s|es)?\b", said)}
    asked = [word.strip().lower().replace("_", " ") for word in wanted.split("|") if word.strip()]
    unknown = [word for word in asked if word not in spoken.values()]
    if unknown or not asked:
        hint = nearest(unknown[0], spoken.values()) if unknown else ""
        raise SPFError(
            f"--target-class {wanted!r}: the segmentation model has no such class{hint or '.'} "
            f"Its classes: {', '.join(spoken.values())}."
        )
    return {i for i, name in spoken.items() if name in asked}


def mean_iou(labels: Labels, reference: Labels, left_out: Collection[int]) -> float:
    """Mean over the classes that occur of what two segmentations share; NaN where nothing is left to compare.

    Args:
        labels: `[H, W]`.
        reference: likewise.
        left_out: pixels of these classes, in either, do not count.
    """
    counted = ~np.isin(labels, list(left_out)) & ~np.isin(reference, list(left_out))
    a, b = labels[counted], reference[counted]
    size = 1 + max(int(a.max(initial=0)), int(b.max(initial=0)))
    both = np.bincount(a[a == b], minlength=size)
    either = np.bincount(a, minlength=size) + np.bincount(b, minlength=size) - both
    return float((both[either > 0] / either[either > 0]).mean()) if counted.any() else float("nan")


def consistency(labels: Labels, reference: Labels, left_out: Collection[int]) -> float | None:
    """The mean of `mean_iou` over pairs of images; None where no pair has anything to compare."""
    values = [mean_iou(a, b, left_out) for a, b in zip(labels, reference, strict=True)]
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None
