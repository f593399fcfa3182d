"""Which kind of base model a run trains: SD 1.x, SD 2.x or SDXL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import CONFIG_BYTES, read_json, read_text
from spf_plugin.tools.check.host_options import SDXL_ONLY
from spf_plugin.tools.check.tokens import hub_snapshots

MODELS = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of what cross-attention reads
_TO_KEY = re.compile(r"(?:input|down)_blocks\..*\.attn2\.to_k\.weight")
_ENDING = re.compile(r"\.(?:safetensors|ckpt|pt|bin)$")
# The publishers' own names, whole.
_PUBLISHED = {
    "sdxl": re.compile(r"(?:sd_?xl|stable-diffusion-xl)[-_]base[-_.0-9a-z]*"),
    "sd2": re.compile(r"stable-diffusion-2(?:-1)?(?:-base)?|v2-[01]_(?:512|768)[-_.0-9a-z]*"),
    "sd1": re.compile(r"stable-diffusion-v1-[1-5]|(?:sd-)?v1-[1-5](?:-pruned)?(?:-emaonly)?(?:[-_.]fp16)?"),
}
# What names of other models often say. None of SD 2.x: it needs the host's `v2`, and a "v2.1" is mostly something else.
_OFTEN = {
    "sdxl": re.compile(r"sd_?xl|stable-diffusion-xl|xl(?![a-z])|xl(?=v\d)"),
    "sd1": re.compile(
        r"sd[-_]?v?1(?:[-_.]?[1-5])?(?![\d.])|v1[-_.][45](?!\d)|stable-diffusion-v1|(?<![\d.])1[-.][45](?![\d.])"
    ),
}


@dataclass(frozen=True)
class Family:
    """A kind of base model.

    Attributes:
        name: `sd1`, `sd2`, `sdxl`, or empty where nothing tells it.
        guess: what it was guessed from; empty where it is certain.
    """

    name: str
    guess: str = ""

    @property
    def certain(self) -> str:
        """The name, but empty where it is a guess."""
        return "" if self.guess else self.name


def of_model(model: str) -> str:
    """What a model itself says: a .safetensors file, a diffusers folder, or one in the hub's cache; else empty."""
    path = Path(model)
    if path.suffix == ".safetensors" and os.path.isfile(path):
        from spf_plugin.lorafile.reader import read_header  # imports torch

        try:
            tensors = read_header(path).tensors
        except SPFError:  # the run says what is wrong with it
            return ""
        widths = (info.shape[-1] for key, info in tensors.items() if info.shape and _TO_KEY.search(key))
        return next((_BY_CONTEXT.get(width, "") for width in widths), "")
    folders = [path] if os.path.isdir(path) else hub_snapshots(model) if "/" in model else []
    for folder in folders:
        try:
            width = read_json(folder / "unet" / "config.json")["cross_attention_dim"]
            return _BY_CONTEXT.get(width if isinstance(width, int) else width[0], "")
        except (ValueError, LookupError, TypeError):
            continue
    return ""


def _named(text: str) -> str:
    return next((family for family, pattern in _OFTEN.items() if pattern.search(text.lower())), "")


def _script(text: str) -> str:
    """Which script the comments of a file start: of `train_network.py` SD 2.x needs an option, which it has not."""
    scripts = set(re.findall(r"\b(?:sdxl_)?train_network\.py\b", text))
    return "" if len(scripts) != 1 else "sdxl" if scripts.pop().startswith("sdxl") else "sd1"


def find(settings: Mapping[str, Any], config: Path | None = None) -> Family:
    """The kind of base model that these options train.

    `no_half_vae` and the like tell nothing: both scripts have them. What only the SDXL script has is in many files of
    the other, which ignores it, so that it counts last.

    Args:
        settings: the host's options.
        config: the file that they are from.
    """
    model = str(settings.get("pretrained_model_name_or_path") or "")
    own = of_model(model) if model else ""
    if own:
        return Family(own)
    if settings.get("v2"):
        return Family("sd2")
    name = _ENDING.sub("", model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower())
    for family, pattern in _PUBLISHED.items():
        if pattern.fullmatch(name):
            return Family(family)
    if _named(name):
        return Family(_named(name), f"the model's name, {name}")
    if config is not None:
        script = _script(read_text(config, CONFIG_BYTES))
        if script:
            return Family(script, f"the script that {config.name} names in a comment")
        if _named(config.stem):
            return Family(_named(config.stem), f"the name of {config.name}")
    for option in SDXL_ONLY:
        if settings.get(option):
            return Family("sdxl", f"{option}, which only sdxl_train_network.py has")
    return Family("")
