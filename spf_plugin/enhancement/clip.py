"""Frozen CLIP encoders for the response term, from open_clip or a transformers folder; imported only when used."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import read_json, shown

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(pixels: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What CLIP's own preprocessing does to an image, differentiable: resize the shorter side (bicubic), crop the
    centre, normalise.

    Args:
        pixels: `[B, 3, H, W]` in [-1, 1]; values outside are clipped, as an image would be.
        size: side of the square that the encoder takes.
        mean: per channel, of pixels in [0, 1].
        std: likewise.

    Returns:
        `[B, 3, size, size]`, float32.
    """
    x = ((pixels.float() + 1) / 2).clamp(0, 1)
    h, w = x.shape[-2:]
    shorter = min(h, w)
    if shorter != size:
        # The longer side is cut off, not rounded, like in both libraries.
        new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
        x = F.interpolate(x, size=new, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        h, w = new
    top, left = (h - size) // 2, (w - size) // 2  # transformers' choice; torchvision rounds an odd rest the other way
    x = x[..., top : top + size, left : left + size]
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


class ClipEncoder(nn.Module):
    """`I` and `T`, frozen, unit norm, in one space.

    Args:
        name: what the user called it.
        model: holds the weights.
        image_features: preprocessed pixels `[B, 3, size, size]` to features `[B, E]`.
        text_features: texts to features `[N, E]`.
        size: side of the square that the image encoder takes.
        mean: of its preprocessing.
        std: of its preprocessing.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        image_features: Callable[[Tensor], Tensor],
        text_features: Callable[[Sequence[str]], Tensor],
        size: int,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ):
        super().__init__()
        self.name, self.size, self.mean, self.std = name, size, tuple(mean), tuple(std)
        self.model = model.requires_grad_(False).eval()
        self._image_features, self._text_features = image_features, text_features

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def image(self, pixels: Tensor) -> Tensor:
        """`I`: pixels `[B, 3, H, W]` in [-1, 1] -> `[B, E]`, float32, unit norm, with graph."""
        x = preprocess(pixels, self.size, self.mean, self.std)
        with torch.autocast(pixels.device.type, enabled=False):
            return F.normalize(self._image_features(x.to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """`T`: `[N, E]`, float32, unit norm."""
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self._text_features(texts).float(), dim=-1)


def load(name: str) -> ClipEncoder:
    """Load an encoder, on the CPU and in float32.

    Args:
        name: a transformers CLIP folder; or open_clip's `MODEL:PRETRAINED`, where PRETRAINED is a tag
            (`ViT-B-32:laion2b_s34b_b79k`, may download) or a local `.safetensors` checkpoint.

    Raises:
        SPFError: it does not exist, is damaged, or its library is not installed; says what to do.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _from_transformers(name, path)
    model, colon, pretrained = name.partition(":")
    if not colon or len(model) == 1 or re.search(r"[/\\]", model):  # C:\... and paths are no open_clip names
        raise SPFError(
            f"spf_clip={name}: there is no such folder. Give a transformers CLIP folder, or open_clip's "
            "MODEL:PRETRAINED, such as ViT-B-32:laion2b_s34b_b79k"
        )
    return _from_open_clip(name, model, pretrained)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _from_transformers(name: str, path: Path) -> ClipEncoder:
    try:
        kind = read_json(path / "config.json").get("model_type")
    except (SPFError, AttributeError) as error:
        raise SPFError(f"spf_clip={name}: the folder has no readable config.json ({_first_line(error)})") from error
    if kind != "clip":
        raise SPFError(f"spf_clip={name} holds a {kind!r} model; a CLIP model with image and text encoder is needed")
    try:
        from transformers import CLIPModel, CLIPTokenizer

        model: Any = CLIPModel.from_pretrained(str(path), use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(str(path))
    except Exception as error:  # whatever transformers, safetensors or json raise on a damaged folder
        raise SPFError(f"spf_clip={name} cannot be loaded: {_first_line(error)}") from error
    mean, std = _preprocessing(name, path)

    def images(x: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)

    def texts(words: Sequence[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(words), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(model.device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return ClipEncoder(
        name,
        model,
        images,
        texts,
        int(model.config.vision_config.image_size),
        mean,
        std,
    )


def _preprocessing(name: str, folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation per channel, of a folder that may say them; looked at here and not at the first step."""
    path = folder / "preprocessor_config.json"
    if not os.path.lexists(path):
        return OPENAI_MEAN, OPENAI_STD
    try:
        said = read_json(path)
    except SPFError as error:
        raise SPFError(f"spf_clip={name} cannot be loaded: {error.problems[0]}") from error
    if not isinstance(said, dict):
        raise SPFError(f"spf_clip={name}: {path.name} is damaged: it has no names. Download the folder again.")
    mean, std = said.get("image_mean", OPENAI_MEAN), said.get("image_std", OPENAI_STD)
    for key, values, least in (("image_mean", mean, -math.inf), ("image_std", std, 0.0)):
        numbers = isinstance(values, list | tuple) and [v for v in values if isinstance(v, int | float) and v > least]
        if not numbers or len(numbers) != 3 or len(values) != 3 or not all(map(math.isfinite, numbers)):
            raise SPFError(
                f"spf_clip={name}: {path.name} is damaged: {key} is {shown(values)}, and must be three numbers, one a "
                "channel. Download the folder again."
            )
    return mean, std


def _from_open_clip(name: str, model_name: str, pretrained: str) -> ClipEncoder:
    try:
        import open_clip
    except ImportError as error:
        if error.name in ("open_clip", None):
            raise SPFError(
                f'spf_clip={name} needs open_clip: pip install "spf-plugin[clip]" (or give a transformers CLIP folder)'
            ) from error
        raise SPFError(
            f"spf_clip={name}: open_clip is installed and cannot be imported: {_first_line(error)}"
        ) from error
    except RuntimeError as error:  # a torchvision that does not fit this torch
        raise SPFError(
            f"spf_clip={name}: open_clip is installed and cannot be imported: {_first_line(error)}"
        ) from error
    if model_name not in open_clip.list_models():
        hint = nearest(model_name, open_clip.list_models())
        raise SPFError(f"spf_clip={name}: open_clip knows no model {model_name!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    local = Path(os.path.expanduser(pretrained))
    if pretrained not in tags:
        if local.suffix != ".safetensors":
            raise SPFError(
                f"spf_clip={name}: {pretrained!r} is neither a .safetensors checkpoint nor one of open_clip's weights "
                f"for {model_name}: {', '.join(tags)}"
            )
        if not local.is_file():
            raise SPFError(f"spf_clip={name}: there is no file {local}")
        pretrained = str(local)
    try:
        model: Any = open_clip.create_model(model_name, pretrained=pretrained, precision="fp32", device="cpu")
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # whatever open_clip, safetensors or the network raise
        raise SPFError(f"spf_clip={name} cannot be loaded: {_first_line(error)}") from error
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size

    def texts(words: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(words)).to(next(model.parameters()).device))

    mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    return ClipEncoder(name, model, model.encode_image, texts, int(size), mean or OPENAI_MEAN, std or OPENAI_STD)
