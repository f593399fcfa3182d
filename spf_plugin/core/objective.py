"""One step of the dual-path objective, from two passes to losses, map and drift. No host and no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spf_plugin.core import losses, sfcm


@dataclass(frozen=True)
class Pass:
    """What one pass of the denoiser gave.

    Attributes:
        eps: the prediction, `[B, C, h, w]`.
        queries: per compared layer, `[B, N_l, C_l]`.
        attention: per layer, on the groups of tokens, `[B, N_l, G]`.
        grids: per layer, its grid of `N_l` positions.
        frames: of a clip, one above the other in `eps` and in the grids.
    """

    eps: Tensor
    queries: Sequence[Tensor]
    attention: Sequence[Tensor]
    grids: Sequence[tuple[int, int]]
    frames: int = 1


@dataclass(frozen=True)
class Alignment:
    """The result of a step.

    Attributes:
        loss: the scalar that is added to the host's loss, with graph; None if no term has a weight.
        terms: loss name -> its mean over the aligned samples, unweighted.
        map: `M`, `[B, 1, h, w]`.
        drift_inside: relative drift inside the map, mean over the aligned samples (not a number without any).
        drift_outside: relative drift outside the map.
        map_mean: mean of the map over the aligned samples.
    """

    loss: Tensor | None
    terms: dict[str, Tensor]
    map: Tensor
    drift_inside: Tensor
    drift_outside: Tensor
    map_mean: Tensor


def dual_path(
    reference: Pass,
    response: Pass,
    *,
    present: Tensor,
    weights: Tensor,
    target_map_kind: str,
    gain: float,
    aligned: Tensor,
    free: Tensor,
    multipliers: Mapping[str, float],
    preserve_multiplier: float,
    noise_weight: Tensor,
    sample_weight: Tensor | None = None,
) -> Alignment:
    """Compare the paths.

    Args:
        reference: frozen model, base prompt; groups are the P base phrases and the end group.
        response: trained model, full prompt; the same groups, then the target's.
        present: `[B, P + 1]`, 1 where a sample has the group.
        weights: `w_p`, `[B, P]`.
        target_map_kind: which map, see `sfcm.control_map`.
        gain: brightness of the map.
        aligned: `[B]` bool, samples that SPF acts on at all.
        free: `[B]` bool, samples with a target in the response prompt; the others must agree everywhere (`M = 0`).
        multipliers: weight of `text_consistent`, `fine_grained` and `output`.
        preserve_multiplier: weight of `output` for the samples that are not `free`.
        noise_weight: `[B]`, of `output` at each sample's noise level, see `losses.noise_weight`.
        sample_weight: `[B]`, of every term, as the host weighs its own loss of each sample; None: 1.
    """
    size = (response.eps.shape[-2], response.eps.shape[-1])
    with torch.no_grad():
        maps = sfcm.mean_maps([a.detach() for a in response.attention], response.grids, size, response.frames)
    m = sfcm.control_map(
        target_map_kind,
        eps_res=response.eps.detach(),
        eps_ref=reference.eps,
        phrase_maps=maps[:, : present.shape[1] - 1] * present[:, :-1, None, None],
        target_map=maps[:, -1:],
        weights=weights,
        gain=gain,
        frames=response.frames,
    )
    m = m * free[:, None, None, None]
    w = 1 - m

    per_sample: dict[str, Tensor] = {}
    if multipliers["text_consistent"]:
        base_attention = [a[..., :-1] for a in response.attention]
        per_sample["text_consistent"] = losses.text_consistent(
            base_attention, reference.attention, w, present, response.grids
        )
    if multipliers["fine_grained"]:
        per_sample["fine_grained"] = losses.fine_grained(response.queries, reference.queries, w, response.grids)
    if multipliers["output"] or preserve_multiplier:
        per_sample["output"] = losses.output(response.eps, reference.eps, w)

    # Per loss: the weight of the free samples, and of the others, whose base prompt is their full prompt.
    factors = {name: (multipliers[name], multipliers[name]) for name in ("text_consistent", "fine_grained")}
    factors["output"] = (multipliers["output"], preserve_multiplier)
    total: Tensor | None = None
    for name, value in per_sample.items():
        of_free, of_others = factors[name]
        factor = torch.where(free, torch.full_like(value, of_free), torch.full_like(value, of_others))
        if name == "output":
            factor = factor * noise_weight
        if sample_weight is not None:
            factor = factor * sample_weight.to(factor.device, factor.dtype)
        weighted = (factor * torch.where(aligned, value, torch.zeros_like(value))).mean()
        total = weighted if total is None else total + weighted

    def mean(value: Tensor) -> Tensor:
        """Over the aligned samples that have a value. Picking them by a mask would make the host wait for the GPU."""
        value = value.detach()
        counts = aligned & ~value.isnan()
        return torch.where(counts, value, torch.zeros_like(value)).sum() / counts.sum()

    return Alignment(
        loss=total,
        terms={name: mean(value) for name, value in per_sample.items()},
        map=m,
        drift_inside=mean(losses.relative_drift(response.eps, reference.eps, m)),
        drift_outside=mean(losses.relative_drift(response.eps, reference.eps, w)),
        map_mean=mean(m.flatten(1).mean(1)),
    )
