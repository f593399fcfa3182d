"""Recorded prompts, played back in training; and why a run cannot take them.

The caching command asks the same `fault`, so what it leaves alone a run takes, and what a run refuses it makes anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from enum import Enum

import torch
from torch import Tensor

from spf_plugin.core.prompt import Target, parse_targets
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Family, Text
from spf_plugin.hosts.looking import sought
from spf_plugin.hosts.musubi import prompts
from spf_plugin.hosts.musubi.architectures import Architecture
from spf_plugin.hosts.musubi.prompts import Record
from spf_plugin.text import TextSide

LONG = 2**20  # a text sequence in which nothing is cut off


def of_vector(vector: Tensor) -> Text:
    """The text of a phrase of which nothing but its vector is wanted (`spf_plugin.text.vectors`): `[E]`."""
    return {"hidden": vector[None, None], "pooled": vector[None]}


class Fault(Enum):
    """Why a record is not that of an item now."""

    MISSING = "are missing"
    DAMAGED = "are damaged or of another version of SPF"
    TARGET = "are of another target"
    CAPTION = "are of another caption than the data set has now"
    TEXT = "are older than the cached text beside them"
    TOKENS = "are of another tokenizer than those of the others"


class Tokens:
    """What records say of the tokenizer that they were made with."""

    def __init__(self) -> None:
        self.prefix: str | None = None
        self.ids: dict[str, Sequence[int]] = {}

    def agree(self, record: Record) -> bool:
        """Whether it says the same as those before."""
        same = all(self.ids.get(text, ids) == ids for text, ids in record.tokens.items())
        return same and self.prefix in (None, record.prefix)

    def add(self, record: Record) -> None:
        self.prefix = record.prefix
        self.ids.update(record.tokens)


class Replay:
    """`spf_plugin.text.TextHost` for what was recorded.

    Args:
        architecture: of the run.
    """

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.captions: dict[str, str] = {}  # by the file with the host's cached text
        self._tokens = Tokens()
        self._bases: dict[str, str] = {}
        self._vectors: dict[str, Tensor] = {}

    def add(self, text: str, record: Record) -> None:
        """Play back what was recorded of an item.

        Args:
            text: the file with the host's cached text.
            record: what the file beside it says.
        """
        path = prompts.beside(text)
        self.captions[text] = record.caption
        self._tokens.add(record)
        if record.base != record.caption:
            self._bases.setdefault(record.base, path)
        if any(phrase not in self._vectors for phrase in record.phrases):
            found = prompts.phrase_vectors(path)
            self._vectors.update(zip(record.phrases, found, strict=True))

    def agrees(self, record: Record) -> bool:
        """Whether one tokenizer can have made it and the others."""
        return self._tokens.agree(record)

    @property
    def prefix(self) -> str:
        return self._tokens.prefix or ""

    def tokenize(self, text: str) -> Sequence[int]:
        if text not in self._tokens.ids:
            raise SPFError(f"{text!r} was not tokenized when the prompts were cached. Run spf cache-prompts again.")
        return self._tokens.ids[text]

    def encode(self, prompts_: Sequence[str], beside: Sequence[str] = ()) -> Text:
        """One prompt: base prompts have another beside them, phrases have none."""
        (prompt,) = prompts_
        vector, path = self._vectors.get(prompt), self._bases.get(prompt)
        if path is not None and beside:
            return self.architecture.text(prompts.base_tensors(path))
        if vector is not None and not beside:
            return of_vector(vector)
        raise SPFError(f"{prompt!r} was not encoded when the prompts were cached. Run spf cache-prompts again.")


class _Covered:
    """As `Replay`, for one record, without reading its tensors: whether it has all that is asked for."""

    def __init__(self, record: Record):
        self.prefix, self._record = record.prefix, record

    def tokenize(self, text: str) -> Sequence[int]:
        return self._record.tokens[text]

    def encode(self, prompts_: Sequence[str], beside: Sequence[str] = ()) -> Text:
        if not set(prompts_) <= ({self._record.base} if beside else set(self._record.phrases)):
            raise KeyError(prompts_)
        return of_vector(torch.zeros(1))


def fault(text: str, captions: Sequence[str], targets: Sequence[Target], family: Family) -> Fault | Record:
    """Why the record of an item cannot be used; else the record.

    Args:
        text: the file with the host's cached text.
        captions: what the data set has for it now; empty where it has no such item any more.
        targets: of the run.
        family: of the model.
    """
    try:
        record = prompts.read(prompts.beside(text))
        recorded = sought(parse_targets(record.target))
    except FileNotFoundError:
        return Fault.MISSING
    except ValueError:
        return Fault.DAMAGED
    if recorded != sought(targets):
        return Fault.TARGET
    if captions and record.caption not in captions:
        return Fault.CAPTION
    if not record.text.fits(text):
        return Fault.TEXT
    try:
        TextSide(_Covered(record), family, targets, nullcontext).rehearse(record.caption, length=LONG)
    except LookupError:
        return Fault.DAMAGED  # captions are split otherwise now
    return record


def problems(
    replay: Replay,
    items: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    targets: Sequence[Target],
    family: Family,
    command: str,
) -> tuple[list[str], list[str]]:
    """Why a run cannot take its prompts, and what only may be wrong. What it can take is added to `replay`.

    Args:
        replay: plays back.
        items: that are trained, by the files with the host's cached text.
        captions: of the data set now, by the same.
        targets: of the run.
        family: of the model.
        command: the one that encodes prompts, as the user should type it.
    """
    found: dict[Fault, list[str]] = {}
    first: set[Fault] = set()
    gone = 0
    for text in items:
        told = fault(text, captions.get(text, ()), targets, family)
        if isinstance(told, Record) and not replay.agrees(told):
            told = Fault.TOKENS
        if isinstance(told, Fault):
            found.setdefault(told, []).append(prompts.beside(text))
            first |= {told} if text_is_stale(text, captions.get(text, ())) else set()
            continue
        gone += text not in captions
        replay.add(text, told)
    errors: list[str] = []
    warnings: list[str] = []
    for kind, paths in found.items():
        before = text_first(replay.architecture) if kind in first else ""
        errors.append(
            f"the prompts of {len(paths)} of {len(items)} trained items {kind.value}, e.g. {paths[0]}. {before}Run: "
            f"{command}"
        )
    if gone:
        warnings.append(
            f"{gone} trained items are in the cache and not in the data set: their captions are those that were cached"
        )
    return errors, warnings


def text_is_stale(text: str, captions: Sequence[str]) -> bool:
    """Whether the host must cache an item's text again, before its prompts can be made; the arguments are those of
    `fault`."""
    return bool(captions) and prompts.host_caption(text) not in captions


def text_first(architecture: Architecture) -> str:
    """What must be done then, before the command that encodes prompts."""
    return f"Run {architecture.text_script} first, which caches the text itself. "
