"""What this process needs from its surroundings before heavy work.

PyPI's torchvision beside a CPU-only torch does not import. transformers and diffusers import torchvision wherever it is
installed, so a torchvision that cannot be imported takes both down with it. Nothing here needs torchvision, so a broken
one is made to look absent. Import this module before transformers or diffusers.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch


def hide_broken_torchvision() -> bool:
    """Make an installed torchvision that fails to import look absent; True if that was needed."""
    if sys.modules.get("torchvision", False) is None:
        return True
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return True
    return False


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of handing it back after every step; True where that is possible.

    On a CPU each training step allocates the same large tensors again. glibc maps them afresh every time, and the page
    faults took half of the processor here. Only glibc knows the setting; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # from malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def bfloat16_where_fast(device: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16 on a GPU and on processors that multiply it (AMX, AVX-512 BF16: products at 2.8 times the
    speed of float32); elsewhere it is slower: no change."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or _multiplies_bfloat16())


def _multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


hide_broken_torchvision()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by diffusers; misses a kernel, aloud
