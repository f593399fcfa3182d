"""Wan 2.1: four blocks of two heads, a UMT5 of two layers, a narrow VAE."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from tests.hosts.dits.common import CAPTIONS, VOCABULARY, overridden, random_weights, reconfigured, t5_tokenizer

ARCH, CODE = "wan", "wan"
SCRIPT, TEXT_SCRIPT = "wan_train_network.py", "wan_cache_text_encoder_outputs.py"
NETWORK = "networks.lora_wan"
PRECISION = "no"
TENSORS = 4 * 10 * 3  # blocks, linear layers, tensors of each
SWAPPED = 2
WIDTH = 64  # of the text


def options(models: Path) -> dict[str, Any]:
    return {
        "dit": models / "dit.safetensors",
        "vae": models / "vae.safetensors",
        "task": "t2v-1.3B",
        **text_options(models),
    }


def text_options(models: Path) -> dict[str, Any]:
    return {"t5": models / "umt5.safetensors"}


class _Attributes(dict[str, Any]):
    """As easydict's: items are attributes, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def importable() -> None:
    """Its configurations are of a small class of a package that may be absent, and a default argument of its text
    encoder asks for a card."""
    if find_spec("easydict") is None:
        sys.modules["easydict"] = ModuleType("easydict")
        sys.modules["easydict"].EasyDict = _Attributes  # type: ignore[attr-defined]
    with mock.patch.object(torch.cuda, "current_device", return_value=0):
        importlib.import_module("musubi_tuner.wan.modules")


def shrink(models: Path) -> None:
    importable()
    from musubi_tuner.wan.modules import model, t5, vae

    overridden(model.WanModel, dim=64, ffn_dim=96, freq_dim=32, text_dim=WIDTH, num_heads=2, num_layers=4)
    overridden(vae.WanVAE_, dim=8, num_res_blocks=1)
    reconfigured(
        t5,
        "umt5_xxl",
        vocab_size=VOCABULARY,
        dim=WIDTH,
        dim_attn=64,
        dim_ffn=64,
        num_heads=2,
        encoder_layers=2,
        decoder_layers=1,
    )
    theirs = t5.HuggingfaceTokenizer
    t5.HuggingfaceTokenizer = lambda name, subfolder=None, **rest: theirs(str(models / "tokenizer"), **rest)


def make(folder: Path) -> None:
    t5_tokenizer(CAPTIONS * 3).save_pretrained(folder / "tokenizer")
    shrink(folder)
    from musubi_tuner.wan.modules import t5, vae
    from musubi_tuner.wan.modules.model import WanModel
    from safetensors.torch import save_file

    for version, name in (("2.1", "dit"), ("2.2", "dit22")):
        shapes = {each: tensor.shape for each, tensor in WanModel(model_version=version).state_dict().items()}
        save_file(random_weights(shapes, 1), folder / f"{name}.safetensors")
    autoencoder = vae.WanVAE_(z_dim=16, temperal_downsample=[False, True, True])
    shapes = {each: tensor.shape for each, tensor in autoencoder.state_dict().items()}
    save_file(random_weights(shapes, 3), folder / "vae.safetensors")
    encoder = t5.umt5_xxl(encoder_only=True, return_tokenizer=False)
    shapes = {each: tensor.shape for each, tensor in encoder.state_dict().items()}
    save_file(random_weights(shapes, 2), folder / "umt5.safetensors")


def latents(cache: Path, name: str, size: tuple[int, int], seed: int, frames: int = 0) -> None:
    """Of a picture, or of a clip of so many frames as the model has them."""
    from musubi_tuner.dataset.cache_io import save_latent_cache_wan
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    width, height = size
    place = f"_00000-{4 * frames - 3:03d}" if frames else ""
    item = ItemInfo(name, "", size, size)
    item.latent_cache_path = str(cache / f"{name}{place}_{width:04d}x{height:04d}_{CODE}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(16, max(frames, 1), height // 8, width // 8, generator=generator)
    save_latent_cache_wan(item, noise, None, None, None)
