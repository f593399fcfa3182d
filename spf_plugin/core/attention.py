"""Attention of image positions on groups of tokens. Pure tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def group_attention(query: Tensor, key: Tensor, heads: int, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention probability that each position gives to each group of tokens, averaged over the heads.

    Only the result is kept for backward; the probabilities `[B, heads, N, T]`, in float32 four times as large as a
    half-precision query in SD1.5, are computed again there (docs/cost.md).

    Args:
        query: `[B, N, C]`.
        key: `[B, T, C]`.
        heads: number of heads; C is split into `heads` parts.
        groups: `[B, T, G]`, 1 where token t belongs to group g, else 0.
        mask: `[B, T]` bool, False for keys that get no attention at all; None for none of them.

    Returns:
        `[B, N, G]`, float32.
    """
    if not torch.is_grad_enabled():
        return _group_attention(query, key, heads, groups, mask)
    return checkpoint(_group_attention, query, key, heads, groups, mask, use_reentrant=False, preserve_rng_state=False)


def _group_attention(query: Tensor, key: Tensor, heads: int, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    b, n, c = query.shape
    d = c // heads
    q = query.reshape(b, n, heads, d).transpose(1, 2)  # [B, heads, N, d]
    k = key.reshape(b, key.shape[1], heads, d).transpose(1, 2)  # [B, heads, T, d]
    with torch.autocast(device_type=query.device.type, enabled=False):
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * d**-0.5  # [B, heads, N, T]
        if mask is not None:  # not infinity: a row without any key would not be a number
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        probability = scores.softmax(dim=-1).mean(dim=1)  # [B, N, T]
        return torch.matmul(probability, groups.float())
