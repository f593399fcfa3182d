"""Tiny models with the real block structures, and LoRA files built for them independently of the package's code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spf_plugin.lorafile import names

TEXT_LAYERS = 2
_PREFIX = {"unet": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"}


def unet_config(base: str) -> dict[str, Any]:
    """Arguments of a UNet2DConditionModel with the blocks of `base` and small widths."""
    common = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 8}
    if base == "sdxl":
        return common | {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
            "cross_attention_dim": 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        }
    return common | {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "use_linear_projection": base == "sd2",
        "cross_attention_dim": 48,
    }


def text_encoder(width: int, projection: bool = False) -> torch.nn.Module:
    """A CLIP text model of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=TEXT_LAYERS, num_attention_heads=4,
        vocab_size=64, projection_dim=width, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def pipeline(base: str) -> Any:
    """A diffusers pipeline that can load LoRAs: random UNet and text encoders, nothing else."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**unet_config(base))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if base == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                vae=vae, text_encoder=text_encoder(32), text_encoder_2=text_encoder(48, True), tokenizer=None,
                tokenizer_2=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
            )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder(32), tokenizer=None, unet=unet, scheduler=diffusers.DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


@cache
def reference(base: str) -> Any:
    """A pipeline to read names and shapes from; nothing is ever loaded into it."""
    return pipeline(base)


def components(pipe: Any) -> dict[str, torch.nn.Module]:
    out = {"unet": pipe.unet, "te1": pipe.text_encoder}
    if hasattr(pipe, "text_encoder_2"):
        out["te2"] = pipe.text_encoder_2
    return out


def model_modules(pipe: Any) -> dict[tuple[str, str], torch.nn.Module]:
    """(component, path) -> the live module of every default and LoCon target, walked from the model itself."""
    out: dict[tuple[str, str], torch.nn.Module] = {}
    for component, model in components(pipe).items():
        for path, module in model.named_modules():
            if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            if component == "unet":
                if not any(part in path for part in (".attentions.", ".resnets.", "samplers.")):
                    continue
            elif ".layers." not in path:
                continue
            out[(component, path)] = module
    return out


@cache
def module_names(base: str, style: str = "kohya") -> dict[str, tuple[str, str]]:
    """Name in a kohya file -> (component, path), for every target of the tiny pipeline."""
    return {file_name(base, c, p, style): (c, p) for c, p in model_modules(reference(base))}


def default_target(component: str, path: str) -> bool:
    """What networks.lora trains without conv_dim."""
    return component != "unet" or ".attentions." in path


def factors(
    module: torch.nn.Module, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (down, up) of the shapes that kohya's LoRAModule has for `module`."""
    weight = module.weight
    if isinstance(module, torch.nn.Conv2d):
        down = torch.randn(rank, weight.shape[1], *module.kernel_size, generator=generator)
        up = torch.randn(weight.shape[0], rank, 1, 1, generator=generator)
    else:
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator)
    return (down * 0.1).to(dtype), (up * 0.1).to(dtype)


def file_name(base: str, component: str, path: str, style: str = "kohya") -> str:
    """Name in a kohya file; `style` may force ``diffusers`` block names, the paths of the live model."""
    if component != "unet":
        prefix = _PREFIX[component] if base == "sdxl" else "lora_te_"
        return prefix + path.replace(".", "_")
    if base == "sdxl" and style == "kohya":
        path = sgm_path(path)
    return "lora_unet_" + path.replace(".", "_")


def sgm_path(path: str) -> str:
    """SGM name of a diffusers UNet path, by the arithmetic of the original checkpoints (SDXL)."""
    parts = path.split(".")
    rest = ".".join(parts[4:])
    if parts[2] == "resnets" or parts[1] == "resnets":
        for old, new in (("conv1", "in_layers.2"), ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
                         ("conv_shortcut", "skip_connection")):  # fmt: skip
            path = path.replace(old, new)
        rest = ".".join(path.split(".")[4:])
    if parts[0] == "mid_block":
        index = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return f"middle_block.{index}." + ".".join(path.split(".")[3:])
    i, kind, j = int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{3 + 3 * i}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{2 + 3 * i}.2.conv"
    index = 1 + 3 * i + j if parts[0] == "down_blocks" else 3 * i + j
    block = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
    return f"{block}.{index}.{int(kind == 'attentions')}.{rest}"


def make_lora(
    pipe: Any,
    base: str,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    dtype: torch.dtype = torch.float32,
    conv: bool = False,
    style: str = "kohya",
    keep: Callable[[str, str], bool] = lambda component, path: True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A LoRA for the tiny pipeline as kohya would save it."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {}
    for (component, path), module in model_modules(pipe).items():
        if not keep(component, path) or not (conv or default_target(component, path)):
            continue
        down, up = factors(module, rank, generator, dtype)
        name = file_name(base, component, path, style)
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = down, up
    return out


def full_lora(
    base: names.Base, *, conv: bool = False, text: bool = True, rank: int = 1, alpha: float = 1.0,
    dtype: torch.dtype = torch.float16, keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A file with the real names and shapes of a released base model; factors are constant, so it is made quickly."""
    out: dict[str, torch.Tensor] = {}
    groups = {"attention"} | ({"conv"} if conv else set()) | ({"text"} if text else set())
    for m in names.modules(base):
        name = names.kohya_name(base, m)
        if m.group not in groups or not keep(name):
            continue
        tail = {"linear": (), "conv1": (1, 1), "conv3": (3, 3)}[m.kind]
        out[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        out[f"{name}.lora_down.weight"] = torch.full((rank, m.fan_in, *tail), 0.01, dtype=dtype)
        out[f"{name}.lora_up.weight"] = torch.full((m.fan_out, rank, *(1 for _ in tail)), 0.02, dtype=dtype)
    return out


def slow_delta(down: torch.Tensor, up: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """(alpha / rank) * up @ down as an explicit sum over ranks in float64, in the shape [out, in, ...]."""
    rank = down.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    down, up = down.double(), up.double().flatten(1)
    total = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for r in range(rank):
        total += torch.einsum("o,i...->oi...", up[:, r], down[r])
    return scale * total


def deltas(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module name -> delta of every plain LoRA module of a kohya file, flattened to [out, -1]."""
    out = {}
    for key, down in state_dict.items():
        if key.endswith(".lora_down.weight"):
            name = key[: -len(".lora_down.weight")]
            alpha = state_dict.get(f"{name}.alpha")
            value = None if alpha is None else float(alpha)
            out[name] = slow_delta(down, state_dict[f"{name}.lora_up.weight"], value).flatten(1)
    return out


def metadata_for(base: str) -> dict[str, str]:
    """What the host passes at least."""
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base]
    return {"ss_base_model_version": version, "ss_v2": str(base == "sd2")}


def hosts() -> list[Path]:
    """sd-scripts checkouts on this machine: SPF_SD_SCRIPTS, then ~/.cache/spf-plugin/sd-scripts-*."""
    listed: Iterable[str] = os.environ.get("SPF_SD_SCRIPTS", "").split(os.pathsep)
    found = [Path(p) for p in listed if p]
    found += sorted((Path.home() / ".cache" / "spf-plugin").glob("sd-scripts-*"))
    return [p for p in dict.fromkeys(found) if (p / "networks" / "lora.py").is_file()]


# Start of a script that imports networks.lora of the checkout in sys.argv[1]. The host imports torchvision's transforms
# at the top of a module; no network needs them, so a stub does where torchvision is missing or broken.
HOST_PREAMBLE = r"""
import json, logging, sys, types, unittest.mock
sys.path.insert(0, sys.argv[1])
logging.disable(logging.INFO)
import torch
from transformers import CLIPTextConfig, CLIPTextModel
from diffusers import AutoencoderKL
try:
    import torchvision
except (ImportError, RuntimeError):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    stub = sys.modules["torchvision"] = types.ModuleType("torchvision")
    stub.transforms = sys.modules["torchvision.transforms"] = unittest.mock.MagicMock()
"""
