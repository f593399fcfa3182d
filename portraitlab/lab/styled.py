"""How much of a drawing style a picture shows, and what it shows, read off pictures that are half way to it, too.

The judge learned from pictures in one style. Here it is trained a little longer, on held-out portraits that went
through the autoencoder: as they are, redrawn, and blended. How much of the style they show is a linear function of the
features of the judge as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from portraitlab.autoencoder import decode, encode, to_images, to_tensor
from portraitlab.judge import Judge, judge_loss, label_tensors
from portraitlab.portraits import BALANCED_RATES, Person, render_batch, sample_person
from portraitlab.style import redrawn

Images = NDArray[np.uint8]
PORTRAITS, SEED = 600, 81
#: Of the squared weights of the share, in units of the features' variance.
RIDGE = 1.0
EPOCHS, BATCH, RATE = 6, 32, 2e-3


def blended(images: Images, shares: NDArray[np.floating[Any]]) -> Images:
    """Images `[N, H, W, 3]` so much of the way to their redrawn ones: shares `[N]`, 0 as they are, 1 redrawn."""
    part = shares.reshape(-1, 1, 1, 1).astype(np.float32)
    return ((1 - part) * images + part * redrawn(images) + 0.5).astype(np.uint8)


def pictures(vae: Any, count: int, seed: int) -> tuple[Images, NDArray[np.floating[Any]], list[Person]]:
    """Portraits through the autoencoder, their shares of the style (a third 0, a third 1, the others between), and who
    they show."""
    rng = np.random.default_rng([seed, 92])
    persons = [sample_person(rng, BALANCED_RATES) for _ in range(count)]
    shares = np.clip(rng.random(count) * 3 - 1, 0, 1)
    drawn = blended(render_batch(persons)[0], shares)
    return to_images(decode(vae, encode(vae, drawn))), shares, persons


@torch.no_grad()
def features(judge: Judge, images: Images) -> Tensor:
    """What the judge reads attributes off, `[N, 160]`."""
    return torch.cat([judge.features(to_tensor(images[start : start + 64])) for start in range(0, len(images), 64)])


@dataclass(frozen=True)
class StyleReader:
    """Reads pictures in both styles.

    Attributes:
        judge: reads attributes in both.
        own: the judge as it was.
        weights: of the share, `[160]`, on `own.features`.
        bias: of the share.
    """

    judge: Judge
    own: Judge
    weights: Tensor
    bias: Tensor

    @classmethod
    def fitted(cls, judge: Judge, vae: Any, count: int = PORTRAITS, seed: int = SEED) -> StyleReader:
        """Fit the share by ridge regression, and the attributes from the judge as it is, with its own loss."""
        images, shares, persons = pictures(vae, count, seed)
        x = features(judge, images)
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        z, t = ((x - mean) / std).double(), torch.from_numpy(shares).double()
        inner = z.T @ z + RIDGE * torch.eye(z.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(inner, z.T @ (t - t.mean())).float() / std
        bias = t.mean().float() - weights @ mean

        return cls(_taught(judge, images, persons, seed), judge, weights, bias)

    def share(self, images: Images) -> NDArray[np.float64]:
        """How much of the style each of the images `[N, 128, 128, 3]` shows, `[N]` in [0, 1]."""
        seen = features(self.own, images) @ self.weights + self.bias
        return seen.clamp(0, 1).double().numpy()


def _taught(judge: Judge, images: Images, persons: Sequence[Person], seed: int) -> Judge:
    """A copy of the judge that learned these pictures, too; the statistics of its norms stay."""
    taught = copy.deepcopy(judge).eval()
    pixels, (classes, flags) = to_tensor(images), label_tensors(persons)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(EPOCHS)]).split(BATCH)
    optimiser = torch.optim.Adam(taught.parameters(), lr=RATE)
    for step, rows in enumerate(order):
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / len(order))
        optimiser.zero_grad()
        judge_loss(taught(pixels[rows]), classes[rows], flags[rows]).backward()
        optimiser.step()
    return taught


def beside(images: Images, base: Images) -> NDArray[np.float64]:
    """Mean squared change of pixels in [0, 1] that is not the style's, `[N]`.

    `min over s in [0, 1] of |x - ((1 - s) b + s redrawn(b))|^2`.

    Args:
        images: `x`, uint8 `[N, H, W, 3]`.
        base: `b`, the base model's pictures from the same seeds, likewise.
    """
    change = (images.astype(np.float64) - base).reshape(len(base), -1) / 255
    style = (redrawn(base).astype(np.float64) - base).reshape(len(base), -1) / 255
    share = ((change * style).sum(1) / (style**2).sum(1).clip(1e-12)).clip(0, 1)
    found: NDArray[np.float64] = ((change - share[:, None] * style) ** 2).mean(1)
    return found
