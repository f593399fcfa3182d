"""Kinds of LoRA files of the models that musubi-tuner trains, with what their authors meant, as `dit_kinds` has them of
sd-scripts' transformers: tiny models, modules by musubi-tuner's paths, nothing of the package's code."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from tests.lorafile.dit_kinds import A_B, DEFAULT, OLD
from tests.lorafile.kinds import Draw, File, Weights, lokr, lora

WIDTH, TEXT, MLP = 64, 32, 128
BASES = ("zimage", "qwen_image", "flux2", "krea2", "wan")
METADATA = {"zimage": "z_image", "qwen_image": "qwen_image", "flux2": "flux_2_klein_4b", "krea2": "krea2", "wan": "wan"}
QKV = ("to_q", "to_k", "to_v")


def shapes(base: str) -> dict[str, tuple[int, int]]:
    """musubi-tuner's path -> (outputs, inputs) of the tiny models that `musubi_programs.transformer` makes, two blocks
    deep; what its networks take by default."""
    w, out = WIDTH, {}
    for i in range(2):
        if base == "zimage":
            out |= {f"layers.{i}.attention.{p}": (w, w) for p in (*QKV, "to_out.0")}
            out |= {f"layers.{i}.feed_forward.{p}": (170, w) for p in ("w1", "w3")}
            out[f"layers.{i}.feed_forward.w2"] = (w, 170)
        elif base == "qwen_image":
            block = f"transformer_blocks.{i}"
            added = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
            out |= {f"{block}.attn.{p}": (w, w) for p in (*QKV, *added, "to_out.0")}
            for side in ("img_mlp", "txt_mlp"):
                out |= {f"{block}.{side}.net.0.proj": (4 * w, w), f"{block}.{side}.net.2": (w, 4 * w)}
        elif base == "flux2":
            for side in ("img", "txt"):
                block = f"double_blocks.{i}.{side}"
                out |= {f"{block}_attn.qkv": (3 * w, w), f"{block}_attn.proj": (w, w)}
                out |= {f"{block}_mlp.0": (6 * w, w), f"{block}_mlp.2": (w, 3 * w)}
            out |= {f"single_blocks.{i}.linear1": (9 * w, w), f"single_blocks.{i}.linear2": (w, 4 * w)}
        elif base == "wan":
            for side in ("self_attn", "cross_attn"):
                out |= {f"blocks.{i}.{side}.{p}": (w, w) for p in "qkvo"}
            out |= {f"blocks.{i}.ffn.0": (MLP, w), f"blocks.{i}.ffn.2": (w, MLP)}
        else:
            out |= _krea2(f"blocks.{i}", w, 2)
            out |= _krea2(f"txtfusion.layerwise_blocks.{i}", w, 1) | _krea2(f"txtfusion.refiner_blocks.{i}", w, 1)
    if base == "krea2":
        out |= {"first": (w, 16), "last.linear": (16, w), "tmlp.0": (w, 16), "tmlp.2": (w, w), "tproj.1": (6 * w, w)}
        out |= {"txtmlp.1": (w, w), "txtmlp.3": (w, w), "txtfusion.projector": (1, 3)}
    return out


def _krea2(block: str, w: int, groups: int) -> dict[str, tuple[int, int]]:
    out = {f"{block}.attn.{p}": (w, w) for p in ("wq", "wo", "gate")}
    out |= {f"{block}.attn.{p}": (w // groups, w) for p in ("wk", "wv")}
    return out | {f"{block}.mlp.{p}": (MLP, w) for p in ("gate", "up")} | {f"{block}.mlp.down": (w, MLP)}


def model(base: str) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {path: torch.randn(*shape, generator=generator) for path, shape in shapes(base).items()}


# ---- where diffusers has a module -----------------------------------------------------------------------------------

_WAN = (
    (r"self_attn\.([qkv])$", r"attn1.to_\1"), (r"cross_attn\.([qkv])$", r"attn2.to_\1"),
    ("self_attn.o", "attn1.to_out.0"), ("cross_attn.o", "attn2.to_out.0"),
    (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"),
)  # fmt: skip
_KREA2 = (
    ("^blocks", "transformer_blocks"), ("txtfusion", "text_fusion"), (r"attn\.w([qkv])", r"attn.to_\1"),
    (r"attn\.wo", "attn.to_out.0"), (r"attn\.gate", "attn.to_gate"), (r"\.mlp\.", ".ff."), ("^first$", "img_in"),
    ("^last", "final_layer"), (r"tmlp\.0", "time_embed.linear_1"), (r"tmlp\.2", "time_embed.linear_2"),
    (r"tproj\.1", "time_mod_proj"), (r"txtmlp\.1", "txt_in.linear_1"), (r"txtmlp\.3", "txt_in.linear_2"),
)  # fmt: skip
_FLUX2 = (
    ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks"),
    (r"img_attn\.proj", "attn.to_out.0"), (r"txt_attn\.proj", "attn.to_add_out"), (r"img_mlp\.0", "ff.linear_in"),
    (r"img_mlp\.2", "ff.linear_out"), (r"txt_mlp\.0", "ff_context.linear_in"),
    (r"txt_mlp\.2", "ff_context.linear_out"), ("linear1", "attn.to_qkv_mlp_proj"), ("linear2", "attn.to_out"),
)  # fmt: skip
_PLACES = {"wan": _WAN, "krea2": _KREA2, "flux2": _FLUX2}


def diffusers_paths(base: str, path: str) -> tuple[str, ...]:
    """diffusers' module, or its three where it splits; of the same rows in order."""
    for whole, parts in (("img_attn.qkv", QKV), ("txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        if base == "flux2" and path.endswith(whole):
            block = path.removesuffix(whole).replace("double_blocks", "transformer_blocks")
            return tuple(f"{block}attn.{part}" for part in parts)
    for pattern, theirs in _PLACES.get(base, ()):
        path = re.sub(pattern, theirs, path)
    return (path,)


# ---- spellings ------------------------------------------------------------------------------------------------------

Maker = Callable[[Draw, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
MUSUBI = "lora_unet_"


def plain(draw: Draw, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return lora(draw, weight, alpha=None)


def ranks(draw: Draw, weight: torch.Tensor, alpha: float | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return lora(draw, weight, 8 if weight.shape[0] > weight.shape[1] else 4, alpha)


def of(
    base: str, weights: Weights, draw: Draw, make: Maker, prefix: str = MUSUBI, spell: dict[str, str] | None = None
) -> File:
    """`make` of every module, under musubi-tuner's paths."""
    out = File(metadata={"ss_base_model_version": METADATA[base]})
    for path, weight in weights.items():
        parts, out.meant[path] = make(draw, weight)
        name = f"{prefix}{path.replace('.', '_') if prefix.endswith('_') else path}"
        out.tensors |= {f"{name}.{(spell or {}).get(suffix, suffix)}": t for suffix, t in parts.items()}
    return out


def diffusers(
    base: str, weights: Weights, draw: Draw, make: Maker, prefix: str = "transformer.", spell: dict[str, str] = A_B
) -> File:
    """`make` of every module, under diffusers' paths; where those split a module, every part gets the whole's down."""
    out = File(metadata={"ss_base_model_version": METADATA[base]})
    for path, weight in weights.items():
        parts, out.meant[path] = make(draw, weight)
        paths = diffusers_paths(base, path)
        for i, theirs in enumerate(paths):
            name = f"{prefix}{theirs.replace('.', '_') if prefix.endswith('_') else theirs}"
            for suffix, tensor in parts.items():
                piece = tensor.chunk(len(paths))[i].contiguous() if suffix == "lora_up.weight" else tensor
                out.tensors[f"{name}.{spell.get(suffix, suffix)}"] = piece.clone()
    return out


def _some(weights: Weights, part: str) -> Weights:
    return {path: weight for path, weight in weights.items() if part in path}


def _even(weights: Weights) -> Weights:
    """Those that a Kronecker product of this size can have."""
    return {path: weight for path, weight in weights.items() if not any(n % 4 for n in weight.shape)}


def _fused(weights: Weights, draw: Draw, prefix: str = MUSUBI) -> File:
    """Z-Image as musubi-tuner's `convert_z_image_lora_to_comfy.py` writes it: q, k and v in one, block by block."""
    single = of("zimage", weights, draw, lora)
    out = File({}, single.meant, single.metadata)
    for i in range(2):
        block = f"{MUSUBI}layers_{i}_attention"
        whole = f"{prefix}layers{'_' if prefix.endswith('_') else '.'}{i}"
        whole += "_attention_" if prefix.endswith("_") else ".attention."
        q, k, v = ({s: single.tensors.pop(f"{block}_{p}.{s}") for s in ("lora_down.weight", "lora_up.weight", "alpha")}
                   for p in QKV)  # fmt: skip
        out.tensors[f"{whole}qkv.lora_down.weight"] = torch.cat([p["lora_down.weight"] for p in (q, k, v)])
        out.tensors[f"{whole}qkv.lora_up.weight"] = torch.block_diag(*[p["lora_up.weight"] for p in (q, k, v)])
        out.tensors[f"{whole}qkv.alpha"] = q["alpha"] * 3
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha"):
            out.tensors[f"{whole}out.{suffix}"] = single.tensors.pop(f"{block}_to_out_0.{suffix}")
    for key, tensor in single.tensors.items():
        name, _, suffix = key.removeprefix(MUSUBI).partition(".")
        path = re.sub(r"layers_(\d)_feed_forward_", r"layers.\1.feed_forward.", name) if prefix[-1] == "." else name
        out.tensors[f"{prefix}{path}.{suffix}"] = tensor
    return out


BUILD: dict[str, Callable[[str, Weights, Draw], File]] = {
    "musubi": lambda b, w, d: of(b, w, d, lora),
    "musubi, attention": lambda b, w, d: of(b, _some(w, "att"), d, lora),
    "musubi, second block": lambda b, w, d: of(b, _some(w, ".1."), d, lora),
    "musubi, no alpha": lambda b, w, d: of(b, w, d, plain),
    "musubi, ranks differ": lambda b, w, d: of(b, w, d, lambda d, x: ranks(d, x, 2.0)),
    "musubi, lokr": lambda b, w, d: of(b, _even(w), d, lokr),
    "diffusion_model": lambda b, w, d: of(b, w, d, plain, "diffusion_model.", A_B),
    "diffusion_model, attention": lambda b, w, d: of(b, _some(w, "att"), d, plain, "diffusion_model.", A_B),
    "diffusion_model, alpha": lambda b, w, d: of(b, w, d, lora, "diffusion_model.", A_B),
    "diffusion_model, down and up, alpha": lambda b, w, d: of(b, w, d, lora, "diffusion_model."),
    "diffusion_model, lokr": lambda b, w, d: of(b, _even(w), d, lokr, "diffusion_model."),
    "base_model": lambda b, w, d: of(b, w, d, plain, "base_model.model.", A_B),
    "diffusers": lambda b, w, d: diffusers(b, w, d, plain),
    "diffusers, second block": lambda b, w, d: diffusers(b, _some(w, ".1."), d, plain),
    "diffusers, ranks differ": lambda b, w, d: diffusers(b, w, d, ranks),
    "diffusers, alpha": lambda b, w, d: diffusers(b, w, d, lora),
    "diffusers, default": lambda b, w, d: diffusers(b, w, d, plain, spell=DEFAULT),
    "diffusers, down and up, alpha": lambda b, w, d: diffusers(b, w, d, lora, spell={}),
    "diffusers, down and up, old": lambda b, w, d: diffusers(b, w, d, plain, spell=OLD),
    "diffusers, bare": lambda b, w, d: diffusers(b, w, d, plain, ""),
    "onetrainer": lambda b, w, d: diffusers(b, w, d, lora, "lora_transformer_", {}),
    "simpletuner": lambda b, w, d: diffusers(b, w, d, lora, "lycoris_", {}),
    "fused": lambda b, w, d: _fused(w, d),
    "fused, diffusion_model": lambda b, w, d: _fused(w, d, "diffusion_model."),
}


def of_base(base: str) -> list[str]:
    """The kinds that there are for `base`."""
    return [kind for kind in BUILD if base == "zimage" or not kind.startswith("fused")]


def build(kind: str, base: str, weights: Weights) -> File:
    """The file of `kind`, the same every time."""
    return BUILD[kind](base, weights, Draw(torch.float32))
