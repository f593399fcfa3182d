"""K1, K2: names and shapes of the tables against diffusers' real architectures and the host's own networks.lora."""

from __future__ import annotations

import hashlib

import pytest
import torch

from spf_plugin.lorafile import names
from tests.lorafile import helpers as h

COUNTS = {"sd1": (192, 278, 72), "sd2": (192, 278, 138), "sdxl": (722, 788, 72 + 192)}
# Frozen from networks.lora of sd-scripts main 48d368fa (UNet with conv_dim) and the text encoders; see test_lora_host.
FROZEN = {
    "sd1": "44edcda39c26243367a6d85165b42ad157964a5a7c4a8e22d6d6f97b71ee6549",
    "sd2": "22bce914ca3c4d0c3f40c169edf08292f1354a7da07845497ed1f006f60b4f9d",
    "sdxl": "231dc80db7c1b20b12efab0fb99c7afe268c7a1f392eff7107847e4b2f94d651",
}
REAL_UNET = {
    "sd1": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def digest(listed: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest()


@pytest.mark.parametrize("base", names.BASES)
def test_counts(base: names.Base) -> None:
    default, locon, text = COUNTS[base]
    assert len(names.expected_names(base, text=False)) == default
    assert len(names.expected_names(base, conv=True, text=False)) == locon
    assert len(names.expected_names(base)) == default + text
    everything = names.expected_names(base, conv=True)
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("base", names.BASES)
def test_frozen_names(base: names.Base) -> None:
    assert digest(names.expected_names(base, conv=True)) == FROZEN[base]


@pytest.mark.parametrize("base", names.BASES)
def test_unet_table_is_the_real_architecture(base: names.Base) -> None:
    """Every target of a full-size diffusers UNet, with its true in and out features, and nothing else."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**(h.unet_config(base) | REAL_UNET[base]))
    live = {}
    for path, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            kind = "linear" if isinstance(module, torch.nn.Linear) else f"conv{module.kernel_size[0]}"
            live[path] = (kind, module.weight.shape[1], module.weight.shape[0])
    table = {
        m.path: (m.kind, m.fan_in, m.fan_out) for m in names.modules(base) if m.component == "unet" and m.kind != "norm"
    }
    assert table == live
    normed = {p for p, m in unet.named_modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))}
    assert {m.path for m in names.modules(base) if m.kind == "norm"} == normed


@pytest.mark.parametrize(
    ("base", "component", "layers", "width", "mlp"),
    [("sd1", "te1", 12, 768, 3072), ("sd2", "te1", 23, 1024, 4096), ("sdxl", "te2", 32, 1280, 5120)],
)
def test_text_table_is_the_real_architecture(
    base: names.Base, component: str, layers: int, width: int, mlp: int
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # transformers 5.6 flattened the model: the table must keep text_model all the same.
    live = {
        path if path.startswith("text_model.") else f"text_model.{path}": tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    table = {m.path: (m.fan_out, m.fan_in) for m in names.modules(base) if m.component == component}
    assert table == live


@pytest.mark.parametrize(
    ("base", "name", "path"),
    [
        ("sd1", "lora_unet_mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
         "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("sd1", "lora_unet_input_blocks_1_1_proj_out", "down_blocks.0.attentions.0.proj_out"),
        ("sd1", "lora_te_encoder_layers_3_mlp_fc1", "text_model.encoder.layers.3.mlp.fc1"),
        ("sd1", "text_encoder.text_model.encoder.layers.3.self_attn.to_out",
         "text_model.encoder.layers.3.self_attn.out_proj"),
        ("sdxl", "lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "base_model.model.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
         "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"),
        ("sdxl", "lora_te_text_model_encoder_layers_11_mlp_fc2", "text_model.encoder.layers.11.mlp.fc2"),
        ("sdxl", "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
         "text_model.encoder.layers.31.self_attn.q_proj"),
        ("sdxl", "lycoris_down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("sd1", "lora_unet_down_blocks_0_attentions_0_proj_x", None),
        ("sd1", "lora_te3_encoder_block_0", None),
        ("sd1", "lora_te1_text_model_encoder_layers_12_mlp_fc1", None),
    ],
)  # fmt: skip
def test_resolve(base: names.Base, name: str, path: str | None) -> None:
    found = names.resolve(base, name)
    assert (found.module.path if found else None) == path
