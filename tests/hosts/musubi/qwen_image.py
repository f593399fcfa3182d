"""Qwen-Image: four blocks of two heads, a Qwen2.5-VL of three layers, a narrow VAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.hosts.dits.common import CAPTIONS, VOCABULARY, overridden, qwen_vl_tokenizer, random_weights
from tests.hosts.dits.hunyuan_image import TEMPLATE

ARCH, CODE = "qwen_image", "qi"
SCRIPT, TEXT_SCRIPT = "qwen_image_train_network.py", "qwen_image_cache_text_encoder_outputs.py"
NETWORK = "networks.lora_qwen_image"
PRECISION = "bf16"  # the host has its weights in that
TENSORS = 4 * 14 * 3  # blocks, linear layers, tensors of each
SWAPPED = 2
WIDTH = 64  # of the text


def options(models: Path) -> dict[str, Any]:
    return {"dit": models / "dit.safetensors", "vae": models / "vae.safetensors", **text_options(models)}


def text_options(models: Path) -> dict[str, Any]:
    return {"text_encoder": models / "qwen.safetensors"}


def shrink(models: Path) -> None:
    from musubi_tuner.qwen_image import qwen_image_autoencoder_kl, qwen_image_model, qwen_image_utils
    from transformers import Qwen2TokenizerFast

    overridden(
        qwen_image_model.QwenImageTransformer2DModel,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    overridden(qwen_image_autoencoder_kl.AutoencoderKLQwenImage, base_dim=8, num_res_blocks=1)
    language = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_window_layers": 3,
        "vocab_size": VOCABULARY,
    }
    vision = {"depth": 1, "fullatt_block_indexes": [0], "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    theirs = qwen_image_utils.Qwen2_5_VLConfig

    def config(text_config: Mapping[str, Any], vision_config: Mapping[str, Any], **rest: Any) -> Any:
        rope = {**text_config["rope_scaling"], "mrope_section": [4, 6, 6]}
        small = {**language, "rope_scaling": rope, "layer_types": ["full_attention"] * 3}
        return theirs(
            text_config={**text_config, **small},
            vision_config={**vision_config, **vision, "out_hidden_size": WIDTH},
            **{**rest, **language, "rope_scaling": rope},
        )

    qwen_image_utils.Qwen2_5_VLConfig = config
    qwen_image_utils.Qwen2Tokenizer = SimpleNamespace(
        from_pretrained=lambda *_, **__: Qwen2TokenizerFast.from_pretrained(models / "tokenizer")
    )


def make(folder: Path) -> None:
    from musubi_tuner.qwen_image import qwen_image_autoencoder_kl, qwen_image_model, qwen_image_utils
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tests.hosts.dits.common import shapes

    qwen_vl_tokenizer([*[TEMPLATE] * 8, *CAPTIONS * 3], folder / "tokenizer")
    shrink(folder)
    model = qwen_image_model.create_model("torch", False, False, False, False, torch.float32)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_file(random_weights(wanted, 1), folder / "dit.safetensors")
    autoencoder = qwen_image_autoencoder_kl.AutoencoderKLQwenImage()
    wanted = {name: tensor.shape for name, tensor in autoencoder.state_dict().items()}
    save_file(random_weights(wanted, 3), folder / "vae.safetensors")
    wanted = shapes(
        Qwen2_5_VLForConditionalGeneration,
        lambda: qwen_image_utils.load_qwen2_5_vl("", torch.bfloat16, "cpu", state_dict={}),
    )
    language, visual = "model.language_model.", "model.visual."
    save_file(
        {
            name.replace(language, "model.").replace(visual, "visual."): weight.bfloat16()
            for name, weight in random_weights(wanted, 2).items()
        },
        folder / "qwen.safetensors",
    )


def latents(cache: Path, name: str, size: tuple[int, int], seed: int) -> None:
    from musubi_tuner.dataset.cache_io import save_latent_cache_qwen_image
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    width, height = size
    item = ItemInfo(name, "", size, size)
    item.latent_cache_path = str(cache / f"{name}_{width:04d}x{height:04d}_{CODE}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    save_latent_cache_qwen_image(item, torch.randn(16, 1, height // 8, width // 8, generator=generator), None)
