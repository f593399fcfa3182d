"""SD3.5: three blocks of three heads, the first with the image's own attention (as Medium's early ones), the others
without (as Large's); two CLIPs, T5, and a VAE with few channels. The transformer's sizes come from its weights."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.families.sd3 import CLIP
from spf_plugin.families.sd3 import SD3 as Family
from spf_plugin.seam import Call
from tests import tiny
from tests.hosts.dits.common import CAPTIONS, VOCABULARY, overridden, random_weights, shapes, shifted, t5_tokenizer
from tests.hosts.dits.kinds import Planted

SCRIPT, NETWORK, TRAINER = "sd3_train_network.py", "networks.lora_sd3", "Sd3NetworkTrainer"
CACHED = {"cache_text_encoder_outputs": True}
STEADY = CACHED
DROPPED = {"clip_l_dropout_rate": 1.0, "clip_g_dropout_rate": 1.0, "t5_dropout_rate": 1.0}
PRECISION = "no"
TENSORS = (3 * 10 - 3 + 2) * 3  # linear layers of two streams, the last text's are fewer, the first image's more
BLOCKS, TEXT, WIDTHS = 3, 4096, (32, 48)  # the host pads CLIP's states to 4096, and so wide T5's must be
_CLIP_L, _CLIP_G, _T5 = (
    "openai_clip-vit-large-patch14",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "google_t5-v1_1-xxl",
)


def options(models: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models / "dit.safetensors",
        **{name: models / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl", "vae")},
        "tokenizer_cache_dir": models / "tokenizers",
        "t5xxl_max_token_length": 40,
        "cache_latents": True,  # its VAE draws latents: once, so that two ways to encode text see the same
        "bucket_reso_steps": 32,
    }


def places(models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
    """CLIP's sequence, then T5's of `length` positions."""
    found: list[tuple[int, int] | None] = []
    for tokenizer, room in zip(_tokenizers(models), (CLIP, length), strict=True):
        encoded = tokenizer(text, truncation=True, padding="max_length", max_length=room, return_offsets_mapping=True)
        found += [(start, stop) if stop > start else None for start, stop in encoded.offset_mapping]
    return found


def spans(models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
    tokenizers = _tokenizers(models)

    def tokenize(text: str, which: int = 0) -> list[int]:
        return tokenizers[which](text, add_special_tokens=False, verbose=False).input_ids

    return Family(nn.Module()).spans(prompt, tokenize, CLIP + length, full=full)


@functools.cache
def _tokenizers(models: Path) -> tuple[Any, Any]:
    from transformers import CLIPTokenizerFast, T5TokenizerFast

    folder = models / "tokenizers"
    return CLIPTokenizerFast.from_pretrained(folder / _CLIP_L), T5TokenizerFast.from_pretrained(folder / _T5)


def shrink() -> None:
    from library import flux_utils, sd3_models, sd3_utils

    def clip(**arguments: Any) -> Any:
        width = WIDTHS[arguments["hidden_size"] == 1280]
        sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 32}
        return config(**{**arguments, **sizes, "num_hidden_layers": 2, "num_attention_heads": 2})

    config = sd3_utils.CLIPTextConfig
    sd3_utils.CLIPTextConfig = clip
    flux_utils.T5Config = _with(
        flux_utils.T5Config, d_ff=32, d_kv=8, num_heads=2, num_layers=1, num_decoder_layers=1, vocab_size=VOCABULARY
    )
    overridden(sd3_models.VAEEncoder, ch=32, num_res_blocks=1)
    overridden(sd3_models.VAEDecoder, ch=32, num_res_blocks=1)


def _with(config: Callable[..., Any], **sizes: int) -> Callable[..., Any]:
    return lambda **arguments: config(**{**arguments, **sizes})


def make(folder: Path, *, norms: bool = True) -> None:
    from library import flux_utils, sd3_models, sd3_utils
    from safetensors.torch import save_file
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    params = sd3_models.SD3Params(
        patch_size=2,
        depth=BLOCKS,
        num_patches=32 * 32,
        pos_embed_max_size=32,
        adm_in_channels=sum(WIDTHS),
        qk_norm="rms" if norms else None,
        x_block_self_attn_layers=[0] if norms else [],
        context_embedder_in_features=TEXT,
        context_embedder_out_features=64 * BLOCKS,
        model_type="",
    )
    with torch.device("meta"):
        dit = {name: tensor.shape for name, tensor in sd3_models.create_sd3_mmdit(params).state_dict().items()}
    weights = random_weights(dit, 1)
    save_file({f"model.diffusion_model.{name}": weight for name, weight in weights.items()}, folder / "dit.safetensors")
    parts = {
        "clip_l": (CLIPTextModelWithProjection, sd3_utils.load_clip_l),
        "clip_g": (CLIPTextModelWithProjection, sd3_utils.load_clip_g),
        "t5xxl": (T5EncoderModel, sd3_utils.load_t5xxl),
        "vae": (sd3_models.SDVAE, sd3_utils.load_vae),
    }
    with (
        mock.patch.object(sd3_utils, "load_safetensors", return_value={}),
        mock.patch.object(flux_utils, "load_safetensors", return_value={}),
    ):
        for seed, (name, (cls, load)) in enumerate(parts.items(), 2):
            found = shapes(cls, functools.partial(load, name, torch.float32, "cpu"))
            save_file(random_weights(found, seed), folder / f"{name}.safetensors")
    tiny.tokenizer_folder(folder / "tokenizers" / _CLIP_L)
    shutil.copytree(folder / "tokenizers" / _CLIP_L, folder / "tokenizers" / _CLIP_G)
    t5_tokenizer([*CAPTIONS, *(chr(i) for i in range(33, 127))] * 3).save_pretrained(folder / "tokenizers" / _T5)


def planted(models: Path) -> Planted:
    """T5's sixth token. Padding is attended to as words are, so none of the positions is silent."""
    from library import sd3_utils
    from safetensors.torch import load_file

    length, size = CLIP + 20, (16, 24)
    model = sd3_utils.load_mmdit(load_file(models / "dit.safetensors"), torch.float32, "cpu").eval()
    text = {"context": torch.randn(1, length, TEXT), "y": torch.randn(1, sum(WIDTHS))}
    call = Call((shifted(1, 16, *size), torch.tensor([500.0])), text)

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, T, heads, d]
        output = output.clone()
        output[:, position] = key
        return output

    layers = ["joint_blocks.0", "joint_blocks.1", "joint_blocks.2"]  # the image's own attention beside, plain, the last
    return Planted(model, call, layers, CLIP + 5, (), length, size, plant)
