"""Which kinds there are, and what the tests of all of them need to know of one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.seam import Call

KINDS = ("anima", "sd3", "flux", "chroma", "lumina", "hunyuan_image")
VARIANTS = ("sd3m",)  # of one of them, that run only what may differ
MARK = "kind.txt"  # beside a model's weights: which of the kinds it is


@dataclass(frozen=True)
class Planted:
    """A loaded small model, and a call on a wide noise whose left half is shifted.

    Attributes:
        model: in fp32.
        call: of one sample.
        layers: for each kind of block an expression for its layers (`spf_layers`).
        position: in the text sequence, whose key is planted.
        padding: positions that are no words.
        length: T of the text sequence.
        size: `(h, w)` of the latents.
        plant: (what the layer's key module gave, the position, a key `[heads, d]` as `Family.tokens` must give it)
            -> the same output with that key there.
        shared: heads of queries that have the same key.
    """

    model: nn.Module
    call: Call
    layers: Sequence[str]
    position: int
    padding: Sequence[int]
    length: int
    size: tuple[int, int]
    plant: Callable[[Any, int, Tensor], Any]
    shared: int = 1


class Kind(Protocol):
    """A module of this package. At its top level it imports nothing of a host."""

    SCRIPT: str
    """The trainer's script."""
    NETWORK: str
    """The host's own network module for it."""
    TRAINER: str
    """The trainer's class."""
    CACHED: Mapping[str, Any]
    """Options with which text and latents are encoded before the training."""
    STEADY: Mapping[str, Any]
    """Options beside which the host trains the same with gradient checkpointing and without: it then keeps its text
    encoders in training mode, and T5 drops out."""
    DROPPED: Mapping[str, Any]
    """Options with which it drops nearly every caption from cached text."""
    PRECISION: str
    """`--mixed_precision` of its runs: `no`, where the trainer can do without."""
    TENSORS: int
    """How many a plain run's file has."""

    def shrink(self) -> None:
        """Make the host's models small. The host must be importable, as for the next two."""
        ...

    def make(self, folder: Path) -> None:
        """Random weights, and tokenizers."""
        ...

    def planted(self, models: Path) -> Planted: ...

    def options(self, models: Path) -> dict[str, Any]:
        """Of its trainer, for models in a folder."""
        ...

    def places(self, models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
        """By the tokenizers' own offsets: for each position of the text sequence, the characters of `text` there; None
        for padding and whatever else is no part of the text."""
        ...

    def spans(self, models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
        """The family's, with the tokenizer that the host counts with."""
        ...


def kind(name: str) -> Kind:
    return importlib.import_module(f"tests.hosts.dits.{name}")  # type: ignore[return-value]


def kind_of(model: Path) -> Kind | None:
    """Of weights that were made here."""
    mark = model.parent / MARK
    return kind(mark.read_text(encoding="utf-8")) if mark.is_file() else None
