"""Anima: three blocks of four heads, an adapter of one block, and a VAE with few channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.families.anima import Anima as Family
from spf_plugin.seam import Call
from tests.hosts.dits.common import (
    CAPTIONS,
    VOCABULARY,
    overridden,
    qwen_tokenizer,
    random_weights,
    shapes,
    shifted,
    t5_tokenizer,
)
from tests.hosts.dits.kinds import Planted

SCRIPT, NETWORK, TRAINER = "anima_train_network.py", "networks.lora_anima", "AnimaNetworkTrainer"
CACHED = {"cache_text_encoder_outputs": True, "cache_latents": True}
STEADY: dict[str, Any] = {}
DROPPED = {"caption_dropout_rate": 0.99999}  # 1 is refused at once
PRECISION = "no"
TENSORS = 3 * 10 * 3  # blocks, linear layers, tensors of each


def options(models: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models / "dit.safetensors",
        "vae": models / "vae.safetensors",
        "qwen3": models / "qwen3",
        "t5_tokenizer_path": models / "t5",
        "qwen3_max_token_length": 32,
        "t5_max_token_length": 40,
        "bucket_reso_steps": 16,
    }


def places(models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
    """T5's tokens from the first position on."""
    encoded = _t5(models)(text, truncation=True, padding="max_length", max_length=length, return_offsets_mapping=True)
    return [
        (start, stop) if stop > start else None  # `</s>` and padding have no characters
        for start, stop in encoded.offset_mapping
    ]


def spans(models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
    tokenizer = _t5(models)
    return Family(nn.Module()).spans(
        prompt, lambda text: tokenizer(text, add_special_tokens=False).input_ids, length, full=full
    )


def _t5(models: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(models / "t5")


def shrink() -> None:
    from library import anima_models, qwen_image_autoencoder_kl

    overridden(
        anima_models.Anima, model_channels=96, num_heads=4, num_blocks=3, crossattn_emb_channels=64, adaln_lora_dim=16
    )
    overridden(anima_models.LLMAdapter, source_dim=64, target_dim=64, model_dim=64, num_layers=1, num_heads=4)
    overridden(qwen_image_autoencoder_kl.AutoencoderKLQwenImage, base_dim=16, num_res_blocks=1)


def make(folder: Path) -> None:
    from library import anima_models, anima_utils, qwen_image_autoencoder_kl
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shrink()
    folder.mkdir(parents=True, exist_ok=True)
    vae = qwen_image_autoencoder_kl.AutoencoderKLQwenImage
    with (
        mock.patch.object(anima_utils, "load_safetensors_with_lora_and_fp8", return_value={}),
        mock.patch.object(qwen_image_autoencoder_kl, "load_safetensors", return_value={}),
    ):
        dit = shapes(
            anima_models.Anima,
            lambda: anima_utils.load_anima_model("cpu", "", "torch", False, "cpu", torch.float32),
        )
        autoencoder = shapes(vae, lambda: qwen_image_autoencoder_kl.load_vae(""))
    dit = {name: shape for name, shape in dit.items() if not name.startswith("pos_embedder.")}  # tables, not weights
    save_file({f"net.{name}": weight for name, weight in random_weights(dit, 1).items()}, folder / "dit.safetensors")
    save_file(random_weights(autoencoder, 2), folder / "vae.safetensors")
    texts = [*CAPTIONS, *(chr(i) for i in range(33, 127))] * 3
    t5_tokenizer(texts).save_pretrained(folder / "t5")
    qwen_tokenizer(texts).save_pretrained(folder / "qwen3")
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")


def planted(models: Path) -> Planted:
    """Of 20 T5 tokens 9 are words."""
    from library import anima_utils

    words, length, size = 9, 20, (16, 24)
    model = anima_utils.load_anima_model(
        "cpu", str(models / "dit.safetensors"), "torch", False, "cpu", torch.float32
    ).eval()
    mask = (torch.arange(length) < words).long()[None]
    call = Call(
        (shifted(1, 16, 1, *size), torch.tensor([0.5]), torch.randn(1, 16, 64)),
        {
            "padding_mask": torch.zeros(1, 1, *size),
            "target_input_ids": torch.randint(3, 500, (1, length)) * mask,
            "target_attention_mask": mask,
            "source_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    )

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, T, heads, d]
        output = output.clone()
        output[:, position] = key
        return output

    return Planted(model, call, ["cross_attn"], 5, range(words, length), length, size, plant)
