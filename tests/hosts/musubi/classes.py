"""The model classes of a musubi-tuner checkout, in the tests' own process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from spf_plugin.families.base import Family
from spf_plugin.seam import Call
from tests.hosts.dits.common import random_weights

NO_CHECKOUT = "NO musubi-tuner CHECKOUT FOUND (SPF_MUSUBI; see CONTRIBUTING.md, Tests)"


def checkouts() -> list[Path]:
    """In `SPF_MUSUBI` (joined by the path separator) and in `~/.cache/spf-plugin/musubi-tuner*`."""
    named = [Path(p) for p in os.environ.get("SPF_MUSUBI", "").split(os.pathsep) if p]
    cached = sorted((Path.home() / ".cache" / "spf-plugin").glob("musubi-tuner*"))
    return [p.resolve() for p in [*named, *cached] if (p / "src" / "musubi_tuner").is_dir()]


def module(name: str) -> Any:
    """`musubi_tuner.NAME` of the first checkout. A loud skip where there is none."""
    found = checkouts()
    if not found:
        pytest.skip(NO_CHECKOUT)
    source = str(found[0] / "src")
    if source not in sys.path:
        sys.path.append(source)
    importlib.import_module("transformers")  # looks at what is installed
    absent = [each for each in ("av",) if importlib.util.find_spec(each) is None]  # it reads videos
    sys.modules.update({each: ModuleType(each) for each in absent})
    try:
        with mock.patch.object(torch.cuda, "current_device", return_value=0):  # a default argument asks for a card
            return importlib.import_module(f"musubi_tuner.{name}")
    finally:
        for each in absent:
            del sys.modules[each]


def filled(model: nn.Module, seed: int) -> nn.Module:
    """With weights of which none is 0, so that everything counts."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(random_weights(shapes, seed))
    return model.eval()


def crossing(model: nn.Module, family: Family) -> list[str]:
    """The linear layers that `spf_train=cross_attention` means, by the names that the host's networks give them."""
    names = (name for name, part in model.named_modules() if isinstance(part, nn.Linear))
    return [name for name in names if re.search(family.cross_attention, f"lora_unet_{name.replace('.', '_')}")]


def same(a: Call, b: Call) -> bool:
    """Bit for bit, with the types."""
    (kept, tensors), (others, other_tensors) = a.flatten(), b.flatten()
    return kept == others and all(
        torch.equal(part, other_tensors[name]) and part.dtype == other_tensors[name].dtype
        for name, part in tensors.items()
    )
