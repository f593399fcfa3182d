"""What presets of both hosts have in common: single settings, and mistakes in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig
from spf_plugin.errors import nearest
from spf_plugin.network_args import read_words
from spf_plugin.tools.plan import OPTIMIZERS

UNSAVED = (
    "fp8_base without gradient_checkpointing saves nothing: backward keeps a half-precision copy of every weight. Set "
    "gradient_checkpointing = true"
)


def whole(settings: Mapping[str, Any], name: str, default: int, problems: list[str], low: int = 1) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        problems.append(f"{name} = {value!r}: must be a whole number, {low} or more")
        return default
    return value


def flag(settings: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        problems.append(f"{name} = {value!r}: must be true or false, without quotes")
        return False
    return value


def spf_settings(
    settings: Mapping[str, Any], folder: Path, modules: Collection[str], problems: list[str]
) -> SPFConfig | None:
    if settings.get("network_module") not in modules:
        return None
    words = settings.get("network_args", [])
    if not isinstance(words, list) or any(not isinstance(word, str) for word in words):
        problems.append('network_args: must be a list of texts, such as ["spf_target=blonde hair"]')
        return SPFConfig()
    found = read_words(words, (Path(), folder))
    problems += found.problems
    return found.config


def optimizer(settings: Mapping[str, Any], problems: list[str]) -> str:
    name = str(settings.get("optimizer_type") or "AdamW")
    if settings.get("use_8bit_adam"):
        name = "AdamW8bit"
    elif settings.get("use_lion_optimizer"):
        name = "Lion"
    if name.rsplit(".", 1)[-1].lower() not in OPTIMIZERS:
        problems.append(
            f"optimizer_type = {name!r}: plan knows no size of its state{nearest(name.lower(), OPTIMIZERS)}. Known: "
            + ", ".join(sorted(OPTIMIZERS))
        )
        return "AdamW"
    return name
