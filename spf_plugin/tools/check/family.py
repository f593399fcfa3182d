"""Which kind of base model a run trains, and so with which of the host's trainers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import CONFIG_BYTES, read_json, read_text
from spf_plugin.hosts.kohya.scripts import SCRIPTS, Script, script_of
from spf_plugin.tools.check.host_options import SDXL_ONLY
from spf_plugin.tools.check.tokens import hub_snapshots

_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of what cross-attention reads
_TO_KEY = re.compile(r"(?:input|down)_blocks\..*\.attn2\.to_k\.weight")
# What a transformer's file has, and none of the kinds before it here: its tensors' names under whatever prefix.
_DIT_KEYS = {
    "anima": re.compile(r"(?:^|\.)llm_adapter\."),
    "sd3": re.compile(r"(?:^|\.)joint_blocks\.\d+\."),
    "chroma": re.compile(r"(?:^|\.)distilled_guidance_layer\."),
    "hunyuan_image": re.compile(r"(?:^|\.)byt5_in\."),
    "flux": re.compile(r"(?:^|\.)double_blocks\.\d+\.img_attn\.qkv\."),
    "lumina": re.compile(r"(?:^|\.)noise_refiner\.\d+\."),
}
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
    "anima": re.compile(r"anima(?![a-z])"),
    "sd3": re.compile(r"sd[-_]?3(?:[-_.]?5)?(?![\d.])|stable-diffusion-3"),
    "flux": re.compile(r"flux(?![a-z])"),
    "chroma": re.compile(r"chroma(?![a-z])"),
    "lumina": re.compile(r"lumina"),
    "hunyuan_image": re.compile(r"hunyuan[-_]?image"),
}


@dataclass(frozen=True)
class Family:
    """A kind of base model.

    Attributes:
        name: one of `MODELS`, or empty where nothing tells it.
        guess: what it was guessed from; empty where it is certain.
    """

    name: str
    guess: str = ""

    @property
    def certain(self) -> str:
        """The name, but empty where it is a guess."""
        return "" if self.guess else self.name

    @property
    def script(self) -> Script:
        """The trainer of such a model; SD's where nothing tells it."""
        return script_of(self.name or "sd1")


def of_model(model: str) -> str:
    """What a model itself says: a .safetensors file, a diffusers folder, or one in the hub's cache; else empty."""
    path = Path(model)
    if path.suffix == ".safetensors" and os.path.isfile(path):
        from spf_plugin.lorafile.reader import read_header  # imports torch

        try:
            tensors = read_header(path).tensors
        except SPFError:  # the run says what is wrong with it
            return ""
        for kind, pattern in _DIT_KEYS.items():
            if any(pattern.search(key) for key in tensors):
                return kind
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


def _of_script(script: Script, settings: Mapping[str, Any]) -> str:
    """The kind that a trainer trains with these options: of `train_network.py` SD 2.x needs one, and so does Chroma."""
    if "chroma" in script.models:
        return "chroma" if settings.get("model_type") == "chroma" else "flux"
    return "sd2" if "sd2" in script.models and settings.get("v2") else next(iter(script.models))


def _in_comments(text: str) -> Script | None:
    """The one trainer that the comments of a file start."""
    names = set(re.findall(r"\b(\w*train_network)\.py\b", text))
    scripts = [script for script in SCRIPTS if script.name in names]
    return scripts[0] if len(scripts) == 1 else None


def find(settings: Mapping[str, Any], config: Path | None = None, script: Script | None = None) -> Family:
    """The kind of base model that these options train.

    `no_half_vae` and the like tell nothing: both UNets' scripts have them. What only the SDXL script has is in many
    files of the other, which ignores it, so that it counts last.

    Args:
        settings: the host's options.
        config: the file that they are from.
        script: the trainer, where the user names it.
    """
    model = str(settings.get("pretrained_model_name_or_path") or "")
    own = of_model(model) if model else ""
    if script is not None:
        return Family(own if own in script.models else _of_script(script, settings))
    if own:
        return Family(own)
    for script in SCRIPTS:
        if script.parts and all(settings.get(part) for part in script.parts):
            return Family(_of_script(script, settings))
    if settings.get("v2"):
        return Family("sd2")
    name = _ENDING.sub("", model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower())
    for family, pattern in _PUBLISHED.items():
        if pattern.fullmatch(name):
            return Family(family)
    if _named(name):
        return Family(_named(name), f"the model's name, {name}")
    if config is not None:
        script = _in_comments(read_text(config, CONFIG_BYTES))
        if script:
            return Family(_of_script(script, settings), f"the script that {config.name} names in a comment")
        if _named(config.stem):
            return Family(_named(config.stem), f"the name of {config.name}")
    for option in SDXL_ONLY:
        if settings.get(option):
            return Family("sdxl", f"{option}, which only sdxl_train_network.py has")
    return Family("")
