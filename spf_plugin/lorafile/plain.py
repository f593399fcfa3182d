"""Plain LoRA: what of a file is none, and alpha multiplied into a factor, for names that have no alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spf_plugin.lorafile.inspect import Description, Group

_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")


def odd(description: Description) -> list[str]:
    """What is no plain LoRA of a known module: modules, and tensors of plain modules (`diff_b`, `dora_scale`)."""
    modules = [g.name for g in description.groups if g.algorithm != "LoRA" or not g.resolved]
    return modules + [
        key
        for g in description.groups
        if g.name not in modules
        for suffix, key in g.keys.items()
        if suffix not in _SUFFIXES
    ]


def scale(state_dict: Mapping[str, torch.Tensor], group: Group) -> float:
    """alpha / rank; 1 without an alpha."""
    alpha = group.keys.get("alpha")
    return float(state_dict[alpha]) / state_dict[group.keys["lora_down.weight"]].shape[0] if alpha else 1.0


def times(up: torch.Tensor, scale: float) -> tuple[torch.Tensor, bool]:
    """The product in the factor's own dtype (itself where `scale` is 1), and whether that is exact."""
    if scale == 1:
        return up, True
    exact = up.double() * scale
    out = exact.to(up.dtype)
    return out, bool((out.double() == exact).all())


def padded(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of a linear layer with zeros up to `rank`; themselves where they have it."""
    missing = rank - down.shape[0]
    if not missing:
        return down, up
    down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
    return down, torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)


def say_padded(count: int, rank: int, notes: list[str]) -> None:
    """Note how many modules were padded, if any."""
    if count:
        notes.append(f"{count} modules padded with zeros to rank {rank}, as diffusers 0.35 takes every rank for one")


def say_alphas(exact: Sequence[bool], notes: list[str]) -> None:
    """Note where alpha / rank was multiplied in: per module whether that was exact."""
    if exact:
        rounded = "" if all(exact) else f", in {exact.count(False)} of them rounded to the file's dtype"
        notes.append(f"alpha / rank multiplied into {len(exact)} modules{rounded}")
