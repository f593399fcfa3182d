"""Chroma: three double and four single blocks of four heads, with FLUX's T5 and VAE in small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.hosts.dits import flux
from tests.hosts.dits.common import random_weights, shapes
from tests.hosts.dits.flux import (
    CACHED,
    DOUBLE,
    DROPPED,
    LENGTH,
    NETWORK,
    PRECISION,
    SCRIPT,
    SINGLE,
    SIZE,
    STEADY,
    WORDS,
    places,
    spans,
)
from tests.hosts.dits.joint import Joint
from tests.hosts.dits.kinds import Planted

__all__ = [
    "CACHED",
    "DROPPED",
    "NETWORK",
    "PRECISION",
    "SCRIPT",
    "STEADY",
    "make",
    "options",
    "places",
    "planted",
    "shrink",
    "spans",
]

TRAINER = "FluxNetworkTrainer chroma"
TENSORS = (DOUBLE * 8 + SINGLE * 2) * 3  # its modulation is not the blocks'


def options(models: Path) -> dict[str, Any]:
    return {**flux.options(models), "clip_l": None, "model_type": "chroma", "apply_t5_attn_mask": True}


def shrink() -> None:
    from library import chroma_models

    flux.shrink()
    chroma_models.chroma_params = dataclasses.replace(
        chroma_models.chroma_params,
        context_in_dim=64,
        hidden_size=128,
        num_heads=4,
        axes_dim=[8, 12, 12],
        depth=DOUBLE,
        depth_single_blocks=SINGLE,
        approximator_depth=1,
        approximator_hidden_size=64,
    )


def make(folder: Path) -> None:
    from library import chroma_models, flux_utils
    from safetensors.torch import save_file

    with mock.patch.object(flux_utils, "load_safetensors", return_value={}):
        dit = shapes(
            chroma_models.Chroma, lambda: flux_utils.load_flow_model("", torch.float32, "cpu", model_type="chroma")
        )
    save_file(random_weights(dit, 1), folder / "dit.safetensors")
    flux.surroundings(folder)


def planted(models: Path) -> Planted:
    """Behind the words it attends to one padding token."""
    images = SIZE[0] // 2 * SIZE[1] // 2

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, heads, (image and) T, d], the text last
        output = output.clone()
        output[:, :, position + (images if output.shape[2] > images else 0)] = key
        return output

    layers, padding = ["double_blocks", "single_blocks"], range(WORDS + 1, LENGTH)
    return Planted(flux.load(models, "chroma"), flux.call(WORDS), layers, 5, padding, LENGTH, SIZE, plant)


def joint(models: Path) -> Joint:
    """The words stand behind the patches; the first sample's are cut behind its first padding token."""
    patches = SIZE[0] // 2 * SIZE[1] // 2
    counts = [WORDS + 1, LENGTH]
    return Joint(flux.load(models, "chroma"), flux.call(WORDS, LENGTH), [0, 0], [patches] * 2, counts)
