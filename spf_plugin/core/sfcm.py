"""SFCM, the Semantic-Aware Fine Control Map: where the target responds. Pure tensors in, tensors out.

Method, section 3. The map `M` [B, 1, h, w] lies in [0, 1] and is a constant: it gets no gradient. The losses align the
two paths with weight `W = 1 - M`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOW_QUANTILE, HIGH_QUANTILE = 0.02, 0.98  # robust ends of the noise difference: single latents are noisy
MAX_REGION_GAIN = 10.0
MAX_PHRASE_WEIGHT = 0.5  # of the `soft` map, see `soft_weights`
_EPS = 1e-8


def _quantile(x: Tensor, q: float) -> Tensor:
    """Per-sample quantile of `[B, ...]`, kept broadcastable."""
    return torch.quantile(x.flatten(1), q, dim=1).view(-1, *[1] * (x.dim() - 1))


def noise_difference(eps_res: Tensor, eps_ref: Tensor) -> Tensor:
    """`D = mean_c |eps_res - eps_ref|`, stretched per sample so that its low quantile is 0 and its high quantile 1.

    Args:
        eps_res: prediction of the response path, `[B, C, h, w]`.
        eps_ref: prediction of the reference path, same shape.

    Returns:
        `[B, 1, h, w]`, float32. All zeros where the paths agree everywhere.
    """
    d = (eps_res.float() - eps_ref.float()).abs().mean(dim=1, keepdim=True)
    low, high = _quantile(d, LOW_QUANTILE), _quantile(d, HIGH_QUANTILE)
    return ((d - low) / (high - low).clamp_min(_EPS)).clamp(0, 1)


def by_frame(function: Callable[[Tensor], Tensor], x: Tensor, frames: int) -> Tensor:
    """Apply what looks at a place's neighbours to each frame of a clip by itself: the row below the last one of a frame
    is the first of the next, which is a neighbour in time.

    Args:
        function: `[N, C, h', w]` -> `[N, C, h'', w'']`.
        x: `[B, C, h, w]`, the frames one above the other, so `h = frames h'`.
        frames: how many there are.

    Returns:
        the results, one above the other.
    """
    each = x.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)
    return function(each).unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)


def to_image(attention: Tensor, grid: tuple[int, int], size: tuple[int, int], frames: int = 1) -> Tensor:
    """A layer's attention `[B, N, G]`, on its grid of `N = grid[0] * grid[1]` positions, resized to `[B, G, h, w]`,
    each of its frames by itself."""
    b, _, g = attention.shape
    of_frame = (size[0] // frames, size[1])
    return by_frame(
        lambda each: F.interpolate(each, size=of_frame, mode="bilinear", align_corners=False),
        attention.transpose(1, 2).reshape(b, g, *grid),
        frames,
    )


def mean_maps(
    attentions: Sequence[Tensor], grids: Sequence[tuple[int, int]], size: tuple[int, int], frames: int = 1
) -> Tensor:
    """Average the layers' group attention on the latent grid: list of `[B, N_l, G]`, each on its grid of `N_l`
    positions, -> `[B, G, h, w]`; of a clip, both are its frames one above the other."""
    maps = [to_image(a, grid, size, frames) for a, grid in zip(attentions, grids, strict=True)]
    return torch.stack(maps).mean(dim=0)


def share(maps: Tensor, others: Tensor) -> Tensor:
    """Each phrase's share of the attention that all phrases and the target receive at a place.

    Min-max stretched maps would subtract everywhere, also where a phrase hardly responds.

    Args:
        maps: the phrases' attention, `[B, P, h, w]`.
        others: attention that counts in the sum but has no map of its own here (the target), `[B, 1, h, w]`.
    """
    return maps / (maps.sum(dim=1, keepdim=True) + others).clamp_min(_EPS)


def soft_weights(weights: Tensor) -> Tensor:
    """`min(w_p, 1/2)`: by what the `soft` map multiplies a phrase's share of the attention.

    All phrases together have the whole attention but for the target's share, which shrinks with the number of phrases.
    Where the shares are the same at every place (a target that the model does not know yet, joint attention), they say
    how much to take and not where. With `w_p` up to 1 nothing but the places is left then where the paths differ almost
    as much as anywhere: a part of a large target, and the rest of it is held to the base model for good.

    Args:
        weights: `w_p`, `[B, P]`.
    """
    return weights.clamp(max=MAX_PHRASE_WEIGHT)


def stretch(maps: Tensor) -> Tensor:
    """Min-max per sample and map, `[B, P, h, w]` -> [0, 1]: the normalisation of the published formula."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(_EPS)


def subtract_phrases(difference: Tensor, phrase_maps: Tensor, weights: Tensor) -> Tensor:
    """`M <- clamp(M - w_p A_p, 0, 1)` for every base phrase p, starting at `M = D`.

    Args:
        difference: `D`, `[B, 1, h, w]`.
        phrase_maps: `A_p` in [0, 1], `[B, P, h, w]`.
        weights: `w_p` in [0, 1], the semantic distance of phrase p to the target, `[B, P]`; 0 for absent phrases.
    """
    m = difference
    for p in range(phrase_maps.shape[1]):
        m = (m - weights[:, p, None, None, None] * phrase_maps[:, p : p + 1]).clamp(0, 1)
    return m


def brighten(m: Tensor, gain: float, frames: int = 1) -> Tensor:
    """Lift the high quantile to 1, multiply by `gain`, grow by one latent cell within each frame.

    Without it the map is about 0.2 inside the target's region, and the target is aligned away with the rest.
    """
    m = m / _quantile(m, HIGH_QUANTILE).clamp_min(_EPS)
    m = (m * gain).clamp(0, 1)
    return by_frame(lambda each: F.max_pool2d(each, kernel_size=3, stride=1, padding=1), m, frames)


def gate(m: Tensor) -> Tensor:
    """`G = M min(1 / mean(M), 10)`: by what the diffusion loss's gradient is multiplied at each place.

    The loss is then a mean over the map, `sum M e^2 / sum M`, and not over the picture, `sum M e^2 / (h w)`, in which a
    target of a twelfth of the picture has a twelfth of the gradient beside alignment losses of full size. The limit is
    for maps that are nearly empty, whose gradient would be mostly the noise of a few places.

    Args:
        m: `M`, `[B, 1, h, w]` in [0, 1].

    Returns:
        `[B, 1, h, w]`, float32; 0 where the map is.
    """
    mean = m.float().mean(dim=(1, 2, 3), keepdim=True)
    return m.float() * mean.clamp_min(1 / MAX_REGION_GAIN).reciprocal()


def control_map(
    kind: str,
    *,
    eps_res: Tensor,
    eps_ref: Tensor,
    phrase_maps: Tensor,
    target_map: Tensor,
    weights: Tensor,
    gain: float,
    frames: int = 1,
) -> Tensor:
    """The SFCM. A clip has one map a frame, and one scale for all of them: a frame in which the target does not respond
    is not stretched until something does.

    Args:
        kind: `soft` (the phrases' shares of the attention, half of them at most, brightened), `paper` (as published),
            or `difference` (the noise difference alone, brightened).
        eps_res: `[B, C, h, w]`, prediction of the response path.
        eps_ref: `[B, C, h, w]`, prediction of the reference path.
        phrase_maps: `[B, P, h, w]`, attention on each base phrase, response path (P may be 0).
        target_map: `[B, 1, h, w]`, attention on the target.
        weights: `[B, P]`, see `subtract_phrases`.
        gain: see `brighten`.
        frames: of a clip, which lie one above the other in all of these.

    Returns:
        `[B, 1, h, w]`, float32 in [0, 1], detached.

    Raises:
        ValueError: an unknown kind.
    """
    with torch.no_grad(), torch.autocast(device_type=eps_res.device.type, enabled=False):
        difference = noise_difference(eps_res, eps_ref)
        if kind == "difference":
            return brighten(difference, gain, frames)
        if kind == "paper":
            return subtract_phrases(difference, stretch(phrase_maps.float()), weights)
        if kind == "soft":
            shares = share(phrase_maps.float(), target_map.float())
            return brighten(subtract_phrases(difference, shares, soft_weights(weights)), gain, frames)
    raise ValueError(f"unknown map {kind!r}")


def semantic_distance(phrases: Tensor, target: Tensor, anchors: Tensor) -> Tensor:
    """`w_p`: how far each phrase's text embedding is from the target's, in [0, 1].

    CLIP text embeddings crowd together (cosines of 0.7 to 0.9 between unrelated phrases), so `1 - cos` is calibrated:
    the median distance from the target to a fixed list of everyday phrases counts as 1.

    Args:
        phrases: `[P, E]`.
        target: `[E]`.
        anchors: `[A, E]`.

    Returns:
        `[P]`, float32.
    """
    distance = 1 - F.cosine_similarity(phrases.float(), target.float()[None], dim=-1)
    reference = (1 - F.cosine_similarity(anchors.float(), target.float()[None], dim=-1)).median()
    return (distance / reference.clamp_min(_EPS)).clamp(0, 1)
