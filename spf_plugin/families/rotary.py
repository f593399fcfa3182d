"""Rotary positions, as diffusion transformers give them to queries and keys. Pure tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys with their positions: each pair of neighbouring channels turned in its plane, in float32.

    Args:
        x: `[B, N, heads, d]`.
        turns: `[B, N, d / 2]`, complex numbers of size 1.

    Returns:
        as `x`, in its type.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns.to(torch.complex64).unsqueeze(2)).flatten(3).type_as(x)


def turned(x: Tensor, matrices: Tensor) -> Tensor:
    """The same by matrices, heads before positions.

    Args:
        x: `[B, heads, N, d]`.
        matrices: `[B, 1, N, d / 2, 2, 2]`.

    Returns:
        as `x`, in its type.
    """
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).to(x.dtype)
