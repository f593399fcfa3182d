"""An SD1.x diffusers folder as one checkpoint in the original format, by that format's own arithmetic of names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _UNET:
        return f"{_UNET[module]}.{kind}"
    if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module):
        side, i, what, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        block = "input_blocks" if side == "down" else "output_blocks"
        if what == "downsamplers":
            return f"{block}.{3 + 3 * i}.0.op.{kind}"
        if what == "upsamplers":
            return f"{block}.{2 + 3 * i}.{2 if i else 1}.conv.{kind}"  # the first of them has no attention before it
        number = 1 + 3 * i + j if side == "down" else 3 * i + j
        rest = _RESNET[rest] if what == "resnets" else rest
        return f"{block}.{number}.{int(what == 'attentions')}.{rest}.{kind}"
    match = re.match(r"mid_block\.(\w+)\.(\d)\.(.+)", module)
    assert match, name
    if match[1] == "attentions":
        return f"middle_block.1.{match[3]}.{kind}"
    return f"middle_block.{2 * int(match[2])}.{_RESNET[match[3]]}.{kind}"


def _vae(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if ".mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for theirs, original in _VAE.items():
            name = name.replace(f".{theirs}.", f".{original}.")
    name = re.sub(r"down_blocks\.(\d)\.(downsamplers\.0|resnets)", r"down.\1.\2", name)
    name = re.sub(r"up_blocks\.(\d)\.(upsamplers\.0|resnets)", lambda m: f"up.{3 - int(m[1])}.{m[2]}", name)
    for theirs, original in (("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("resnets", "block")):
        name = name.replace(theirs, original)
    return name


def write(folder: Path, path: Path) -> Path:
    """Write the model in `folder` to `path`."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        out[f"model.diffusion_model.{_unet(name)}"] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = _vae(name)
        if ".attn_1." in original and original.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # they are convolutions there
        out[f"first_stage_model.{original}"] = tensor.contiguous()
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        out[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor  # gone from 5.6 on
    save_file(out, path)
    return path
