"""Blocks as FLUX has them: first some in which text and image have weights of their own, then some that share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from spf_plugin.families.base import Layer, at_depths, chosen

DOUBLE, SINGLE = "double_blocks", "single_blocks"
# The LoRA names of their attention; a single block has its attention and its MLP in one layer.
CROSS_ATTENTION = r"_double_blocks_\d+_(img|txt)_attn_"


def attention(denoiser: nn.Module) -> Iterator[Layer]:
    """That of every block, in the model's order. Of a norm of queries and keys each has a module of its own: a hook on
    both would keep the image's keys, too, which are as large as its queries."""
    for stack, image, text in ((DOUBLE, "img_attn", "txt_attn"), (SINGLE, "", "")):
        for i, block in enumerate(getattr(denoiser, stack, None) or ()):
            query = _submodule(block, image, "norm", "query_norm")
            key = _submodule(block, text, "norm", "key_norm")
            if query is not None and key is not None:
                yield Layer(f"{stack}.{i}", int(block.num_heads), query, key)


def layers(denoiser: nn.Module, which: str, depths: Sequence[float]) -> list[Layer]:
    """`Family.layers`; of `last` those at these parts of the depth of the double blocks."""
    found = list(attention(denoiser))
    double = [layer for layer in found if layer.name.startswith(DOUBLE)]
    return chosen(found, which, at_depths(double, depths))


def _submodule(module: Any, *names: str) -> nn.Module | None:
    for name in filter(None, names):
        module = getattr(module, name, None)
    return module
