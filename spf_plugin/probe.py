"""Queries and keys of the compared layers, kept while a pass runs, and what the objective needs of a pass.

Hooks only keep references. Maths inside a hook would run again when gradient checkpointing recomputes the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spf_plugin import patching
from spf_plugin.core.attention import group_attention
from spf_plugin.core.objective import Pass
from spf_plugin.families.base import Family, Layer
from spf_plugin.seam import Call


@dataclass
class Capture:
    """What the query and key modules of each layer gave in one forward pass, by layer name, with the pass's graph."""

    queries: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


@contextmanager
def capture(layers: Sequence[Layer]) -> Iterator[Capture]:
    """Collect each layer's queries and keys while a forward pass runs in the block.

    A recomputation during backward happens after the block, so it cannot touch what was collected.
    """
    found = Capture()

    def keep(store: dict[str, Any], name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            store[name] = output

        return hook

    hooks: list[tuple[nn.Module, Any]] = []
    for layer in layers:
        hooks += [(layer.query, keep(found.queries, layer.name)), (layer.key, keep(found.keys, layer.name))]
    with patching.hooked(hooks):
        yield found


def pass_of(family: Family, layers: Sequence[Layer], call: Call, output: Any, seen: Capture, groups: Tensor) -> Pass:
    """A pass as the objective compares it.

    Args:
        family: of the denoiser.
        layers: the compared ones.
        call: that was made.
        output: what the denoiser returned.
        seen: what was collected meanwhile.
        groups: token groups of its prompts, `[B, T, G]`.
    """
    eps = family.prediction(output, call)
    size = (eps.shape[-2], eps.shape[-1])
    mask = family.text_mask(call)
    queries, attention = [], []
    for layer in layers:
        query, key = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], call)
        queries.append(query)
        keys = key.shape[1]
        valid = None if mask is None else mask[:, :keys]
        attention.append(group_attention(query, key, layer.heads, groups[:, :keys], valid))
    grids = [family.grid(query.shape[1], size) for query in queries]
    return Pass(eps, queries, attention, grids, family.frames(call))
