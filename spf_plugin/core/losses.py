"""The losses of the dual-path objective (method, section 4). Pure functions, one value per sample, no reduction over B.

Symbols: `W = 1 - M`, the alignment weight; `A` attention on groups of tokens; `Q` cross-attention queries; `eps`
predicted noise (or velocity); `_res` response path, `_ref` reference path. References are detached here, always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_NOISE_WEIGHT = 10.0
_EPS = 1e-8


def _layer_weight(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """`W` [B, 1, h, w] on a layer's grid of `N` positions, as `[B, N, 1]`."""
    resized = F.interpolate(weight, size=grid, mode="area")
    return resized.flatten(2).transpose(1, 2)


def text_consistent(
    a_res: Sequence[Tensor], a_ref: Sequence[Tensor], weight: Tensor, present: Tensor, grids: Sequence[tuple[int, int]]
) -> Tensor:
    """Text-consistent loss: attention on the base phrases stays what it was, where the target does not respond.

    Mean over layers, positions and groups of `W (A_res - A_ref)^2`, divided per layer by the mean of `A_ref^2`.

    Args:
        a_res: per layer `[B, N_l, G]`, with graph.
        a_ref: per layer `[B, N_l, G]`; group g is the same phrase in both.
        weight: `W`, `[B, 1, h, w]`.
        present: `[B, G]`, 1 where the sample has that group.
        grids: per layer its grid of `N_l` positions.

    Returns:
        `[B]`, float32.
    """
    groups = present.float().sum(dim=1).clamp_min(1)  # [B]
    total = weight.new_zeros(weight.shape[0], dtype=torch.float32)
    for res, ref, grid in zip(a_res, a_ref, grids, strict=True):
        ref = ref.detach().float()
        mask = present.float()[:, None]  # [B, 1, G]
        count = groups * ref.shape[1]
        scale = (ref.square() * mask).sum(dim=(1, 2)) / count
        error = (_layer_weight(weight, grid) * (res.float() - ref).square() * mask).sum(dim=(1, 2)) / count
        total = total + error / scale.clamp_min(_EPS)
    return total / max(len(a_ref), 1)


def fine_grained(
    q_res: Sequence[Tensor], q_ref: Sequence[Tensor], weight: Tensor, grids: Sequence[tuple[int, int]]
) -> Tensor:
    """Fine-grained loss: mean over layers of `W |Q_res - Q_ref|^2 / mean |Q_ref|^2`.

    Args:
        q_res: per layer `[B, N_l, C_l]`, with graph.
        q_ref: per layer `[B, N_l, C_l]`.
        weight: `W`, `[B, 1, h, w]`.
        grids: per layer its grid of `N_l` positions.

    Returns:
        `[B]`, float32.
    """
    total = weight.new_zeros(weight.shape[0], dtype=torch.float32)
    for res, ref, grid in zip(q_res, q_ref, grids, strict=True):
        ref = ref.detach().float()
        error = (_layer_weight(weight, grid) * (res.float() - ref).square()).mean(dim=(1, 2))
        total = total + error / ref.square().mean(dim=(1, 2)).clamp_min(_EPS)
    return total / max(len(q_ref), 1)


def output(eps_res: Tensor, eps_ref: Tensor, weight: Tensor) -> Tensor:
    """Output loss: `W |eps_res - eps_ref|^2 / mean |eps_ref|^2`, the map-weighted form of prior prediction.

    Args:
        eps_res: `[B, C, h, w]`, with graph.
        eps_ref: `[B, C, h, w]`.
        weight: `W`, `[B, 1, h, w]`.

    Returns:
        `[B]`, float32.
    """
    ref = eps_ref.detach().float()
    error = (weight * (eps_res.float() - ref).square()).flatten(1).mean(dim=1)
    return error / ref.square().flatten(1).mean(dim=1).clamp_min(_EPS)


def base_preservation(eps_base: Tensor, eps_ref: Tensor) -> Tensor:
    """Base preservation: `mean |eps_base - eps_ref|^2 / mean |eps_ref|^2`, the base prompt with the adapter against
    without it.

    The contrast of DOP (ai-toolkit's `diff_output_preservation`), relative to `eps_ref` as `output` is.

    Args:
        eps_base: prediction of the trained model for the base prompt, `[B, C, h, w]`, with graph.
        eps_ref: `[B, C, h, w]`.

    Returns:
        `[B]`, float32.
    """
    return output(eps_base, eps_ref, torch.ones_like(eps_ref[:, :1], dtype=torch.float32))


def noise_weight(abar: Tensor) -> Tensor:
    """How much `output` and `base_preservation` count at a noise level: `min(max((1 - abar) / abar, 1), 10)`.

    What the picture becomes is decided where the noise is high. There an error of the predicted noise is one of
    `(1 - abar) / abar` times its square in the clean image that it stands for (`schedule.one_step_prediction`), which a
    loss on the noise alone does not see. Of a velocity both that loss and what teaches see it in full; that the same
    weight binds and preserves there as well was measured (docs/lab-dit.md), not derived.

    Args:
        abar: the signal's share of the variance at each sample's timestep (`Schedule.signal`), `[B]`.

    Returns:
        `[B]`, float32.
    """
    return ((1 - abar.float()) / abar.float()).clamp(1, MAX_NOISE_WEIGHT)


def relative_drift(eps_res: Tensor, eps_ref: Tensor, region: Tensor) -> Tensor:
    """`sum_region |eps_res - eps_ref|^2 / sum_region |eps_ref|^2`, a number to report rather than to train on.

    Args:
        eps_res: `[B, C, h, w]`.
        eps_ref: `[B, C, h, w]`.
        region: `[B, 1, h, w]` in [0, 1].

    Returns:
        `[B]`, float32; not a number for a sample whose region is empty.
    """
    res, ref = eps_res.detach().float(), eps_ref.detach().float()
    return (region * (res - ref).square()).flatten(1).sum(1) / (region * ref.square()).flatten(1).sum(1)
