"""A LoRA of a model that musubi-tuner trains, from anyone's names to the host's and to diffusers'; of FLUX.2 what
diffusers splits is `dit_convert`'s."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import dit_names, musubi_names, names, plain
from spf_plugin.lorafile.factors import ALPHA, DOWN, UP
from spf_plugin.lorafile.findings import some
from spf_plugin.lorafile.inspect import Description

StateDict = Mapping[str, torch.Tensor]


def to_host(state_dict: StateDict, description: Description, notes: list[str]) -> dict[str, torch.Tensor]:
    """The same under the names that the host writes and reads, with an alpha for every plain module, without which it
    stops.

    Args:
        state_dict: LoRA of any algorithm.
        description: of it.
        notes: gets a line for what was taken apart, and for alphas that were added.

    Raises:
        SPFError: a module that the host does not have, or two entries for one; another algorithm in Z-Image's q, k
            and v in one.
    """
    base: names.DitBase = description.base  # type: ignore[assignment]
    unknown = [group.name for group in description.groups if group.resolved is None]
    if unknown:
        raise SPFError(f"{some(unknown)} is no module of {names.BASE_LABEL[base]} that is known here.")
    out: dict[str, torch.Tensor] = {}
    taken: dict[str, str] = {}
    apart = added = 0
    for group in description.groups:
        assert group.resolved is not None
        parts = {suffix: state_dict[key] for suffix, key in group.keys.items()}
        path = group.resolved.module.path
        if group.resolved.style == "fused":
            pieces = _apart(group.name, path, parts)
            apart += 1
        else:
            pieces = {path: parts}
        for own, found in pieces.items():
            name = f"lora_unet_{own.replace('.', '_')}"
            if name in taken:
                raise SPFError(
                    f"Both {taken[name]} and {group.name} are {own}. Which is meant cannot be told: save it again."
                )
            taken[name] = group.name
            if DOWN in found and ALPHA not in found:
                found = {**found, ALPHA: torch.tensor(float(found[DOWN].shape[0]))}
                added += 1
            out |= {f"{name}.{suffix}": tensor for suffix, tensor in found.items()}
    if apart:
        notes.append(
            f"{apart} modules of ComfyUI's checkpoint taken apart, which hold q, k and v in one or are renamed"
        )
    if added:
        notes.append(f"the rank as alpha added to {added} modules that had none")
    return out


def _apart(name: str, path: str, parts: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Host's path -> factors, of a module of Z-Image's checkpoint for ComfyUI. Every part gets its rows of lora_up, and
    of the ranks those that it uses: of three LoRAs put together each its own."""
    paths = musubi_names.unfused(path)
    if len(paths) == 1:
        return {paths[0]: dict(parts)}
    if not {DOWN, UP} <= set(parts) <= {DOWN, UP, ALPHA}:
        raise SPFError(f"Only plain LoRA of q, k and v in one can be taken apart; {name} is not.")
    down, up = parts[DOWN], parts[UP]
    if up.shape[0] % len(paths):
        raise SPFError(f"{name} has {up.shape[0]} outputs, not three times as many as q. It is not taken apart.")
    scale = float(parts[ALPHA]) / down.shape[0] if ALPHA in parts else 1.0
    out = {}
    for own, rows in zip(paths, up.chunk(len(paths)), strict=True):
        used = rows.any(dim=0)
        if not bool(used.any()):
            used[0] = True  # a delta of zero is a LoRA too
        alpha = torch.tensor(scale * int(used.sum()))
        out[own] = {DOWN: down[used].contiguous(), UP: rows[:, used].contiguous(), ALPHA: alpha}
    return out


def to_diffusers(state_dict: StateDict, description: Description, notes: list[str]) -> dict[str, torch.Tensor]:
    """The same under diffusers' names, alpha multiplied in and of one rank: ``transformer.PATH.lora_A.weight``.

    Args:
        state_dict: of plain LoRA; not of FLUX.2.
        description: of it.
        notes: gets a line for what was multiplied in, padded or rounded.

    Raises:
        SPFError: another algorithm, or a module that is not known.
    """
    base: names.DitBase = description.base  # type: ignore[assignment]
    if odd := plain.odd(description):
        raise SPFError(f"diffusers loads plain LoRA of {names.BASE_LABEL[base]} only; {some(odd)} is not.")
    table = {module.path: module for module in dit_names.modules(base)}
    pieces: dict[str, dict[str, torch.Tensor]] = {}
    for group in description.groups:
        assert group.resolved is not None
        parts = {suffix: state_dict[key] for suffix, key in group.keys.items()}
        path = group.resolved.module.path
        pieces |= _apart(group.name, path, parts) if group.resolved.style == "fused" else {path: parts}
    out: dict[str, torch.Tensor] = {}
    alphas: list[bool] = []
    ragged = 0
    top = max(parts[DOWN].shape[0] for parts in pieces.values())
    for path, parts in pieces.items():
        own, rank = parts[UP], parts[DOWN].shape[0]
        up, exact = plain.times(own, float(parts[ALPHA]) / rank if ALPHA in parts else 1.0)
        alphas += [exact] if up is not own else []
        ragged += rank < top
        down, up = plain.padded(parts[DOWN], up, top)
        name = dit_names.diffusers_name(base, table[path])
        out |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    plain.say_padded(ragged, top, notes)
    plain.say_alphas(alphas, notes)
    return out
