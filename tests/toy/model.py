"""A diffusion transformer in small: patches and words in one sequence, rectified flow, text as two tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, PATCH, CHANNELS = 16, 2, 2, 4


class Block(nn.Module):
    """Joint attention: words first, then patches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm_q, self.norm_k = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, c // HEADS).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)  # [B, N, heads, d]
        attended = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return x + self.out(attended.transpose(1, 2).reshape(b, n, c))


class Denoiser(nn.Module):
    """Takes packed patches `[B, N, CHANNELS PATCH^2]`, as FLUX does, and returns a velocity of that shape."""

    def __init__(self) -> None:
        super().__init__()
        size = CHANNELS * PATCH**2
        self.into, self.out, self.style = nn.Linear(size, WIDTH), nn.Linear(WIDTH, size), nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, *, patches: Tensor, sigma: Tensor, words: Tensor, style: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.into(patches) + self.style(style)[:, None] + sigma.view(-1, 1, 1)
        x = torch.cat([words, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(x[:, words.shape[1] :])
