"""Which family a denoiser is of."""

from __future__ import annotations

from torch import nn

from spf_plugin.errors import SPFError
from spf_plugin.families.anima import Anima
from spf_plugin.families.base import Family
from spf_plugin.families.flux import Flux
from spf_plugin.families.flux2 import Flux2
from spf_plugin.families.hunyuan_image import HunyuanImage
from spf_plugin.families.krea2 import Krea2
from spf_plugin.families.lumina import Lumina
from spf_plugin.families.qwen_image import QwenImage
from spf_plugin.families.sd3 import SD3
from spf_plugin.families.sd3_diffusers import DiffusersSD3
from spf_plugin.families.unet import UNet
from spf_plugin.families.wan import Wan
from spf_plugin.families.zimage import ZImage

# `attn2` of a UNet is the image's own attention in diffusers' SD3.5-Medium; FLUX.2 has all that FLUX.1 is known by.
FAMILIES: tuple[type[Family], ...] = (
    DiffusersSD3,
    UNet,
    Anima,
    SD3,
    Flux2,
    Flux,
    Lumina,
    HunyuanImage,
    ZImage,
    Krea2,
    QwenImage,
    Wan,
)


def find(denoiser: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        SPFError: it is of none that SPF knows.
    """
    for family in FAMILIES:
        if family.fits(denoiser):
            return family(denoiser)
    raise SPFError(
        f"found no cross-attention layers (attn2 with to_q and to_k) in this {type(denoiser).__name__}; SPF needs "
        "SD1.x, SD2.x, SDXL, Anima, SD3, FLUX.1, FLUX.2, Chroma, Lumina, HunyuanImage, Z-Image, Krea 2, Qwen-Image or "
        "Wan"
    )


def named(name: str) -> type[Family]:
    """The family of this name, without a model.

    Raises:
        KeyError: there is none.
    """
    return {family.__name__: family for family in FAMILIES}[name]
