"""Kinds of LoRA files of the transformers in diffusers' own names, with what their authors meant, as `kinds` has them
of SD and SDXL: tiny models, modules by diffusers' paths, nothing of the package's code."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.lorafile.dit_programs import CONFIG, WIDTH
from tests.lorafile.kinds import Draw, File, Weights, dora, lokr, lora

BASES = tuple(CONFIG)
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
METADATA = {"sd3": "sd3_5_medium", "flux": "flux1", "chroma": "chroma", "lumina": "lumina2"}


def shapes(base: str) -> dict[str, tuple[int, int]]:
    """Path -> (outputs, inputs) of the tiny models that `dit_programs.transformer` makes."""
    w = WIDTH
    out: dict[str, tuple[int, int]] = {}
    if base == "lumina":
        for part in ("noise_refiner.0", "context_refiner.0", "layers.0"):
            out |= {f"{part}.attn.to_q": (96, 96), f"{part}.attn.to_out.0": (96, 96)}
            out |= {f"{part}.attn.to_{p}": (32, 96) for p in "kv"}
            hidden = 4 * 96
            out |= {f"{part}.feed_forward.linear_{i}": (hidden, 96) for i in (1, 3)}
            out[f"{part}.feed_forward.linear_2"] = (96, hidden)
        return out
    for i in range(2):
        last = base == "sd3" and i == 1
        block = f"transformer_blocks.{i}"
        square = (*QKV, *ADDED, "attn.to_out.0") + (() if last else ("attn.to_add_out",))
        if base == "sd3" and i == 0:
            square += tuple(p.replace("attn.", "attn2.") for p in (*QKV, "attn.to_out.0"))
        out |= {f"{block}.{p}": (w, w) for p in square}
        for side in ("ff",) if last else ("ff", "ff_context"):
            out |= {f"{block}.{side}.net.0.proj": (4 * w, w), f"{block}.{side}.net.2": (w, 4 * w)}
        if base != "chroma":
            out[f"{block}.norm1.linear"] = ((9 if base == "sd3" and i == 0 else 6) * w, w)
            out[f"{block}.norm1_context.linear"] = ((2 if last else 6) * w, w)
        if base == "sd3":
            continue
        single = f"single_transformer_blocks.{i}"
        out |= {f"{single}.{p}": (w, w) for p in QKV}
        out |= {f"{single}.proj_mlp": (4 * w, w), f"{single}.proj_out": (w, 5 * w)}
        if base != "chroma":
            out[f"{single}.norm.linear"] = (3 * w, w)
    if base != "chroma":
        out["norm_out.linear"] = (2 * w, w)
    out |= {"proj_out": (16 if base == "sd3" else 8, w), "context_embedder": (w, 32)}
    return out


def model(base: str) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {path: torch.randn(*shape, generator=generator) for path, shape in shapes(base).items()}


def chosen(weights: Weights, *ends: str) -> Weights:
    """The modules inside the blocks whose path ends in one of `ends`, all without; no modulation."""

    out = {p: w for p, w in weights.items() if "." in p and "norm" not in p}
    return {p: w for p, w in out.items() if p.endswith(ends)} if ends else out


# ---- spellings ------------------------------------------------------------------------------------------------------

A_B = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
DEFAULT = {"lora_down.weight": "lora_A.default.weight", "lora_up.weight": "lora_B.default.weight"}
OLD = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}

Maker = Callable[[Draw, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def plain(draw: Draw, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return lora(draw, weight, alpha=None)


def of(
    base: str,
    weights: Weights,
    draw: Draw,
    make: Maker = plain,
    prefix: str = "transformer.",
    spell: dict[str, str] = A_B,
) -> File:
    out = File(metadata={"ss_base_model_version": METADATA[base]})
    for path, weight in weights.items():
        parts, out.meant[path] = make(draw, weight)
        name = f"{prefix}{path.replace('.', '_') if prefix.endswith('_') else path}"
        out.tensors |= {f"{name}.{spell.get(suffix, suffix)}": t for suffix, t in parts.items()}
    return out


def _ranks(draw: Draw, weight: torch.Tensor, alpha: float | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A rank of its own for what widens."""
    return lora(draw, weight, 8 if weight.shape[0] > weight.shape[1] else 4, alpha)


def _alphas(draw: Draw, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return lora(draw, weight, 4, 1.0 if weight.shape[0] > weight.shape[1] else 2.0)


def _dora(base: str, w: Weights, d: Draw) -> File:
    out = of(base, chosen(w, "attn.to_q"), d, lambda d, x: dora(d, x, True, alpha=None))
    for key in [k for k in out.tensors if k.endswith("dora_scale")]:
        out.tensors[key.replace("dora_scale", "lora_magnitude_vector")] = out.tensors.pop(key).flatten()
    return out


BUILD: dict[str, Callable[[str, Weights, Draw], File]] = {
    "peft": lambda b, w, d: of(b, chosen(w), d),
    "peft, attention only": lambda b, w, d: of(b, chosen(w, *QKV, *ADDED, "to_out.0", "to_add_out"), d),
    "peft, q, k, v and out of the image": lambda b, w, d: of(b, chosen(w, *QKV, "attn.to_out.0"), d),
    "peft, keys only": lambda b, w, d: of(b, chosen(w, "attn.to_k", "attn.add_k_proj"), d),
    "peft, queries and values only": lambda b, w, d: of(b, chosen(w, "attn.to_q", "attn.to_v"), d),
    "peft, modulation": lambda b, w, d: of(b, {p: x for p, x in w.items() if "norm" in p and "." in p[:-7]}, d),
    "peft, outside the blocks": lambda b, w, d: of(
        b, {p: x for p, x in w.items() if p in ("norm_out.linear", "proj_out", "context_embedder")}, d
    ),
    "peft, ranks differ": lambda b, w, d: of(b, chosen(w), d, lambda d, x: _ranks(d, x, None)),
    "peft, one alpha": lambda b, w, d: of(b, chosen(w), d, lora),
    "peft, alphas differ": lambda b, w, d: of(b, chosen(w), d, _alphas),
    "peft, ranks differ, one alpha": lambda b, w, d: of(b, chosen(w), d, lambda d, x: _ranks(d, x, 2.0)),
    "peft, default": lambda b, w, d: of(b, chosen(w), d, spell=DEFAULT),
    "peft, dora": _dora,
    "down and up": lambda b, w, d: of(b, chosen(w), d, spell={}),
    "down and up, alpha": lambda b, w, d: of(b, chosen(w), d, lora, spell={}),
    "down and up, old": lambda b, w, d: of(b, chosen(w), d, spell=OLD),
    "onetrainer": lambda b, w, d: of(b, chosen(w), d, lora, "lora_transformer_", {}),
    "onetrainer, attention only": lambda b, w, d: of(
        b, chosen(w, *QKV, *ADDED, "to_out.0", "to_add_out"), d, lora, "lora_transformer_", {}
    ),
    "simpletuner": lambda b, w, d: of(b, chosen(w), d, lora, "lycoris_", {}),
    "simpletuner, lokr": lambda b, w, d: of(b, chosen(w), d, lokr, "lycoris_", {}),
    "base_model": lambda b, w, d: of(b, chosen(w), d, prefix="base_model.model."),
}  # fmt: skip


def of_base(base: str) -> list[str]:
    """The kinds that there are for `base`."""
    without = {"lumina": ("modulation", "outside"), "chroma": ("modulation",)}.get(base, ())
    return [kind for kind in BUILD if not any(part in kind for part in without)]


def build(kind: str, base: str, weights: Weights) -> File:
    """The file of `kind`, the same every time."""
    return BUILD[kind](base, weights, Draw(torch.float32))
