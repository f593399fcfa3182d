"""The queries and keys that a family compares, beside those that the host's own attention is given."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.families.known import find
from spf_plugin.probe import capture
from spf_plugin.seam import Call


def _begin(part: Tensor, whole: Tensor) -> int | None:
    """Where rows `[N, heads, d]` lie in the rows `[L, heads, d]`, bit for bit."""
    steps = range(len(whole) - len(part) + 1)
    return next((i for i in steps if torch.equal(whole[i : i + len(part)], part)), None)


@torch.no_grad()
def compared(model: nn.Module, call: Call) -> dict[str, list[Any]]:
    """For each layer and sample, where in the sequence that the layer's attention is over the image's queries begin,
    and the text's valid keys. Every block calls torch's attention, once or once a sample, and nothing else does."""
    family = find(model)
    layers = family.layers("all")
    given: list[tuple[Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = zip(query.transpose(1, 2), key.transpose(1, 2), strict=True)  # [B, heads, L, d] of each
        given.extend(rows)
        return original(query, key, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attention), capture(layers) as seen:
        call.on(model)
    found: dict[str, list[Any]] = {}
    mask = family.text_mask(call)
    for i, layer in enumerate(layers):
        queries, keys = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], call)
        samples = len(queries)
        assert len(given) == samples * len(layers)
        found[layer.name] = []
        for b, (query, key) in enumerate(given[i * samples : (i + 1) * samples]):
            valid = slice(None) if mask is None else mask[b]
            ours = (queries[b].unflatten(-1, (layer.heads, -1)), keys[b][valid].unflatten(-1, (layer.heads, -1)))
            found[layer.name].append([_begin(ours[0], query), _begin(ours[1], key), len(ours[1])])
    return found
