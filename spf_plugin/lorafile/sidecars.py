"""The files beside a LoRA that WebUI cards read: ``NAME.json`` and ``NAME.preview.png``.

Read in A1111 modules/extra_networks.py and modules/ui_extra_networks.py (Forge the same), ComfyUI app/model_manager.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spf_plugin.core.prompt import parse_targets
from spf_plugin.errors import SPFError
from spf_plugin.files import IMAGE_BYTES, read_bytes, read_json
from spf_plugin.lorafile.findings import taken
from spf_plugin.lorafile.inspect import AnyBase, Contents, describe, network_args
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.names import BASES
from spf_plugin.lorafile.record import CONTINUED_WITH
from spf_plugin.lorafile.writer import replacing

# A1111's spelling of base models in the card; "Unknown" is never hidden.
SD_VERSION: dict[AnyBase, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "flux": "Flux"}
_IMAGES = {
    ".png": b"\x89PNG\r\n\x1a\n",
    ".jpg": b"\xff\xd8\xff",
    ".jpeg": b"\xff\xd8\xff",
    ".webp": b"RIFF",
    ".gif": b"GIF8",
}
# A key of ours in the cards that training writes: a digest of the rest. Editors keep keys that they do not know.
_MARK = "spf card"


@dataclass(frozen=True)
class Card:
    """What the card shows and puts into the prompt.

    Attributes:
        activation_text: Added to the prompt behind ``<lora:NAME:WEIGHT>``.
        preferred_weight: Weight in that tag; 0 means the WebUI's default.
        sd_version: ``SD1``, ``SD2``, ``SDXL``, ``Flux`` (Forge) or ``Unknown``.
        negative_text: Added to the negative prompt.
        description: Shown on the card.
        notes: Shown in the card's editor.
    """

    activation_text: str = ""
    preferred_weight: float = 0.0
    sd_version: str = "Unknown"
    negative_text: str = ""
    description: str = ""
    notes: str = ""

    def as_json(self) -> dict[str, object]:
        """The object that A1111's editor writes, with its key names."""
        return {
            "description": self.description,
            "sd version": self.sd_version,
            "activation text": self.activation_text,
            "preferred weight": self.preferred_weight,
            "negative text": self.negative_text,
            "notes": self.notes,
        }


def target_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Target phrases that the file was trained with, from ``ss_network_args``; else its ModelSpec trigger phrase.

    ``dress->T-shirt`` gives ``dress``: what the captions said, and what the prompt needs.
    """
    said = network_args(metadata).get("spf_target")
    if isinstance(said, str) and said:
        with contextlib.suppress(ValueError):
            return [target.phrase.replace("_", " ") for target in parse_targets(said)]
    trigger = metadata.get("modelspec.trigger_phrase", "").strip()
    return [trigger] if trigger else []


def _stem(lora: str | Path) -> Path:
    """The LoRA's path without its extension; the name may contain further dots."""
    return Path(os.path.splitext(lora)[0])


def card_path(lora: str | Path) -> Path:
    """``NAME.json``, where the cards look for it."""
    return _stem(lora).with_name(_stem(lora).name + ".json")


def write_card(lora: str | Path, card: Card, *, force: bool = False) -> Path:
    """Write ``NAME.json`` beside the LoRA.

    Args:
        lora: The LoRA file.
        card: What to write.
        force: Update an existing file; keys of other programs in it are kept.

    Returns:
        The file written.

    Raises:
        SPFError: It exists and `force` is not given, or it exists and is not a JSON object.
    """
    path = card_path(lora)
    content: dict[str, object] = {}
    if os.path.lexists(path):
        if not force:
            raise SPFError(f"{path} exists; --force updates it and keeps what it does not know.")
        try:
            old = read_json(path)
        except SPFError as error:
            raise SPFError(f"{path} cannot be read as JSON ({error.problems[0]}). Move it away first.") from None
        if not isinstance(old, dict):
            raise SPFError(f"{path} is not a card (a JSON object). Move it away first.")
        content = old
    content |= card.as_json()
    _dump(path, content)
    return path


def _dump(path: Path, content: Mapping[str, object]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=4, ensure_ascii=False).encode())


def _digest(content: Mapping[str, object]) -> str:
    """Of everything but the mark, whatever the order of the keys; 16 hex digits."""
    rest = {key: value for key, value in content.items() if key != _MARK}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _is_our_own(path: Path) -> bool:
    """Whether training wrote this card and nobody has changed it since."""
    try:
        content = read_json(path)
    except SPFError:
        return False
    return isinstance(content, dict) and content.get(_MARK) == _digest(content)


def training_card(contents: Contents) -> Card | None:
    """The card of a LoRA that was just trained; None where no target is known that a prompt could need."""
    phrases = target_phrases(contents.metadata)
    if not phrases:
        return None
    said, metadata = network_args(contents.metadata), contents.metadata
    target = str(said.get("spf_target") or "").replace("_", " ").replace("|", ", ")
    facts = [f"target {target}"] if target else []
    facts += [
        f"{label} {metadata[key]}"
        for label, key in (("steps", "ss_steps"), ("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"))
        if metadata.get(key, "None") != "None"
    ]
    going_on = metadata.get(CONTINUED_WITH, "")
    facts += [f"to go on without SPF, use {going_on}"] if going_on else []
    description = describe(contents)
    told = f"Trained with SPF: {', '.join(facts)}." if facts else ""
    if description.base in BASES:  # of others no program's rules are known
        told = f"{told} {taken(verdicts(contents, description))}".strip()
    return Card(activation_text=", ".join(phrases), sd_version=SD_VERSION.get(description.base, "Unknown"), notes=told)


def write_training_card(lora: str | Path, contents: Contents, sample: Path | None = None) -> list[str]:
    """Write ``NAME.json``, and ``NAME.preview.EXT`` from `sample`, beside a LoRA that was just saved. Never raises.

    A card is replaced only if training wrote it and nobody has changed it since; a preview never is.

    Args:
        lora: The LoRA file.
        contents: What is in it.
        sample: An image that shows the LoRA, if there is one.

    Returns:
        One sentence for each file that was not written although there was something to write.
    """
    notes: list[str] = []
    try:
        card = training_card(contents)
        path = card_path(lora)
        if card is not None and os.path.lexists(path) and not _is_our_own(path):
            notes.append(
                f"{path.name} was left as it is: it is edited, or another program's. To put '{card.activation_text}' "
                f"into it: spf lora sidecar --force {Path(lora).name}"
            )
        elif card is not None:
            content = card.as_json()
            _dump(path, content | {_MARK: _digest(content)})
    except Exception as error:  # the LoRA is saved: nothing about its card may look like a failed training
        notes.append(f"its card was not written: {error}")
    try:
        if sample is not None and existing_preview(lora) is None:
            write_preview(lora, sample)
    except Exception as error:
        notes.append(f"its preview was not written: {error}")
    return notes


def existing_preview(lora: str | Path) -> Path | None:
    """The preview that a WebUI shows for this LoRA, found by its own rule."""
    stem = _stem(lora)
    for extension in _IMAGES:
        for middle in ("", ".preview"):
            path = stem.with_name(f"{stem.name}{middle}{extension}")
            if os.path.lexists(path):
                return path
    return None


def write_preview(lora: str | Path, image: str | Path, *, force: bool = False) -> Path:
    """Copy an image to ``NAME.preview.EXT`` beside the LoRA, byte for byte.

    Args:
        lora: The LoRA file.
        image: A png, jpg, webp or gif file.
        force: Replace an existing ``NAME.preview.EXT``. A preview under another name stays and may win.

    Returns:
        The file written.

    Raises:
        SPFError: The LoRA has a preview already and `force` is not given, or `image` is no such image.
    """
    image = Path(image)
    extension = image.suffix.lower()
    if extension not in _IMAGES:
        raise SPFError(f"{image}: a preview must be one of {', '.join(_IMAGES)}.")
    present = existing_preview(lora)
    if present is not None and not force:
        raise SPFError(f"{present} exists; --force replaces it.")
    content = read_bytes(image, IMAGE_BYTES)
    if not content.startswith(_IMAGES[extension]):
        raise SPFError(f"{image} is not a {extension[1:]} image. Save it in the format of its name.")
    path = _stem(lora).with_name(f"{_stem(lora).name}.preview{extension}")
    with replacing(path) as file:
        file.write(content)
    return path
