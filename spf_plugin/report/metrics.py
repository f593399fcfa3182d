"""Measures that need another model: CLIP-I, CLIP-T, KID on CLIP features, LPIPS. Each library is imported when used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin import clip
from spf_plugin.errors import SPFError
from spf_plugin.report.models import sha256, short
from spf_plugin.report.prompts import Question
from spf_plugin.report.results import Images, Row, Variant

KID_IMAGES = 50  # fewer and its own spread is larger than what it tells
FID_IMAGES = 2048
EXTRA = 'pip install "spf-plugin[report]"'
_BATCH = 16
#: Licences of open_clip's weights by the beginning of their tag, as their model cards state them.
_LICENCES = {"laion": "MIT", "openai": "MIT", "datacomp": "MIT", "commonpool": "MIT"}


def pixels(images: Images, device: torch.device) -> Tensor:
    """uint8 `[N, H, W, 3]` as float32 `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class Clip:
    """A CLIP model that measures, with what the page must say about it.

    Args:
        name: see `spf_plugin.clip.load`.
        device: where it runs.

    Raises:
        SPFError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device):
        self.encoder = clip.load(name).to(device)
        self.name, self.device = name, device
        self.digest = _clip_digest(name, self.encoder)
        self.by = f"CLIP {Path(name).name} {short(self.digest)}, licence {clip_licence(name)}"

    @torch.no_grad()
    def images(self, images: Images) -> Tensor:
        """Features `[N, E]`, unit norm, float32 on the CPU."""
        parts = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        return torch.cat([self.encoder.image(pixels(part, self.device)).cpu() for part in parts])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features `[N, E]`, unit norm, float32 on the CPU."""
        return self.encoder.text(texts).cpu()

    def rows(
        self, variants: Sequence[Variant], shots: Sequence[tuple[Question, int]]
    ) -> tuple[list[Row], list[Tensor]]:
        """CLIP-I and CLIP-T, cosines; and every variant's features of its images without the target."""
        without = [self.images(v.without) for v in variants]
        with_ = [self.images(v.with_) for v in variants]
        full = self.texts([question.full for question, _ in shots])
        target = self.texts([question.target.phrase.replace("_", " ") for question, _ in shots])

        def cosine(a: Tensor, b: Tensor) -> float:
            return float((a * b).sum(dim=1).mean())

        def row(key: str, name: str, note: str, values: Sequence[float | None], tile: str = "") -> Row:
            return Row(key, name, note, self.by, f"{len(shots)} images", "{:.3f}", values, tile)

        unasked = [None, *(cosine(f, without[0]) for f in without[1:])]
        rows = [
            row("clip_i_without", "CLIP-I, target not asked for", "1 is the base model's image", unasked),
            row(
                "clip_i_with", "CLIP-I, target asked for", "likeness to the base model's image",
                [cosine(f, without[0]) for f in with_],
            ),
            row("clip_t_prompt", "CLIP-T, image and whole prompt", "more is better", [cosine(f, full) for f in with_]),
            row(
                "clip_t_target", "CLIP-T, image and target", "more is better", [cosine(f, target) for f in with_],
                "Likeness of image and target (CLIP-T)",
            ),
        ]  # fmt: skip
        return rows, without


def _clip_digest(name: str, encoder: nn.Module) -> str:
    """Of the weight file where it is known, else of the loaded tensors."""
    path = Path(name).expanduser()
    for file in (path / "model.safetensors", Path(name.rpartition(":")[2]).expanduser()):
        if file.is_file():
            return sha256(file)
    digest = hashlib.sha256()
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def clip_licence(name: str) -> str:
    """The licence of a CLIP model's weights, or that it must be looked up."""
    card = Path(name).expanduser() / "README.md"
    if card.is_file():
        found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found.group(1)
    tag = name.rpartition(":")[2].lower()
    known = next((licence for start, licence in _LICENCES.items() if tag.startswith(start)), "")
    return known or "not recorded with these weights; ask where they come from"


def kid_row(measure: Clip, variants: Sequence[Variant], features: Sequence[Tensor]) -> Row:
    """Kernel distance between the base model's images and a LoRA's, both for the base prompts, on CLIP features.

    Args:
        measure: whose features they are.
        variants: the base model first.
        features: `[N, E]` each, N at least `KID_IMAGES`.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    n = len(features[0])
    values: list[float | None] = [None]
    for one in features[1:]:
        kid: Any = KernelInceptionDistance(feature=nn.Identity(), subsets=20, subset_size=n // 2)
        torch.manual_seed(0)  # it draws its subsets from the global generator
        kid.update(features[0], real=True)
        kid.update(one, real=False)
        values.append(float(kid.compute()[0]))
    by = f"torchmetrics {version('torchmetrics')}, cubic kernel on features of {measure.by}"
    return Row(
        "kid_clip", "KID on CLIP features, target not asked for", "0 is the base model's distribution", by,
        f"{n} images each", "{:.5f}", values,
    )  # fmt: skip


def lpips_rows(weights: str, variants: Sequence[Variant], device: torch.device) -> list[Row]:
    """LPIPS (AlexNet) of the images with the base model's for the base prompts.

    Args:
        weights: `alex`, torchvision's (its cache, or a download), or a `.safetensors` file with the same names.
        variants: the base model first.
        device: where it runs.

    Raises:
        ImportError: lpips or torchvision is not installed.
        SPFError: the file cannot be used.
    """
    import lpips

    local = Path(weights).expanduser() if weights != "alex" else None
    net: Any = lpips.LPIPS(net="alex", pnet_rand=local is not None, verbose=False)
    if local is not None:
        _load_alexnet(net, local)
    net = net.to(device).eval()
    digest = hashlib.sha256()
    for key, tensor in sorted(net.net.state_dict().items()):
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    shown = f"file {short(sha256(local))}" if local else f"tensors {short(digest.hexdigest())}"
    by = (
        f"lpips {version('lpips')} (BSD-2-Clause), AlexNet {local.name if local else 'of torchvision'}, {shown}, "
        f"licence {'not recorded with these weights' if local else 'BSD-3-Clause, trained on ImageNet'}"
    )

    @torch.no_grad()
    def distance(a: Images, b: Images) -> float:
        values = [net(pixels(x[None], device), pixels(y[None], device)).mean() for x, y in zip(a, b, strict=True)]
        return float(torch.stack(values).mean())

    def row(key: str, name: str, note: str, values: Sequence[float | None]) -> Row:
        return Row(key, name, note, by, f"{len(base.without)} images", "{:.4f}", values)

    base = variants[0]
    unasked = [None, *(distance(v.without, base.without) for v in variants[1:])]
    asked = [distance(v.with_, base.without) for v in variants]
    return [
        row("lpips_without", "LPIPS, target not asked for", "0 is the base model's image; less is better", unasked),
        row("lpips_with", "LPIPS, target asked for", "the target itself is a part of it", asked),
    ]


def _load_alexnet(net: Any, path: Path) -> None:
    """torchvision's AlexNet into the trunk of LPIPS, which cuts it into slices and keeps the layers' numbers."""
    from safetensors import SafetensorError  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        own = net.net.state_dict()  # slice3.6.weight for features.6.weight
        net.net.load_state_dict({key: tensors["features." + key.split(".", 1)[1]] for key in own})
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise SPFError(
            f"--lpips {path}: not AlexNet's weights as .safetensors with torchvision's names ({error}). Save "
            'torchvision.models.alexnet(weights="DEFAULT").state_dict() with safetensors, or give --lpips alex.'
        ) from error
