"""Latents to pixels for the response term: cheap, differentiable, one signature.

A decoder takes latents as the UNet sees them, `[B, 4, h, w]`, and returns pixels `[B, 3, h * scale, w * scale]`, about
-1 to 1, with graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.errors import SPFError
from spf_plugin.families.latents import LatentSpace
from spf_plugin.files import replace

WEIGHT, BIAS = "weight", "bias"  # tensors of a fitted linear decoder's file


class LinearDecoder(nn.Module):
    """One colour per latent: `latents @ weight + bias`, `scale` 1.

    Args:
        weight: `[C, 3]`.
        bias: `[3]`.
    """

    scale = 1
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    @classmethod
    def of(cls, space: LatentSpace) -> LinearDecoder:
        """The published matrix of a latent space."""
        return cls(torch.tensor(space.weight), torch.tensor(space.bias))

    def forward(self, latents: Tensor) -> Tensor:
        return F.conv2d(latents.float(), self.weight.t()[:, :, None, None], self.bias)


class TinyDecoder(nn.Module):
    """The decoder of a diffusers `AutoencoderTiny`."""

    def __init__(self, autoencoder: Any):
        super().__init__()
        self.decoder = autoencoder.decoder
        self.scale = int(2 ** (len(autoencoder.config.decoder_block_out_channels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.to(next(self.decoder.parameters()).dtype)).float()


class VaeDecoder(nn.Module):
    """The decoder of the run's own VAE.

    Not checkpointed: its graph is gone before the UNet's backward pass begins, and recomputing it would cost half as
    much again.

    Args:
        vae: diffusers' or sd-scripts' `AutoencoderKL`.
        scaling_factor: what the encoder's latents were multiplied by.
    """

    def __init__(self, vae: Any, scaling_factor: float):
        super().__init__()
        # Only the decoding half: moving this module leaves the encoder where its owner keeps it.
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.scaling_factor = scaling_factor
        self.scale = int(2 ** (len(vae.config.block_out_channels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return self.decoder(self.post_quant_conv((latents.float() / self.scaling_factor).to(dtype))).float()


Decoder = LinearDecoder | TinyDecoder | VaeDecoder


def fit_linear(latents: Tensor, pixels: Tensor) -> tuple[LinearDecoder, float]:
    """The matrix that gives the colours of images from their latents, by least squares.

    Args:
        latents: `[N, 4, h, w]`, as the UNet sees them.
        pixels: the images, `[N, 3, H, W]` in [-1, 1]; averaged over each latent's square.

    Returns:
        The decoder, and the root mean square of what it misses (pixels in [-1, 1]).
    """
    colours = F.interpolate(pixels.float(), size=latents.shape[-2:], mode="area").permute(0, 2, 3, 1).reshape(-1, 3)
    rows = latents.float().permute(0, 2, 3, 1).reshape(len(colours), -1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows.double(), colours.double()).solution
    error = (rows.double() @ solution - colours.double()).square().mean().sqrt()
    return LinearDecoder(solution[:-1], solution[-1]), float(error)


def save_linear(decoder: LinearDecoder, path: Path) -> None:
    """Write a fitted matrix, aside first."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file({WEIGHT: decoder.weight.contiguous(), BIAS: decoder.bias.contiguous()}, aside)
    replace(aside, path)


def load_linear(path: Path) -> LinearDecoder:
    """A matrix that `spf decoder` fitted.

    Raises:
        SPFError: not such a file.
    """
    from safetensors import SafetensorError  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SPFError(f"spf_decoder={path} is damaged or no safetensors file: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {WEIGHT: (4, 3), BIAS: (3,)}:
        raise SPFError(f"spf_decoder={path} is no linear decoder (weight [4, 3], bias [3]); it holds {shapes}")
    return LinearDecoder(tensors[WEIGHT], tensors[BIAS])


def load_tiny(name: str) -> TinyDecoder:
    """A diffusers `AutoencoderTiny`, from a folder or the hub.

    Raises:
        SPFError: it cannot be loaded.
    """
    try:
        from diffusers import AutoencoderTiny

        return TinyDecoder(AutoencoderTiny.from_pretrained(name, use_safetensors=True).requires_grad_(False).eval())
    except Exception as error:  # whatever diffusers, safetensors, json or the network raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SPFError(
            f"spf_decoder={name}: no AutoencoderTiny can be loaded there ({reason}). Use spf_decoder=linear or vae, or "
            "a folder that holds one."
        ) from error


def load(name: str, space: LatentSpace | None, vae: Any, own: Callable[[], VaeDecoder]) -> Decoder:
    """The decoder of a run.

    Args:
        name: `linear`, `tiny`, `vae`, `auto`, the path of a fitted matrix (.safetensors), or the folder or hub name of
            an `AutoencoderTiny`. `auto` is `linear` where the model's latents are the family's own, else `vae`: both
            are there without a download.
        space: the latents of the model's family.
        vae: the run's; if it is not that of `space`, no colours of its latents are known.
        own: makes the decoder of the run's own VAE.

    Raises:
        SPFError: it cannot be loaded.
    """
    known = space is not None and space.is_of(vae)
    if name == "auto":
        name = "linear" if known else "vae"
    if name == "vae":
        return own()
    if name == "linear":
        if space is None or not known:
            raise SPFError(
                "spf_decoder=linear has matrices for the VAEs of SD1.x, SD2.x and SDXL, and this model has another "
                "one. Use spf_decoder=vae, or fit one: spf decoder --model MODEL --data IMAGES --out FILE.safetensors"
            )
        return LinearDecoder.of(space)
    path = Path(os.path.expanduser(name))
    if path.suffix == ".safetensors":
        return load_linear(path)
    if name == "tiny":
        if space is None or space.tiny is None:
            raise SPFError(
                "spf_decoder=tiny knows none for this model. Name an AutoencoderTiny, or use spf_decoder=vae."
            )
        name = space.tiny
    return load_tiny(name)
