"""Factors of one module in plainer forms, which more loaders read. The weight delta stays as it is.

Tucker cores (LyCORIS' `use_tucker`) are multiplied into a factor, and `scalar` (`use_scalar`) as LyCORIS' own
`custom_state_dict` does.
"""

from __future__ import annotations

import torch

DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
SCALAR = "scalar"

Parts = dict[str, torch.Tensor]  # canonical suffix -> tensor
Modules = dict[str, Parts]  # module name -> its parts

# What takes the scalar, the first that is there.
_TAKES_SCALAR = (UP, "hada_w1_a", "lokr_w1", "lokr_w1_a")
# Core, its factor per output [r, out] and its factor per input [r, in], of LoHa's two halves and of LoKr's second.
_CORES = (
    ("hada_t1", "hada_w1_a", "hada_w1_b"),
    ("hada_t2", "hada_w2_a", "hada_w2_b"),
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"),
)


def is_lora(parts: Parts) -> bool:
    """Whether both factors of a plain LoRA are there."""
    return UP in parts and DOWN in parts


def plainer(modules: Modules, notes: list[str]) -> None:
    """Bring the factors of all modules into the forms that most loaders read, in place; `notes` says what was done."""
    _finite_lokr_alphas(modules, notes)
    _fold_scalars(modules, notes)
    _collapse_tucker(modules, notes)


def _finite_lokr_alphas(modules: Modules, notes: list[str]) -> None:
    """An alpha that nobody reads (`names.whole_lokr`) shall at least be a number."""
    done = 0
    for parts in modules.values():
        if {"lokr_w1", "lokr_w2", ALPHA} <= set(parts) and not bool(parts[ALPHA].double().isfinite().all()):
            parts[ALPHA] = torch.ones((), dtype=parts[ALPHA].dtype)
            done += 1
    if done:
        notes.append(f"{done} LoKr modules of whole factors: alpha 1 in place of infinity; no loader reads it")


def _fold_scalars(modules: Modules, notes: list[str]) -> None:
    """Multiply `scalar` into a factor: A1111 and ComfyUI would leave it out."""
    done = 0
    for parts in modules.values():
        taker = next((suffix for suffix in _TAKES_SCALAR if suffix in parts), None)
        if SCALAR in parts and parts[SCALAR].numel() == 1 and taker is not None:
            factor = parts[taker]
            parts[taker] = (factor.double() * float(parts.pop(SCALAR))).to(factor.dtype)
            done += 1
    if done:
        notes.append(f"{done} scalars multiplied into a factor (rounded to the file's dtype)")


def _collapse_tucker(modules: Modules, notes: list[str]) -> None:
    """Multiply Tucker cores into the factor per input.

    LoRA: up [o, r], mid [r, r, h, w], down [r, i] -> up, [r, i, h, w]. LoHa and LoKr: core [r, r, h, w], a [r, o],
    b [r, i] -> [o, r], [r, i h w].
    """
    done = 0
    for parts in modules.values():
        if MID in parts and is_lora(parts):
            down, mid = parts[DOWN], parts.pop(MID)
            flat = down.double().flatten(1)
            parts[DOWN] = torch.einsum("mnhw,ni->mihw", mid.double(), flat).to(down.dtype)
            done += 1
        for core, a, b in _CORES:
            if not {core, a, b} <= set(parts) or parts[core].dim() != 4:
                continue
            inputs = parts[b]
            product = torch.einsum("mnhw,ni->mihw", parts.pop(core).double(), inputs.double())
            parts[b] = product.flatten(1).to(inputs.dtype)
            parts[a] = parts[a].T.contiguous()
            done += 1
    if done:
        notes.append(f"{done} Tucker cores multiplied into a factor (rounded to the file's dtype)")
