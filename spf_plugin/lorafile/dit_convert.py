"""A transformer's LoRA from the checkpoint's modules to diffusers', which splits them, and back; without a rounding
where the scales allow it.

Splitting is exact: every part gets the same lora_down and its rows of lora_up. Putting together is exact too, but ranks
add up: the parts' lora_down stand one under the other, their lora_up on the diagonal. Parts with one and the same
lora_down, as splitting makes them, keep their rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import dit_names, dit_parts, names, plain
from spf_plugin.lorafile.dit_parts import Part
from spf_plugin.lorafile.findings import some
from spf_plugin.lorafile.inspect import Description, Group

StateDict = Mapping[str, torch.Tensor]
SPLIT = ("sd3", "flux", "chroma", "lumina", "flux2")  # that diffusers loads a LoRA of, by modules that it splits


def is_split(description: Description) -> bool:
    """Whether a file has diffusers' names of a model whose modules it splits."""
    return any(group.resolved is not None and group.resolved.style == "split" for group in description.groups)


def _only_plain(description: Description) -> None:
    odd = plain.odd(description)
    if odd:
        raise SPFError(f"Only plain LoRA can be split or put together; {some(odd)} is not.")


def _swap(up: torch.Tensor) -> torch.Tensor:
    first, second = up.chunk(2)
    return torch.cat([second, first])


def split(state_dict: StateDict, description: Description, notes: list[str]) -> dict[str, torch.Tensor]:
    """A file under diffusers' names, alpha multiplied in and of one rank: ``transformer.PATH.lora_A.weight``.

    Args:
        state_dict: of plain LoRA.
        description: of it.
        notes: gets a line for what was rounded.

    Raises:
        SPFError: another algorithm, a text encoder, or a size that is no module's.
    """
    _only_plain(description)
    base: names.DitBase = description.base  # type: ignore[assignment]
    text = [g.name for g in description.groups if g.resolved and g.resolved.module.group == "text"]
    if text:
        raise SPFError(
            f"The file also trains text encoders, e.g. {some(text, 1)}, which no conversion to diffusers is known "
            "for here. Train the transformer alone for diffusers, or use the file in ComfyUI."
        )
    out: dict[str, torch.Tensor] = {}
    alphas: list[bool] = []
    ragged = 0
    top = max(state_dict[group.keys["lora_down.weight"]].shape[0] for group in description.groups)
    for group in description.groups:
        assert group.resolved is not None
        down, own = (state_dict[group.keys[s]] for s in ("lora_down.weight", "lora_up.weight"))
        up, exact = plain.times(own, plain.scale(state_dict, group))
        alphas += [exact] if up is not own else []
        ragged += down.shape[0] < top
        down, up = plain.padded(down, up, top)
        if group.resolved.style == "split":
            pieces = [(dit_parts.parts(base)[group.resolved.module.path], up)]
        else:
            pieces = _pieces(dit_parts.siblings(base)[group.resolved.module.sgm], group.name, down.shape[1], up)
        for part, rows in pieces:
            out[f"transformer.{part.module.path}.lora_A.weight"] = down
            out[f"transformer.{part.module.path}.lora_B.weight"] = rows.contiguous()
    plain.say_padded(ragged, top, notes)
    plain.say_alphas(alphas, notes)
    return out


def _pieces(parts: Sequence[Part], name: str, fan_in: int, up: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    if len(parts) == 1:
        turned = dit_parts.swapped(parts[0].module.path, fan_in, up.shape[0])
        return [(parts[0], _swap(up) if turned else up)]
    sizes = [part.module.fan_out * fan_in // part.module.fan_in for part in parts]
    if sum(sizes) != up.shape[0]:
        raise SPFError(
            f"{name} has {up.shape[0]} outputs, not the {sum(sizes)} of {len(parts)} parts. It is not split."
        )
    return list(zip(parts, up.split(sizes), strict=True))


def join(state_dict: StateDict, description: Description, notes: list[str]) -> dict[str, torch.Tensor]:
    """A file of diffusers' names under kohya's, with alphas; text encoders get kohya's names too.

    Args:
        state_dict: of plain LoRA.
        description: of it.
        notes: gets a line for what was put together, and for what was rounded.

    Raises:
        SPFError: another algorithm, or a module that kohya's networks do not have.
    """
    _only_plain(description)
    base: names.DitBase = description.base  # type: ignore[assignment]
    outside = [g.name for g in description.groups if g.resolved and g.resolved.module.group == "extra"]
    if outside:
        raise SPFError(f"{some(outside)} is outside the blocks, where kohya's networks have no module of that name.")
    out: dict[str, torch.Tensor] = {}
    wholes: dict[str, list[Group]] = {}
    for group in description.groups:
        assert group.resolved is not None
        if group.resolved.style == "split":
            wholes.setdefault(group.resolved.module.sgm, []).append(group)
        else:
            name = dit_names.kohya_name(base, group.resolved.module)
            out |= {f"{name}.{suffix}": state_dict[key] for suffix, key in group.keys.items()}
    alphas: list[bool] = []
    grown = 0
    for whole, groups in wholes.items():
        down, up, alpha, exact = _joined(state_dict, groups, dit_parts.siblings(base)[whole], base)
        name = f"lora_unet_{dit_names.host_path(base, whole).replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        alphas += exact
        grown = max(grown, down.shape[0] if len(groups) > 1 else 0)
    count = sum(len(groups) for groups in wholes.values())
    more = f"; ranks add up, to {grown} at most" if grown else ""
    notes.append(f"{count} modules of diffusers are {len(wholes)} of kohya's{more}")
    plain.say_alphas(alphas, notes)
    return out


def _joined(
    state_dict: StateDict, groups: Sequence[Group], siblings: tuple[Part, ...], base: names.DitBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[bool]]:
    """lora_down, lora_up and alpha of one module of the checkpoint, and whether the factors that alpha was multiplied
    into are exact."""
    downs = [state_dict[g.keys["lora_down.weight"]] for g in groups]
    ups = [state_dict[g.keys["lora_up.weight"]] for g in groups]
    scales = [plain.scale(state_dict, g) for g in groups]
    exact: list[bool] = []
    if len(set(scales)) > 1:
        multiplied = [plain.times(up, scale) for up, scale in zip(ups, scales, strict=True)]
        ups, exact = [up for up, _ in multiplied], [is_exact for _, is_exact in multiplied]
        scales = [1.0] * len(groups)
    same = all(downs[0].shape == down.shape and torch.equal(downs[0], down) for down in downs[1:])
    down = downs[0] if same else torch.cat(downs)
    fan_in, rank = down.shape[1], down.shape[0]
    if len(siblings) == 1:
        up = ups[0]
        assert groups[0].resolved is not None
        up = _swap(up) if dit_parts.swapped(groups[0].resolved.module.path, fan_in, up.shape[0]) else up
    else:
        outputs = sum(part.module.fan_out for part in siblings) * fan_in // siblings[0].module.fan_in
        up = torch.zeros(outputs, rank, dtype=ups[0].dtype)
        column = 0
        for group, rows in zip(groups, ups, strict=True):
            assert group.resolved is not None
            part = dit_parts.parts(base)[group.resolved.module.path]
            start, wanted = (n * fan_in // part.module.fan_in for n in (part.start, part.module.fan_out))
            if rows.shape[0] != wanted:
                raise SPFError(f"{group.name} has {rows.shape[0]} outputs, not {wanted}. It is not put together.")
            up[start : start + rows.shape[0], column : column + rows.shape[1]] = rows
            column += 0 if same else rows.shape[1]
    return down, up, torch.tensor(scales[0] * rank, dtype=torch.float32), exact
