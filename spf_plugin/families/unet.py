"""Cross-attention layers: find them, keep references to their queries and keys, turn those into maps per phrase.

The only module that knows attention modules. Works on sd-scripts' own UNets and on diffusers' UNets: both call
`attn2.to_q` and `attn2.to_k` as modules on every attention backend (plain, sdpa, xformers, memory-efficient), so
forward hooks on those see what the layer uses, an adapter's contribution included.

Hooks only keep references. Maths inside a hook would run again when gradient checkpointing recomputes the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spf_plugin.errors import SPFError, nearest
from spf_plugin.patching import hooked


@dataclass(frozen=True)
class Layer:
    """One cross-attention layer: its name in the UNet, its module, and how many heads it has."""

    name: str
    module: nn.Module
    heads: int


@dataclass
class Capture:
    """Queries and keys of one forward pass, by layer name: `[B, N, C]` and `[B, T, C]`, with the pass's graph."""

    queries: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)


def find_layers(unet: nn.Module, which: str) -> list[Layer]:
    """The cross-attention layers to compare.

    Args:
        unet: sd-scripts' SD/SDXL UNet or diffusers' `UNet2DConditionModel`.
        which: `all`; `last`, the last block of each transformer; or a regular expression that is searched in the names.

    Raises:
        SPFError: no layer at all, or none that the expression matches (with the nearest names).
    """
    layers = [
        Layer(name, module, int(getattr(module, "heads", 0)))
        for name, module in unet.named_modules()
        if name.split(".")[-1] == "attn2" and hasattr(module, "to_q") and hasattr(module, "to_k")
    ]
    layers = [layer for layer in layers if layer.heads > 0]
    if not layers:
        raise SPFError(
            "found no cross-attention layers (attn2 with to_q and to_k) in this UNet; SPF needs SD1.x, SD2.x or SDXL"
        )
    if which == "all":
        return layers
    if which == "last":
        last: dict[str, Layer] = {}
        for layer in layers:  # "...attentions.0.transformer_blocks.9.attn2": one entry per transformer, the last wins
            last[layer.name.split(".transformer_blocks.")[0]] = layer
        return list(last.values())
    chosen = [layer for layer in layers if re.search(which, layer.name)]
    if not chosen:
        names = [layer.name for layer in layers]
        hint = nearest(which, names, n=3) or f"; the first is {names[0]}"
        raise SPFError(f"spf_layers={which!r} matches none of the {len(names)} cross-attention layers{hint}")
    return chosen


@contextmanager
def capture(layers: Sequence[Layer]) -> Iterator[Capture]:
    """Collect each layer's queries and keys while a forward pass runs in the block.

    A recomputation during backward happens after the block, so it cannot touch what was collected.
    """
    found = Capture()

    def keep(store: dict[str, Tensor], name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            store[name] = output

        return hook

    hooks: dict[nn.Module, Any] = {}
    for layer in layers:
        hooks[layer.module.to_q] = keep(found.queries, layer.name)  # type: ignore[index]
        hooks[layer.module.to_k] = keep(found.keys, layer.name)  # type: ignore[index]
    with hooked(hooks):
        yield found


def group_attention(query: Tensor, key: Tensor, heads: int, groups: Tensor) -> Tensor:
    """Attention probability that each position gives to each group of tokens, averaged over the heads.

    Only the result is kept for backward; the probabilities `[B, heads, N, T]`, in float32 four times as large as a
    half-precision query in SD1.5, are computed again there (docs/cost.md).

    Args:
        query: `[B, N, C]`.
        key: `[B, T, C]`.
        heads: number of heads; C is split into `heads` parts.
        groups: `[B, T, G]`, 1 where token t belongs to group g, else 0.

    Returns:
        `[B, N, G]`, float32.
    """
    if not torch.is_grad_enabled():
        return _group_attention(query, key, heads, groups)
    return checkpoint(_group_attention, query, key, heads, groups, use_reentrant=False, preserve_rng_state=False)


def _group_attention(query: Tensor, key: Tensor, heads: int, groups: Tensor) -> Tensor:
    b, n, c = query.shape
    d = c // heads
    q = query.reshape(b, n, heads, d).transpose(1, 2)  # [B, heads, N, d]
    k = key.reshape(b, key.shape[1], heads, d).transpose(1, 2)  # [B, heads, T, d]
    with torch.autocast(device_type=query.device.type, enabled=False):
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * d**-0.5  # [B, heads, N, T]
        probability = scores.softmax(dim=-1).mean(dim=1)  # [B, N, T]
        return torch.matmul(probability, groups.float())
