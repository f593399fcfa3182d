"""CLIP-I, CLIP-T, KID and FID on CLIP features, and LPIPS. Each library is imported when used."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin.enhancement import clip
from spf_plugin.errors import SPFError
from spf_plugin.files import expanded
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.measures import grouped
from spf_plugin.tools.report.models import sha256, short
from spf_plugin.tools.report.prompts import Question
from spf_plugin.tools.report.results import Images, Row, Variant

SET_IMAGES = 50  # with fewer, KID's and FID's own spread is larger than what they tell
_BATCH = 16
UNKNOWN_LICENCE = "not recorded with these weights"
#: Licences of open_clip's weights by the beginning of their tag, as their model cards state them.
_LICENCES = {"laion": "MIT", "openai": "MIT", "datacomp": "MIT", "commonpool": "MIT"}


def pixels(images: Images, device: torch.device) -> Tensor:
    """uint8 `[N, H, W, 3]` as float32 `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def weights_digest(name: str, model: nn.Module) -> str:
    """Of the weight file where it is known, else of the loaded tensors.

    Args:
        name: a folder, a hub name, or open_clip's `MODEL:PRETRAINED`.
        model: what was loaded from it.
    """
    path = expanded(name)
    for file in (path / "model.safetensors", expanded(name.rpartition(":")[2])):
        if file.is_file():
            return sha256(file)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def card_licence(name: str) -> str:
    """What the model card beside the weights says; empty where there is none.

    Args:
        name: a folder, or a hub name whose files lie in the hub's cache.
    """
    card: Path | None = expanded(name) / "README.md"
    if not expanded(name).exists():
        card = _cached_card(name)
    if card is None or not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    found = dict(re.findall(r"^(license(?:_name)?):\s*(\S+)", text, re.MULTILINE))
    return found.get("license_name") or found.get("license", "")


def _cached_card(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "README.md")
    except HFValidationError:
        return None  # not a hub name
    return Path(found) if isinstance(found, str) else None


class Clip:
    """A CLIP model that measures, with what the page must say about it.

    Args:
        name: see `spf_plugin.enhancement.clip.load`.

    Raises:
        SPFError: it cannot be loaded.
    """

    def __init__(self, name: str):
        self.name, self.encoder = name, clip.load(name)
        self.device = torch.device("cpu")
        self.digest = weights_digest(name, self.encoder)
        self.by = f"CLIP {Path(name).name} {short(self.digest)}, licence {clip_licence(name)}"

    def to(self, device: torch.device) -> None:
        """Where it runs from now on."""
        self.encoder, self.device = self.encoder.to(device), device

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

    def change_rows(
        self, variants: Sequence[Variant], shots: Sequence[tuple[Question, int]], held: HeldOut
    ) -> list[Row]:
        """Change of CLIP-T: how much more the images say of a prompt without the target than the base model's.

        In hundredths of a cosine, as PureCC (arXiv 2603.07561) writes CLIP-T.
        """

        def per_image(images: Sequence[Images], texts: Sequence[str]) -> list[Tensor]:
            said = self.texts(texts)
            scores = [100 * (self.images(one) * said).sum(dim=1) for one in images]
            return [score - scores[0] for score in scores]

        note = "0 is the base model's; below it, less of the prompt is in the picture"
        asked = per_image([v.without for v in variants], [question.base for question, _ in shots])
        values: list[float | None] = [None, *(float(change.mean()) for change in asked[1:])]
        rows = [
            Row("clip_t_change", "change of CLIP-T, target not asked for", note, self.by, f"{len(shots)} images",
                "{:+.2f}", values),
        ]  # fmt: skip
        if held.texts:
            changes = per_image([v.held for v in variants], held.texts)
            of = {v.label: change for v, change in zip(variants, changes, strict=True)}
            row = grouped(
                "clip_t_change_held_out", "change of CLIP-T, held-out prompts", note, self.by,
                f"{len(held.texts)} images", "{:+.2f}", variants, held,
                lambda v, chosen: float(of[v.label][chosen].mean()), "Change of CLIP-T", "clip_t_change",
            )  # fmt: skip
            rows.append(row)
        return rows


def clip_licence(name: str) -> str:
    """The licence of a CLIP model's weights, or that it must be looked up."""
    said = card_licence(name)
    if said:
        return said
    tag = name.rpartition(":")[2].lower()
    known = next((licence for start, licence in _LICENCES.items() if tag.startswith(start)), "")
    return known or UNKNOWN_LICENCE


class _AsTheyAre(nn.Identity):
    """Tells torchmetrics that features come in, and how wide they are."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width


def set_rows(measure: Clip, variants: Sequence[Variant], features: Sequence[Tensor]) -> list[Row]:
    """KID and FID between the base model's images and a LoRA's, both for the base prompts, on CLIP features.

    Args:
        measure: whose features they are.
        variants: the base model first.
        features: `[N, E]` each, N at least `SET_IMAGES`.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    n, width = features[0].shape
    kids: list[float | None] = [None]
    fids: list[float | None] = [None]
    for one in features[1:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps all features in memory
            kid: Any = KernelInceptionDistance(feature=_AsTheyAre(width), subsets=20, subset_size=n // 2)
        fid: Any = FrechetInceptionDistance(feature=_AsTheyAre(width))
        for metric in (kid, fid):
            metric.update(features[0].double(), real=True)
            metric.update(one.double(), real=False)
        torch.manual_seed(0)  # KID draws its subsets from the global generator
        kids.append(float(kid.compute()[0]))
        fids.append(float(fid.compute()))
    by = f"torchmetrics {version('torchmetrics')} (Apache-2.0), on {width} features of {measure.by}"
    count, what = f"{n} images each", "target not asked for"
    return [
        Row("kid_clip", f"KID on CLIP features, {what}", "0 is the base model's distribution", f"{by}; cubic kernel",
            count, "{:.5f}", kids),
        Row("fid_clip", f"FID on CLIP features, {what}",
            f"{n} images are few, which raises it: for this page's columns only, not for other papers' FID", by,
            count, "{:.4f}", fids),
    ]  # fmt: skip


class Lpips:
    """LPIPS with AlexNet.

    Args:
        weights: `alex`, torchvision's (its cache, or a download), or a `.safetensors` file with the same names.

    Raises:
        ImportError: lpips or torchvision is not installed.
        SPFError: the file cannot be used.
    """

    def __init__(self, weights: str):
        import lpips

        local = expanded(weights) if weights != "alex" else None
        self.net: Any = lpips.LPIPS(net="alex", pnet_rand=local is not None, verbose=False).eval()
        self.device = torch.device("cpu")
        if local is not None:
            _load_alexnet(self.net, local)
        self.digest = sha256(local) if local else weights_digest("", self.net.net)
        self.by = (
            f"lpips {version('lpips')} (BSD-2-Clause), AlexNet {local.name if local else 'of torchvision'} "
            f"{short(self.digest)}, licence "
            f"{UNKNOWN_LICENCE if local else 'BSD-3-Clause, trained on ImageNet'}"
        )

    def to(self, device: torch.device) -> None:
        """Where it runs from now on."""
        self.net, self.device = self.net.to(device), device

    @torch.no_grad()
    def _distance(self, a: Images, b: Images) -> float:
        pairs = zip(a, b, strict=True)
        values = [self.net(pixels(x[None], self.device), pixels(y[None], self.device)).mean() for x, y in pairs]
        return float(torch.stack(values).mean())

    def rows(self, variants: Sequence[Variant]) -> list[Row]:
        """Of the images with the base model's for the base prompts."""
        base = variants[0]

        def row(key: str, name: str, note: str, values: Sequence[float | None]) -> Row:
            return Row(key, name, note, self.by, f"{len(base.without)} images", "{:.4f}", values)

        unasked = [None, *(self._distance(v.without, base.without) for v in variants[1:])]
        asked = [self._distance(v.with_, base.without) for v in variants]
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
