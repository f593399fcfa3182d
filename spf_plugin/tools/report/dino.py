"""Drift by DINOv2, as PEFT's comparison of image generation measures it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.measures import grouped
from spf_plugin.tools.report.metrics import UNKNOWN_LICENCE, card_licence, weights_digest
from spf_plugin.tools.report.models import from_transformers, short
from spf_plugin.tools.report.results import Row, Variant
from spf_plugin.tools.report.subject import Photos

_KINDS = ("dinov2", "dinov2_with_registers")
_META = "facebook/dinov2-"  # its hub names; their model cards say Apache-2.0
_UNUSED = "mask_token"  # for its own training only


class Dino:
    """A DINOv2 of transformers, with what the page must say about it.

    Args:
        name: a folder, or a hub name such as `facebook/dinov2-base`.

    Raises:
        ImportError: transformers is not installed.
        SPFError: it cannot be loaded.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        with from_transformers("--dino", name, "DINOv2", "facebook/dinov2-base"):
            kind = AutoConfig.from_pretrained(name).model_type
            if kind not in _KINDS:
                raise ValueError(f"it is a {kind}")
            self._processor: Any = AutoImageProcessor.from_pretrained(name)
            self._model: Any
            self._model, loading = AutoModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
            lacking = [key for key in loading["missing_keys"] if not key.endswith(_UNUSED)]
            if lacking:
                raise ValueError(f"its weights lack {lacking[0]}")
        self._model.eval()
        self.name, self.device = name, torch.device("cpu")
        self.digest = weights_digest(name, self._model)
        licence = card_licence(name) or ("Apache-2.0" if name.startswith(_META) else UNKNOWN_LICENCE)
        self.by = f"{type(self._model).__name__} {Path(name).name} {short(self.digest)}, licence {licence}"

    def to(self, device: torch.device) -> None:
        """Where it runs from now on."""
        self._model, self.device = self._model.to(device), device

    @torch.no_grad()
    def features(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Tensor:
        """The class token behind the last norm, of unit length: `[N, E]` float32 on the CPU.

        Args:
            images: uint8 `[H, W, 3]` each; resized, cut and scaled by the model's own image processor.
        """
        out = []
        for image in images:
            inputs = self._processor(images=image, return_tensors="pt").to(self.device)
            out.append(F.normalize(self._model(**inputs).last_hidden_state[:, 0].float(), dim=-1).cpu())
        return torch.cat(out)

    def rows(self, variants: Sequence[Variant], held: HeldOut, photos: Photos) -> list[Row]:
        """`(1 - cos) / 2` of the base model's images and a LoRA's, same prompt and seed; `cos` of photos and images.

        Args:
            variants: the base model first.
            held: the held-out prompts; with none of them their row is left out.
            photos: likewise.
        """
        without = [self.features(v.without) for v in variants]
        note = "(1 − cos) / 2 of the images' features; 0 is the base model's image; less is better"
        values = [None, *(drift(features, without[0]) for features in without[1:])]
        n = f"{len(variants[0].without)} images"
        rows = [Row("dino_without", "DINOv2 drift, target not asked for", note, self.by, n, "{:.3f}", values)]
        if held.texts:
            features = {v.label: self.features(v.held) for v in variants}
            base = features[variants[0].label]
            row = grouped(
                "dino_held_out", "DINOv2 drift, held-out prompts", f"{note}; PEFT's “drift”", self.by,
                f"{len(held.texts)} images", "{:.3f}", variants, held,
                lambda v, chosen: drift(features[v.label][chosen], base[chosen]), "DINOv2 drift", "dino_without",
            )  # fmt: skip
            rows.append(row)
        if photos.images:
            known = self.features(photos.images)
            cosines: list[float | None] = [subject(self.features(v.subject), known) for v in variants]
            n = f"{len(variants[0].subject)} images of {len(photos.images)} photos' captions"
            rows.append(
                Row("dino_subject", "DINOv2 likeness to the kept-back photos", "cosine; more is better", self.by, n,
                    "{:.3f}", cosines, "Likeness to the subject (DINOv2)")
            )  # fmt: skip
        return rows


def drift(features: Tensor, reference: Tensor) -> float:
    """`(1 - mean cos) / 2`, 0 to 1.

    Args:
        features: `[N, E]`, unit norm.
        reference: likewise.
    """
    return (1 - float((features * reference).sum(dim=-1).mean())) / 2


def subject(features: Tensor, photos: Tensor) -> float:
    """Mean cosine of images with the photo whose caption they were drawn for.

    Args:
        features: `[P * S, E]`, unit norm, all S images of a photo in a row.
        photos: `[P, E]`, unit norm.
    """
    return float((features * photos.repeat_interleave(len(features) // len(photos), dim=0)).sum(dim=-1).mean())
