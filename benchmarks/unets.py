"""The real UNets from their published configurations, with random weights, and a plain LoRA on them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from spf_plugin.adapter import bypass as adapter
from spf_plugin.trainer.processes import Diffusion
from spf_plugin.trainer.settings import DEFAULT_NETWORK, PLAIN_LORA
from spf_plugin.trainer.start import network_module
from spf_plugin.trainer.unets import UNetModel

_SD = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
# unet/config.json of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_SD,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Every kind of block, narrow and shallow enough to run for real on a CPU in a second.
CONFIGS["tiny"] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
POOLED = {"sdxl": 1280}


def _cast(unet: nn.Module, dtype: torch.dtype) -> None:
    """Freeze and cast; `Module.to` cannot do it with fake tensors."""
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def base_model(family: str, dtype: torch.dtype, device: str = "cpu") -> UNetModel:
    """A frozen UNet with random weights, and nothing else of a pipeline.

    Args:
        family: a key of `CONFIGS`.
        dtype: of the weights; `torch.float8_e4m3fn` is sd-scripts' `fp8_base`.
        device: where the weights are made.
    """
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: Any = UNet2DConditionModel(**CONFIGS[family])
    _cast(unet, dtype)
    return UNetModel(
        name=family,
        family=family,
        denoiser=unet,
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1, 1, 1))),
        text_encoders=[],
        tokenizers=[],
        process=Diffusion(torch.linspace(0.999, 0.005, 1000, device=device), "epsilon"),
    )


def lora(model: UNetModel, rank: int, device: str) -> nn.Module:
    """A plain LoRA in float32 on the linear layers of every transformer, as networks.lora and `spf train` make it."""
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    inner = network_module(DEFAULT_NETWORK)
    arguments = {**PLAIN_LORA, "warn_on_unmatched": False}
    with torch.device(device):
        network = inner.create_network(1.0, rank, rank / 2, model.vae, [], model.denoiser, **arguments)
    adapter.select(network, "_attentions_")
    return network
