"""What FLUX.2's dev and klein share: three double and four single blocks of two heads, and their VAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.hosts.dits.common import random_weights, reconfigured

SCRIPT, TEXT_SCRIPT = "flux_2_train_network.py", "flux_2_cache_text_encoder_outputs.py"
NETWORK = "networks.lora_flux_2"
PRECISION = "bf16"  # the host has its weights in that
TENSORS = (3 * 8 + 4 * 2) * 3  # blocks, linear layers, tensors of each
SWAPPED = 2
WIDTH, LAYERS, LENGTH = 64, 4, 128  # of the language model, of it, of all texts
READ = [1, 2, 4]  # of its layers


def options(models: Path, version: str) -> dict[str, Any]:
    return {"dit": models / "dit.safetensors", "vae": models / "ae.safetensors", "model_version": version}


def text_options(models: Path, version: str) -> dict[str, Any]:
    return {"text_encoder": models / "text.safetensors", "model_version": version}


def shrink() -> None:
    from musubi_tuner.flux_2 import flux2_models, flux2_utils

    for name, info in flux2_utils.FLUX2_MODEL_INFO.items():
        params = dataclasses.replace(
            info.params,
            context_in_dim=WIDTH * len(READ),
            hidden_size=64,
            num_heads=2,
            depth=3,
            depth_single_blocks=4,
            axes_dim=[8, 8, 8, 8],
        )
        flux2_utils.FLUX2_MODEL_INFO[name] = dataclasses.replace(info, params=params)
    reconfigured(flux2_models, "AutoEncoderParams", ch=32, num_res_blocks=1)
    flux2_utils.OUTPUT_LAYERS_MISTRAL = flux2_utils.OUTPUT_LAYERS_QWEN3 = READ
    flux2_utils.MAX_LENGTH = LENGTH


def make(folder: Path, version: str) -> None:
    """All but the text encoder. The host is small already."""
    from musubi_tuner.flux_2 import flux2_models, flux2_utils

    save(folder / "dit.safetensors", flux2_models.Flux2(flux2_utils.FLUX2_MODEL_INFO[version].params, "torch"), 1)
    save(folder / "ae.safetensors", flux2_models.AutoEncoder(flux2_models.AutoEncoderParams()), 2)


def save(file: Path, model: nn.Module, seed: int, names: Callable[[str], str | None] = lambda name: name) -> None:
    """Random weights for a model, under what `names` makes of its own names; None: left out."""
    from safetensors.torch import save_file

    state = model.state_dict()
    weights = random_weights({name: part.shape for name, part in state.items()}, seed)
    weights |= {name: part for name, part in state.items() if not part.is_floating_point()}
    save_file({new: weights[name] for name in state if (new := names(name))}, file)


def latents(cache: Path, name: str, size: tuple[int, int], seed: int, code: str, full: str) -> None:
    from musubi_tuner.dataset.cache_io import save_latent_cache_flux_2
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    width, height = size
    item = ItemInfo(name, "", size, size)
    item.latent_cache_path = str(cache / f"{name}_{width:04d}x{height:04d}_{code}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    save_latent_cache_flux_2(item, torch.randn(128, height // 16, width // 16, generator=generator), None, full)
