"""What SPF needs of an item's text, in a file beside the host's: written by the caching command, played back by
training.

`NAME_CODE_spf.safetensors` beside `NAME_CODE_te.safetensors`, in the data set's cache folder: the base prompt's tensors
under the host's names, a vector for each phrase, and as metadata the caption, the target, and every text that was
tokenized, with its ids. No pattern of the host takes it for a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spf_plugin.errors import SPFError
from spf_plugin.files import replace
from spf_plugin.hosts.musubi.architectures import TEXT

OURS = "_spf.safetensors"
FORMAT = 1
_KEY, _BASE, _VECTORS = "spf_prompts", "base.", "vectors"
# Of the distance between the states of a caption's tokens: another word moves its token by about all of it, another
# type of the weights by some hundredths.
ANOTHER_CAPTION = 0.5
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is the one that was looked at.

    Attributes:
        size: in bytes.
        time: of its last change, in nanoseconds.
        digest: SHA-256 of its content.
    """

    size: int
    time: int
    digest: str

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Raises OSError."""
        info = os.stat(path)
        return cls(info.st_size, info.st_mtime_ns, _digest(path))

    def fits(self, path: str) -> bool:
        """Whether this is the file. Only one that was copied or written again is read."""
        try:
            info = os.stat(path)
            if info.st_size != self.size:
                return False
            return info.st_mtime_ns == self.time or _digest(path) == self.digest
        except OSError:
            return False


def _digest(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            found.update(part)
    return found.hexdigest()


@dataclass(frozen=True)
class Record:
    """What a file says but for its tensors.

    Attributes:
        caption: of the item.
        target: the targets, as `Target` writes them.
        base: the base prompt; it has tensors only where it is not the caption.
        prefix: what stands before every prompt that is encoded.
        tokens: text -> its token ids.
        phrases: whose vectors are there, in order.
        text: of the host's file beside it, which was of this caption.
    """

    caption: str
    target: tuple[str, ...]
    base: str
    prefix: str
    tokens: Mapping[str, Sequence[int]]
    phrases: tuple[str, ...]
    text: Stamp


def beside(text: str) -> str:
    """The file of the item whose cached text is in this one."""
    return text.removesuffix(TEXT) + OURS


def write(path: str, record: Record, base: Mapping[str, Tensor], vectors: Tensor) -> None:
    """Put a file there, whole or not at all.

    Args:
        path: see `beside`.
        record: what it says.
        base: the base prompt's tensors, by the host's names; empty where the base prompt is the caption.
        vectors: `[P, E]`, of the record's phrases.

    Raises:
        SPFError: it cannot be written.
    """
    from safetensors import SafetensorError  # type: ignore[attr-defined]
    from safetensors.torch import save_file

    said = {**vars(record), "text": vars(record.text), "format": FORMAT}
    tensors = {_BASE + name: tensor.contiguous() for name, tensor in base.items()} | {_VECTORS: vectors.contiguous()}
    partial_ = f"{path}.partial"
    try:
        save_file(tensors, partial_, {_KEY: json.dumps(said)})
        replace(Path(partial_), Path(path))
    except (OSError, SafetensorError) as error:
        Path(partial_).unlink(missing_ok=True)
        raise SPFError(f"{path} was not written: {error}.") from error


def read(path: str) -> Record:
    """What a file says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, none of ours, or of another version of SPF.
    """
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            said = json.loads((file.metadata() or {})[_KEY])
        if said.pop("format") != FORMAT:
            raise ValueError("another format")
        return Record(
            str(said["caption"]),
            tuple(map(str, said["target"])),
            str(said["base"]),
            str(said["prefix"]),
            {str(text): list(map(int, ids)) for text, ids in said["tokens"].items()},
            tuple(map(str, said["phrases"])),
            Stamp(int(said["text"]["size"]), int(said["text"]["time"]), str(said["text"]["digest"])),
        )
    except FileNotFoundError:
        raise
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(f"{path}: {error}") from error


def base_tensors(path: str) -> dict[str, Tensor]:
    """The base prompt's, by the host's names.

    Raises:
        SPFError: the file cannot be read (any more).
    """
    found = _tensors(path)
    found.pop(_VECTORS, None)
    return {name.removeprefix(_BASE): tensor for name, tensor in found.items()}


def phrase_vectors(path: str) -> Tensor:
    """`[P, E]`, those of the record's phrases.

    Raises:
        SPFError: the file cannot be read (any more).
    """
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            return file.get_tensor(_VECTORS)
    except (OSError, SafetensorError) as error:
        raise SPFError(f"{path} cannot be read: {error}. Delete it, and run spf cache-prompts again.") from error


def _tensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SPFError(f"{path} cannot be read: {error}. Delete it, and run spf cache-prompts again.") from error


def host_caption(path: str) -> str | None:
    """Of which caption the host has cached the text; None where that cannot be read."""
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            return (file.metadata() or {}).get("caption1")
    except (SafetensorError, *DAMAGED):
        return None


def host_text(path: str) -> dict[str, Tensor]:
    """What the host has cached of a caption: the tensors by their names in a batch.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            return {_plain(name): file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(f"{path}: {error}") from error


def _plain(name: str) -> str:
    """A tensor's name without what the host writes around it: `varlen_llm_embed_bfloat16` is `llm_embed`."""
    name = name.removeprefix("varlen_")
    types = (str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype))
    written = next((each for each in sorted(types, key=len, reverse=True) if name.endswith(f"_{each}")), "")
    return name.removesuffix(f"_{written}") if written else name


def near(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], names: Sequence[str], start: int) -> bool:
    """Whether two encodings are of one caption by one encoder, but for rounding.

    Args:
        ours: of one prompt.
        theirs: of one prompt.
        names: which tensors to compare.
        start: tokens before the words, alike in all prompts.
    """
    for name in names:
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            return False
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        a, b = (part.float().flatten(1) if part.dim() > 1 else part.float()[None] for part in (a, b))
        a, b = (part[min(start, len(part) - 1) :] for part in (a, b))
        # A language model's states have a few channels that are large and alike in all tokens.
        scale = (a - a.mean(dim=0)).norm(dim=-1).mean() if len(a) > 1 else a.norm()
        # Written so that a NaN on the disk is no match.
        if not bool((a - b).norm(dim=-1).max() <= ANOTHER_CAPTION * scale):
            return False
    return True
