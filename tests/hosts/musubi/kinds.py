"""Which kinds there are, and what the tests of all of them need to know of one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

KINDS = ("zimage", "qwen_image", "wan", "flux2_klein", "flux2_dev", "krea2")


class Kind(Protocol):
    """A module of this package. At its top level it imports nothing of a host."""

    ARCH: str
    """`--arch` of the command that encodes prompts."""
    CODE: str
    """The host's own name in the names of its cache files."""
    SCRIPT: str
    """The trainer's script."""
    TEXT_SCRIPT: str
    """The one that caches text."""
    NETWORK: str
    """The host's own network module for it."""
    PRECISION: str
    """`--mixed_precision` of its runs: `no`, where the trainer can do without."""
    TENSORS: int
    """How many a plain run's file has."""
    SWAPPED: int
    """The most blocks that can be swapped."""

    def shrink(self, models: Path) -> None:
        """Make the host's models small, and let it find the tokenizer in a folder. The host must be importable, as for
        the next two."""
        ...

    def make(self, folder: Path) -> None:
        """Random weights, and tokenizers."""
        ...

    def latents(self, cache: Path, name: str, size: tuple[int, int], seed: int) -> None:
        """Cache latents of an image of `(width, height)` pixels, as the host does."""
        ...

    def options(self, models: Path) -> dict[str, Any]:
        """Of its trainer, for models in a folder."""
        ...

    def text_options(self, models: Path) -> dict[str, Any]:
        """Of the script that caches text, but for the data set."""
        ...


def kind(name: str) -> Kind:
    return importlib.import_module(f"tests.hosts.musubi.{name}")  # type: ignore[return-value]
