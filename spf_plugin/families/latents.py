"""Whose latents a denoiser predicts, and what colours they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a published VAE.

    Attributes:
        channels: of a latent.
        weight: `[channels][3]`, latents to red, green, blue in [-1, 1]; fitted by the ComfyUI project for its previews
            (comfy/latent_formats.py).
        bias: `[3]`.
        tiny: an `AutoencoderTiny` for them, on the hub.
        blocks: `block_out_channels` of the VAE.
    """

    channels: int
    weight: Sequence[Sequence[float]]
    bias: Sequence[float]
    tiny: str
    blocks: tuple[int, ...]

    def is_of(self, vae: Any) -> bool:
        """Whether a VAE is, as far as its shape tells, the one whose latents these are."""
        return tuple(getattr(getattr(vae, "config", None), "block_out_channels", ())) == self.blocks


_BLOCKS = (128, 256, 512, 512)
SD = LatentSpace(
    4,
    [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]],
    [0.0, 0.0, 0.0],
    "madebyollin/taesd",
    _BLOCKS,
)
SDXL = LatentSpace(
    4,
    [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]],
    [0.1084, -0.0175, -0.0011],
    "madebyollin/taesdxl",
    _BLOCKS,
)
