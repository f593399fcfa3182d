"""A subset's own targets, `custom_attributes.spf_target` in the dataset TOML: handed on by the host as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spf_plugin.config import read_targets
from spf_plugin.core.prompt import Target, parse_targets
from spf_plugin.files import shown
from spf_plugin.hosts.kohya.images import CUSTOM_TARGET, Image


def of_attributes(attributes: Any) -> tuple[Target, ...] | None:
    """The targets in a subset's custom attributes, or None where they have none.

    Raises:
        ValueError: they cannot be read.
    """
    own = attributes.get(CUSTOM_TARGET) if isinstance(attributes, dict) else None
    return read_targets(own) if own else None


def of_images(images: Sequence[Image]) -> tuple[Target, ...]:
    """Those of a data set, each once, whose images are `readable`."""
    said = dict.fromkeys(target for image in images if image.target for target in read_targets(image.target))
    return tuple(said)


def readable(images: Sequence[Image]) -> tuple[list[Image], list[str]]:
    """The images without the targets that cannot be read, and what is wrong with those."""
    problems: list[str] = []
    kept = []
    for image in images:
        own: Any = image.target
        if isinstance(own, str) or (isinstance(own, list | tuple) and all(isinstance(item, str) for item in own)):
            try:
                parse_targets(own or "any")
            except ValueError as error:
                problems.append(f"custom_attributes.{CUSTOM_TARGET} in the dataset TOML {error}")
                own = None
            kept.append(replace(image, target=own))
            continue
        if own is not None:
            problems.append(
                f"custom_attributes.{CUSTOM_TARGET} in the dataset TOML must be a text in quotes, or a list of texts, "
                f"and is {shown(own)}"
            )
        kept.append(replace(image, target=None))
    return kept, list(dict.fromkeys(problems))
