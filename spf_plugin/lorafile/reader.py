"""Bounded reader for safetensors files: never unpickles, never allocates more than the file holds.

The header is scanned strictly and in one pass, so that a hostile file costs at most its own size in memory.
Layout: 8 bytes little-endian header length, a JSON object, the tensor data.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import safetensors
import torch

from spf_plugin.errors import SPFError

# What a header may hold: its parts are read one by one, and a file of nothing but parts would take minutes.
MAX_HEADER_BYTES = 32_000_000  # of a LoRA or a model a few hundred thousand, and megabytes with a thumbnail and tags
MAX_TENSORS = 20_000  # SDXL LoCon with both text encoders has 3,156
MAX_METADATA = 10_000  # kohya writes about a hundred

# dtype -> bytes per item, in the order in which the library lays tensors out (last first).
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

# The compiled library has no type stubs.
_safe_open: Any = safetensors.safe_open

_SPACE = re.compile(r"[ \t\n\r]*")
# A tensor entry holds no braces and no strings but the dtype; 64 dimensions are far beyond any layer.
_ENTRY = re.compile(r"\{[^{}]{1,4096}\}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the header: dtype in safetensors spelling, shape, byte range in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Everything a safetensors file says about itself.

    Attributes:
        tensors: name -> info, in file order.
        metadata: the ``__metadata__`` strings.
        data_offset: first byte of the data section.
        file_size: size of the file in bytes.
        opens_with_quote: whether the header starts with ``{"``; A1111 and Forge read metadata only then.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int
    file_size: int
    opens_with_quote: bool = True


class UnreadableFile(SPFError):
    """The file is not a safetensors file that can be read safely."""


def _fail(path: Path, why: str, fix: str) -> UnreadableFile:
    return UnreadableFile(f"{path}: {why} {fix}")


_COPY_AGAIN = "The file is damaged: download or copy it again."


def _open_regular(path: Path) -> int:
    """Size of a regular file; everything else is refused before it is opened (a FIFO would block)."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise _fail(path, "there is no such file.", "Check the name.") from None
    except OSError as error:  # symlink loop, no permission, name too long
        raise _fail(path, f"cannot be opened ({error.strerror}).", "Check the link or the permissions.") from None
    except ValueError:
        raise _fail(path, "is not a file name.", "Check the name.") from None
    if stat.S_ISDIR(info.st_mode):
        raise _fail(path, "is a folder.", "Name the .safetensors file inside it.")
    if not stat.S_ISREG(info.st_mode):
        raise _fail(path, "is not a regular file.", "Name a .safetensors file.")
    return info.st_size


def _check_magic(path: Path, first: bytes) -> None:
    """Name the formats that people take for safetensors."""
    if first[4:] == b"\0\0\0\0{":  # safetensors; a header of 1152 bytes begins as a pickle does, with 80 04
        return
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _fail(
            path,
            "is a pickle (.pt, .ckpt, .bin), which can run any code when opened; it is never read here.",
            "Ask its author for a .safetensors file.",
        )
    if first.startswith(b"GGUF"):
        raise _fail(path, "is a GGUF file.", "Only .safetensors files are read.")
    if first.startswith((b"<!DO", b"<htm", b"<HTM", b"<!do", b"vers")):
        raise _fail(path, "is a web page or a Git LFS pointer, not the model.", "Download the file itself.")


class _Scanner:
    """Strict one-pass reader of the header object; memory stays proportional to what it returns."""

    def __init__(self, text: str, path: Path):
        self.text = text
        self.at = 0
        self.path = path

    def error(self, why: str) -> UnreadableFile:
        return _fail(
            self.path, f"the header is not valid safetensors JSON ({why} at character {self.at}).", _COPY_AGAIN
        )

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None  # the pattern matches the empty string
        self.at = match.end()

    def take(self, char: str) -> bool:
        self.space()
        if self.text.startswith(char, self.at):
            self.at += 1
            return True
        return False

    def expect(self, char: str) -> None:
        if not self.take(char):
            raise self.error(f"expected {char!r}")

    def string(self) -> str:
        self.expect('"')
        try:
            value, self.at = scanstring(self.text, self.at, True)
            value.encode()  # an unpaired surrogate cannot be written or printed
        except ValueError:
            raise self.error("bad string") from None
        return value

    def entry(self) -> object:
        self.space()
        match = _ENTRY.match(self.text, self.at)
        if match is None:
            raise self.error("bad tensor entry")
        try:
            value = json.loads(match.group())
        except (ValueError, RecursionError):
            raise self.error("bad tensor entry") from None
        self.at = match.end()
        return value

    def members(self) -> Iterator[str]:
        """Keys of the object at the cursor; the caller consumes each value."""
        self.expect("{")
        if self.take("}"):
            return
        while True:
            key = self.string()
            self.expect(":")
            yield key
            if self.take("}"):
                return
            self.expect(",")


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    """Validate one header entry."""

    def integers(value: object) -> list[int] | None:
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
            return None
        return value

    shown = _cut(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _fail(path, f"tensor {shown!r} lacks dtype, shape or data_offsets.", _COPY_AGAIN)
    dtype, shape, offsets = entry["dtype"], integers(entry["shape"]), integers(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _fail(path, f"tensor {shown!r} has the unknown dtype {dtype!r}.", "Save it as fp16, bf16 or fp32.")
    if shape is None or offsets is None or len(offsets) != 2:
        raise _fail(path, f"tensor {shown!r} has an impossible shape or offset.", _COPY_AGAIN)
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _fail(path, f"tensor {shown!r} has {end - start} bytes for shape {shape} in {dtype}.", _COPY_AGAIN)
    return TensorInfo(dtype, tuple(shape), start, end)


def _cut(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."


def _parse(path: Path, text: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    scan = _Scanner(text, path)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    for key in scan.members():
        if key == "__metadata__":
            if metadata is not None:
                raise _fail(path, "has two metadata blocks.", _COPY_AGAIN)
            metadata = {}
            for name in scan.members():
                if name in metadata:
                    raise _fail(path, f"has the metadata key {_cut(name)!r} twice.", _COPY_AGAIN)
                if len(metadata) >= MAX_METADATA:
                    raise _fail(path, f"has more than {MAX_METADATA} metadata keys.", "No LoRA has: save it anew.")
                metadata[name] = scan.string()
        else:
            if key in tensors:
                raise _fail(
                    path, f"has the tensor {_cut(key)!r} twice.", "Loaders differ in which they take: save it anew."
                )
            if len(tensors) >= MAX_TENSORS:
                raise _fail(path, f"has more than {MAX_TENSORS} tensors.", "No LoRA has: this is another kind of file.")
            tensors[key] = _tensor_info(path, key, scan.entry())
    scan.space()
    if scan.at != len(text):
        raise scan.error("text after the end")
    return tensors, metadata or {}


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The data section must be covered exactly once: no overlap, no hole, nothing beyond the end."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < at:
            raise _fail(path, f"tensor {_cut(name)!r} overlaps another one.", _COPY_AGAIN)
        if info.start > at:
            raise _fail(path, f"there are {info.start - at} unused bytes before tensor {_cut(name)!r}.", _COPY_AGAIN)
        at = info.end
    if at > data_bytes:
        raise _fail(path, f"is cut short: {at - data_bytes} bytes are missing.", "Download or copy it again.")
    if at < data_bytes:
        raise _fail(path, f"has {data_bytes - at} bytes after the last tensor.", _COPY_AGAIN)


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file; the data is not touched.

    Args:
        path: The file.

    Returns:
        Its header. Every tensor lies inside the file, in one piece and apart from the others.

    Raises:
        UnreadableFile: Missing, not a regular file, a pickle, truncated, oversized or inconsistent header. The
            message says which, in one sentence.
    """
    path = Path(path)
    size = _open_regular(path)
    try:
        with open(path, "rb") as file:
            first = file.read(9)
            _check_magic(path, first)
            if len(first) < 8:
                raise _fail(path, f"is only {size} bytes long, too short for a safetensors file.", _COPY_AGAIN)
            length = int.from_bytes(first[:8], "little")
            if length > MAX_HEADER_BYTES:
                claim = f"the header would be {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed"
                raise _fail(path, f"is not a safetensors file ({claim}).", "Only .safetensors files are read.")
            if length > size - 8:
                raise _fail(path, f"is cut short inside its header ({size:,} of {length + 8:,} bytes).", _COPY_AGAIN)
            brace = first[8:] if length else b""
            if brace != b"{":
                raise _fail(path, "is not a safetensors file (the header does not start with '{').", _COPY_AGAIN)
            raw = brace + file.read(length - 1)
    except OSError as error:
        raise _fail(path, f"cannot be read ({error.strerror}).", "Check the disk and the permissions.") from None
    if len(raw) < length:
        raise _fail(path, "shrank while it was read.", "Try again when nothing writes to it.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _fail(path, "the header is not UTF-8.", _COPY_AGAIN) from None
    tensors, metadata = _parse(path, text)
    _check_layout(path, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length, size, raw[:2] == b'{"')


def iter_tensors(path: str | Path, header: Header) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) one at a time, in file order, so that a large file never sits in memory whole.

    The tensors are copies: one that is mapped keeps the file open, and Windows replaces and deletes no open file.

    Raises:
        UnreadableFile: The safetensors library refuses the file or one tensor.
    """
    path = Path(path)
    try:
        with _safe_open(str(path), framework="pt", device="cpu") as file:
            for name in header.tensors:
                yield name, file.get_tensor(name).clone()
    # AttributeError: a dtype that this torch lacks
    except (safetensors.SafetensorError, OSError, AttributeError) as error:  # type: ignore[attr-defined]
        raise _fail(path, f"cannot be read ({error}).", _COPY_AGAIN) from None


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Load a whole safetensors file.

    Returns:
        State dict (CPU tensors, file order) and metadata.

    Raises:
        UnreadableFile: See `read_header`.
    """
    header = read_header(path)
    return dict(iter_tensors(path, header)), dict(header.metadata)
