"""A key that answers to the left half of an image, in the host's own models.

The left half of a wide noise is shifted, so that its queries differ from the right half's. The key of one token, in
every compared layer, is made what separates the two best (least squares). Its map must then lie on the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin.core.sfcm import mean_maps
from spf_plugin.families.known import find
from spf_plugin.probe import capture, pass_of
from tests.hosts.dits.kinds import Planted

STRENGTH = 6.0  # of the logits


def separating(query: Tensor, grid: tuple[int, int], heads: int, shared: int) -> Tensor:
    """`[1, N, C]` -> the keys `[heads, d]` that answer 1 on the left half, -1 on the right: one for `shared` heads."""
    h, w = grid
    left = torch.arange(w).repeat(h) < w // 2
    wanted = torch.where(left, 1.0, -1.0)[:, None].repeat_interleave(shared, dim=0)
    by_key = query[0].unflatten(-1, (heads // shared, shared, -1)).transpose(0, 1).flatten(1, 2)  # [keys, N shared, d]
    keys = [torch.linalg.lstsq(queries, wanted).solution[:, 0] for queries in by_key]
    return torch.stack(keys).repeat_interleave(shared, dim=0) * STRENGTH * by_key.shape[-1] ** 0.5


@torch.no_grad()
def spread(made: Planted, which: str) -> dict[str, Any]:
    """How the attention to the planted key is spread over the image, in the layers of one kind."""
    family = find(made.model)
    layers = family.layers(which)
    groups = torch.zeros(1, made.length, 2)
    groups[0, made.position, 0] = groups[0, list(made.padding), 1] = 1
    hooks = []
    for layer in layers:  # one after the other: each changes what the later ones see
        with capture(layers) as seen:
            made.call.on(made.model)
        query, _ = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], made.call)
        key = separating(query, family.grid(query.shape[1], made.size), layer.heads, made.shared)

        def plant(_module: nn.Module, _inputs: object, output: Any, key: Tensor = key) -> Any:
            return made.plant(output, made.position, key)

        hooks.append(layer.key.register_forward_hook(plant))
    with capture(layers) as seen:
        output = made.call.on(made.model)
    for hook in hooks:
        hook.remove()
    found = pass_of(family, layers, made.call, output, seen, groups)
    h, w = made.size
    (planted, padding) = mean_maps(found.attention, found.grids, made.size)[0]
    parts = {
        "left": planted[:, : w // 2],
        "right": planted[:, w // 2 :],
        "top": planted[: h // 2],
        "bottom": planted[h // 2 :],
        "padding": padding,
    }
    return {"grid": found.grids[0], **{name: float(part.mean()) for name, part in parts.items()}}
