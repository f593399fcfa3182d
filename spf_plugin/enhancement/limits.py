"""Response enhancement (method, section 4): the target shall show in what the trained model would draw.

Pure functions. Symbols: `x0` the clean latents that one prediction stands for, `I` and `T` CLIP's image and text
embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spf_plugin.errors import SPFError

MAX_LEVEL = 0.6  # of the noise: from here on, what one prediction shows is mostly noise
MAX_RATIO = 0.3  # of the term's gradient to the diffusion loss's, at the prediction: one-step supervision is noisy
_PROBE_SCALE = 2.0**12  # the diffusion loss's gradient at a float16 prediction would vanish unscaled
_EPS = 1e-6


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1, eps=_EPS)


def anchor(image_res: Tensor, image_data: Tensor, text_target: Tensor) -> Tensor:
    """`1 - cos(I(x0_res) - T(target), I(x0) - T(target))`: the prediction stands to the text as the real image does.

    The difference vectors share CLIP's constant gap between images and texts, which direct supervision would train on.

    Args:
        image_res: `I` of the prediction, `[B, E]`, unit norm, with graph.
        image_data: `I` of the training image, `[B, E]`, unit norm.
        text_target: `T` of the target phrase, `[B, E]`, unit norm.

    Returns:
        `[B]`, float32.
    """
    return 1 - _cosine(image_res - text_target, (image_data - text_target).detach())


def directional(image_res: Tensor, image_ref: Tensor, text_full: Tensor, text_base: Tensor) -> Tensor:
    """`1 - cos(I(x0_res) - I(x0_ref), T(full) - T(base))`: the image changes as the text does (StyleGAN-NADA's form).

    Args:
        image_res: `I` of the response path's prediction, `[B, E]`, unit norm, with graph.
        image_ref: `I` of the reference path's.
        text_full: `T` of the whole caption, `[B, E]`, unit norm.
        text_base: `T` of the base prompt.

    Returns:
        `[B]`, float32.
    """
    return 1 - _cosine(image_res - image_ref.detach(), (text_full - text_base).detach())


def limited(gradient: Tensor, beside: Tensor, max_ratio: float) -> tuple[Tensor, float]:
    """Scale a gradient down to at most `max_ratio` times the norm of another one.

    Args:
        gradient: of the response term with respect to the prediction, any shape.
        beside: of the diffusion loss with respect to the same prediction, same shape.
        max_ratio: of the two norms.

    Returns:
        The gradient, and the ratio of the norms before the limit.
    """
    ours, theirs = torch.linalg.vector_norm(gradient.float()), torch.linalg.vector_norm(beside.float())
    ratio = float(ours / theirs.clamp_min(1e-12))
    return gradient * min(1.0, max_ratio / max(ratio, 1e-12)), ratio


def as_term(loss: Tensor, prediction: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
    """A term of value 0 whose gradient at the prediction is the response term's, limited beside the host's own loss.

    Args:
        loss: the host's scalar, with graph.
        prediction: what it was made of, any shape.
        gradient: of the response term with respect to it.

    Returns:
        The term, in the loss's dtype, and the ratio of the norms before the limit.

    Raises:
        SPFError: the loss does not depend on the prediction.
    """
    (beside,) = torch.autograd.grad(loss * _PROBE_SCALE, prediction, retain_graph=True, allow_unused=True)
    if beside is None:
        raise SPFError("the host's loss does not depend on what the denoiser returned; SPF does not know this loop")
    gradient, ratio = limited(gradient, beside.float() / _PROBE_SCALE, MAX_RATIO)
    term = (gradient * prediction.float()).sum()
    return (term - term.detach()).to(loss.dtype), ratio
