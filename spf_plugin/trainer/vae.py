"""Pictures and the latents that a denoiser is trained on, by diffusers' VAEs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale(vae: Any) -> int:
    """Pixels per latent, along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _shift(vae: Any) -> float:
    return float(getattr(vae.config, "shift_factor", None) or 0.0)  # of SD3's; the others have none


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    return (latents - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def clean_latents(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mean, scaled: `[B, 3, H, W]` in [-1, 1], as the VAE takes them -> `[B, C, h, w]`."""
    return _scaled(vae, vae.encode(pixels).latent_dist.mean)


@torch.no_grad()
def to_latents(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A seeded sample of the posterior, scaled: `[3, R, R]` in [-1, 1] -> `[C, R/8, R/8]`, float32 on the CPU."""
    parameters = next(vae.parameters())
    posterior = vae.encode(pixels[None].to(parameters.device, parameters.dtype)).latent_dist
    mean, std = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
    noise = torch.randn(mean.shape, generator=generator)  # on the CPU: the same on every device
    return _scaled(vae, mean + std * noise)


def from_latents(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE decodes: scaled latents `[B, C, h, w]` without their scale."""
    return latents / vae.config.scaling_factor + _shift(vae)
