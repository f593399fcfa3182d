"""Z-Image: four joint blocks of four heads and one refiner of each kind, a Qwen3 of three layers, FLUX's VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.hosts.dits.common import (
    CAPTIONS,
    VOCABULARY,
    overridden,
    qwen_vl_tokenizer,
    random_weights,
    reconfigured,
    shapes,
)

ARCH, CODE = "zimage", "zi"
SCRIPT, TEXT_SCRIPT = "zimage_train_network.py", "zimage_cache_text_encoder_outputs.py"
NETWORK = "networks.lora_zimage"
PRECISION = "no"
TENSORS = 4 * 7 * 3  # blocks, linear layers, tensors of each
SWAPPED = 2
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def options(models: Path) -> dict[str, Any]:
    return {"dit": models / "dit.safetensors", "vae": models / "vae.safetensors", **text_options(models)}


def text_options(models: Path) -> dict[str, Any]:
    return {"text_encoder": models / "qwen3.safetensors"}


def shrink(models: Path) -> None:
    from musubi_tuner.zimage import zimage_autoencoder, zimage_model, zimage_utils

    overridden(
        zimage_model.ZImageTransformer2DModel,
        dim=96, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=64, axes_dims=[8, 8, 8],
    )  # fmt: skip
    overridden(zimage_autoencoder.AutoencoderKL, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    reconfigured(
        zimage_utils,
        "Qwen3Config",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_window_layers=3,
    )
    zimage_utils.ZIMAGE_ID = str(models)


def make(folder: Path) -> None:
    from musubi_tuner.zimage import zimage_autoencoder, zimage_model, zimage_utils
    from safetensors.torch import save_file
    from transformers import Qwen2TokenizerFast

    shrink(folder)
    model = zimage_model.create_model("torch", False, torch.float32)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_file(random_weights(wanted, 1), folder / "dit.safetensors")
    with mock.patch.object(zimage_autoencoder, "load_safetensors", return_value={}):
        wanted = shapes(zimage_autoencoder.AutoencoderKL, lambda: zimage_autoencoder.load_autoencoder_kl(""))
    save_file(random_weights(wanted, 2), folder / "vae.safetensors")
    qwen = zimage_utils.Qwen3ForCausalLM._from_config(zimage_utils.Qwen3Config())
    wanted = {name: tensor.shape for name, tensor in qwen.state_dict().items() if name != "lm_head.weight"}
    save_file(random_weights(wanted, 3), folder / "qwen3.safetensors")
    texts = [*CAPTIONS, "user", "assistant", *(chr(i) for i in range(33, 127))] * 3
    qwen_vl_tokenizer(texts, folder / "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "tokenizer")


def latents(cache: Path, name: str, size: tuple[int, int], seed: int) -> None:
    from musubi_tuner.dataset.cache_io import save_latent_cache_z_image
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    width, height = size
    item = ItemInfo(name, "", size, size)
    item.latent_cache_path = str(cache / f"{name}_{width:04d}x{height:04d}_{CODE}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    save_latent_cache_z_image(item, torch.randn(16, height // 8, width // 8, generator=generator))
