"""Krea 2: four blocks of four heads over two of keys, a Qwen3-VL of four layers, of which three are read.

Where transformers has no Qwen3-VL yet, a Qwen3 stands in for it, which reads text as it does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.hosts.dits.common import CAPTIONS, VOCABULARY, overridden, qwen_vl_tokenizer
from tests.hosts.dits.hunyuan_image import TEMPLATE
from tests.hosts.musubi.flux2 import save

ARCH, CODE = "krea2", "kr2"
SCRIPT, TEXT_SCRIPT = "krea2_train_network.py", "krea2_cache_text_encoder_outputs.py"
NETWORK = "networks.lora_krea2"
PRECISION = "bf16"  # the host has its weights in that
# Linear layers of the blocks, of what fuses the text's layers, and of the ways in and out; tensors of each.
TENSORS = (4 * 8 + (4 * 8 + 1) + 7) * 3
SWAPPED = 2
WIDTH, LAYERS, READ = 64, 4, (1, 2, 4)  # of the language model, of it, of its layers


def options(models: Path) -> dict[str, Any]:
    return {"dit": models / "dit.safetensors", "vae": models / "vae.safetensors"}


def text_options(models: Path) -> dict[str, Any]:
    return {"text_encoder": models / "qwen.safetensors"}


class Qwen3InPlace(nn.Module):
    """A Qwen3 by the names of a Qwen3-VL."""

    def __init__(self, config: Any):
        from transformers import Qwen3Model

        super().__init__()
        self.model = nn.Module()
        self.model.language_model = Qwen3Model(config)

    @classmethod
    def _from_config(cls, config: Any) -> Qwen3InPlace:
        return cls(config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tie_weights(self) -> None:
        pass  # it has no head

    def forward(self, **kwargs: Any) -> Any:
        return self.model.language_model(**kwargs)


def stand_in() -> None:
    import transformers

    class Config:
        @staticmethod
        def from_dict(parts: dict[str, Any]) -> Any:
            text = {
                name: value for name, value in parts["text_config"].items() if name not in ("rope_scaling", "dtype")
            }
            return transformers.Qwen3Config(**text)

    transformers.Qwen3VLConfig = Config
    transformers.Qwen3VLForConditionalGeneration = Qwen3InPlace


def shrink(models: Path) -> None:
    import transformers

    if not hasattr(transformers, "Qwen3VLForConditionalGeneration"):
        stand_in()
    from musubi_tuner.krea2 import krea2_encoder, krea2_mmdit, krea2_utils
    from musubi_tuner.qwen_image import qwen_image_autoencoder_kl

    small = dataclasses.replace(
        krea2_utils.single_mmdit_large_wide,
        features=128, tdim=32, txtdim=WIDTH, heads=4, kvheads=2, multiplier=1, layers=4, txtheads=2, txtkvheads=2,
        txtlayers=len(READ),
    )  # fmt: skip
    overridden(krea2_mmdit.SingleStreamDiT, config=small)
    overridden(qwen_image_autoencoder_kl.AutoencoderKLQwenImage, base_dim=16, num_res_blocks=1)
    config = krea2_encoder.QWEN3_VL_4B_INSTRUCT_CONFIG
    config["text_config"].update(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    )  # fmt: skip
    config["vision_config"].update(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=WIDTH,
        num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    theirs = krea2_utils.load_qwen3_vl_conditioner

    def load(path: str, **kwargs: Any) -> Any:
        return theirs(path, **{**kwargs, "select_layers": READ, "tokenizer_repo": str(models / "tokenizer")})

    krea2_utils.load_qwen3_vl_conditioner = load


def make(folder: Path) -> None:
    shrink(folder)
    from musubi_tuner.krea2 import krea2_encoder, krea2_mmdit, krea2_utils
    from musubi_tuner.qwen_image import qwen_image_autoencoder_kl

    save(folder / "dit.safetensors", krea2_mmdit.SingleStreamDiT(krea2_utils.single_mmdit_large_wide), 1)
    save(folder / "vae.safetensors", qwen_image_autoencoder_kl.AutoencoderKLQwenImage(), 2)
    config = krea2_encoder.Qwen3VLConfig.from_dict(krea2_encoder.QWEN3_VL_4B_INSTRUCT_CONFIG)
    qwen = krea2_encoder.Qwen3VLForConditionalGeneration._from_config(config)
    save(folder / "qwen.safetensors", qwen, 3, lambda name: None if name == "lm_head.weight" else name)
    qwen_vl_tokenizer([*[TEMPLATE, "assistant"] * 8, *CAPTIONS * 3], folder / "tokenizer")


def latents(cache: Path, name: str, size: tuple[int, int], seed: int) -> None:
    from musubi_tuner.dataset.cache_io import save_latent_cache_krea2
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    width, height = size
    item = ItemInfo(name, "", size, size)
    item.latent_cache_path = str(cache / f"{name}_{width:04d}x{height:04d}_{CODE}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    save_latent_cache_krea2(item, torch.randn(16, 1, height // 8, width // 8, generator=generator))
