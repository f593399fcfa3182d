"""Deterministic, atomic safetensors writer with kohya's hashes.

The safetensors library writes metadata in an order that changes from call to call; here the same tensors and metadata
always give the same bytes. Tensors are laid out as the library does (by dtype, large items first, then by name), so
the data section, and with it the hash that A1111 shows, is the one kohya would have written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from spf_plugin.errors import SPFError
from spf_plugin.files import NAME_BYTES, impossible, replace
from spf_plugin.lorafile.inspect import dtype_name
from spf_plugin.lorafile.reader import DTYPE_BYTES

_ORDER = {name: i for i, name in enumerate(DTYPE_BYTES)}
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def _layout(state_dict: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Tensors in file order; every one aligned to its item size."""
    for name, tensor in state_dict.items():
        if dtype_name(tensor.dtype) not in DTYPE_BYTES:
            raise SPFError(f"{name}: safetensors cannot store {tensor.dtype}. Convert it to float16 or float32.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise SPFError(f"{name}: a {tensor.layout} tensor without plain data cannot be saved.")
    return sorted(state_dict.items(), key=lambda item: (-_ORDER[dtype_name(item[1].dtype)], item[0]))


def _raw(tensor: torch.Tensor) -> memoryview:
    """Bytes of a tensor, row-major little-endian, without a copy where it is on the CPU and contiguous."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _header(tensors: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    at = 0
    for name, tensor in tensors:
        end = at + tensor.numel() * tensor.element_size()
        entry = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [at, end]}
        entries[name], at = entry, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hashes(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """kohya's ``sshs_model_hash`` and ``sshs_legacy_hash``.

    Returns:
        sha256 of the data section (64 hex digits), and the first 8 hex digits of the sha256 of 64 KiB from 1 MiB on,
        of the file as it would be with ``ss_*`` metadata only (sd-scripts `precalculate_safetensors_hashes`).
    """
    tensors = _layout(state_dict)
    full, legacy = hashlib.sha256(), hashlib.sha256()
    at = len(_header(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}))
    for _, tensor in tensors:
        raw = _raw(tensor)
        full.update(raw)
        start, end = _LEGACY_START - at, _LEGACY_START + _LEGACY_LENGTH - at
        legacy.update(raw[max(start, 0) : max(end, 0)])
        at += len(raw)
    return full.hexdigest(), legacy.hexdigest()[:8]


def save(path: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that either the new file is complete or the old one is untouched.

    ``sshs_model_hash`` and ``sshs_legacy_hash`` are computed and replace those in `metadata`. The bytes go to a
    temporary name in the same folder, are flushed to the disk, and take the final name in one step.

    Args:
        path: Target; a symbolic link is followed, so that the linked file is replaced.
        state_dict: Tensors on any device.
        metadata: Strings only.

    Raises:
        SPFError: The disk is full, the folder is missing or not writable, another program holds the file (Windows),
            or something in the arguments cannot be stored. The previous file is then as it was.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise SPFError(f"Metadata must be strings: {key!r} is {type(value).__name__}.")
    tensors = _layout(state_dict)
    model_hash, legacy_hash = hashes(state_dict, metadata)
    header = _header(tensors, {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash})
    with replacing(path) as file:
        file.write(header)
        for _, tensor in tensors:
            file.write(_raw(tensor))


def aside(path: Path, ending: str) -> Path:
    """A hidden name of its own beside a file, for what is not complete yet: two runs may save to the same folder.

    Short whatever the file is called: a name has 255 bytes, and one of letters beyond ASCII is soon as long.
    """
    return path.with_name(f".{_cut(path.name, 100)}.{secrets.token_hex(6)}{ending}")


def renamed(path: Path, ending: str) -> Path:
    """`NAME` + `ending` beside `NAME.safetensors`, cut where the name would be longer than a file's can be."""
    return path.with_name(_cut(path.stem, NAME_BYTES - len(ending)) + ending)


def _cut(name: str, size: int) -> str:
    """At most so many bytes of a name, in whole letters."""
    return name.encode()[:size].decode(errors="ignore")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends without an exception.

    Raises:
        SPFError: The operating system refused; the message says why and that nothing was changed.
    """
    target = Path(os.path.realpath(path))
    reason = impossible(target.name)
    if reason:
        raise SPFError(f"{target} was not written: {reason}. Nothing was changed.")
    partial = aside(target, ".tmp")
    try:
        # O_EXCL: never through somebody's link. The mode is cut by the umask, as for any new file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(partial, flags, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            replace(partial, target)
        except BaseException:  # Ctrl-C too must not leave the temporary file behind
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            why = "the disk is full"
        elif isinstance(error, PermissionError) and os.name == "nt":
            why = "another program (a WebUI?) has the file open"
        else:
            why = error.strerror or str(error)
        raise SPFError(f"{target} was not written: {why}. Nothing was changed.") from error
    if os.name == "posix":  # make the new name itself survive a power cut
        with contextlib.suppress(OSError):
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
