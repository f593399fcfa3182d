"""What a model with words and patches in one sequence multiplies itself, beside the queries and keys of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spf_plugin.families.known import find
from spf_plugin.probe import capture
from spf_plugin.seam import Call


@dataclass(frozen=True)
class Joint:
    """A loaded small model, and a call on several samples with different numbers of words.

    Attributes:
        model: in fp32. Its last calls of torch's attention are those of `Family.layers("all")`, in order, of all
            samples at once or one by one.
        call: of it.
        patches: where they begin in each sample's sequence.
        words: where they begin,
        counts: and how many they are: those that are no padding.
    """

    model: nn.Module
    call: Call
    patches: Sequence[int]
    words: Sequence[int]
    counts: Sequence[int]


class _Attention(TorchFunctionMode):
    """Keeps the queries and keys `[heads, S, d]` of each sample in each call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen += zip(*args[:2], strict=True)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def off(made: Joint) -> float:
    """The largest difference of a product of a patch and a word, as a part of the largest product."""
    family, samples = find(made.model), len(made.counts)
    layers = family.layers("all")
    with capture(layers) as seen, _Attention() as attention:
        made.call.on(made.model)
    given = iter(attention.seen[-samples * len(layers) :])
    mask = family.text_mask(made.call)
    assert mask is None or mask.sum(dim=1).tolist() == list(made.counts)
    worst = 0.0
    for layer in layers:
        query, key = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], made.call)
        ours = [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (query, key)]
        for i, (patch, word, count) in enumerate(zip(made.patches, made.words, made.counts, strict=True)):
            queries, keys = next(given)
            product = ours[0][i] @ ours[1][i, :, :count].mT  # [heads, N, count]
            patches, words = queries[:, patch : patch + query.shape[1]], keys[:, word : word + count]
            worst = max(worst, float((product - patches @ words.mT).abs().max() / product.abs().max()))
    return worst
