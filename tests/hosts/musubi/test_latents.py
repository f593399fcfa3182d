"""Whose latents the host's models predict, by the numbers of its VAEs: what they decode to, previews show."""

from __future__ import annotations

import inspect

import torch

from spf_plugin.families import latents
from spf_plugin.families.flux2 import Flux2
from spf_plugin.families.krea2 import Krea2
from spf_plugin.families.qwen_image import QwenImage
from spf_plugin.families.wan import Wan
from spf_plugin.families.zimage import ZImage
from tests.hosts.musubi import classes


def test_qwen_image_has_wans_latents_and_krea_2_caches_by_its_vae() -> None:
    theirs = classes.module("wan.modules.vae").WanVAE.__init__
    numbers = [value for value in theirs.__code__.co_consts if isinstance(value, tuple) and len(value) == 16]
    qwen = classes.module("qwen_image.qwen_image_autoencoder_kl").AutoencoderKLQwenImage
    given = inspect.signature(qwen).parameters
    assert [tuple(given[name].default) for name in ("latents_mean", "latents_std")] == numbers
    assert latents.WAN.channels == given["z_dim"].default
    assert Wan.latents is QwenImage.latents is Krea2.latents is latents.WAN
    source = inspect.getsource(classes.module("krea2_cache_latents"))
    assert "vae = qwen_image_utils.load_vae(" in source


def test_z_image_has_those_of_flux_1() -> None:
    config = classes.module("zimage.zimage_config")
    flux = classes.module("flux.flux_models").configs_flux_dev_context.ae_params
    assert (flux.scale_factor, flux.shift_factor) == (config.ZIMAGE_VAE_SCALING_FACTOR, config.ZIMAGE_VAE_SHIFT_FACTOR)
    assert ZImage.latents is latents.FLUX
    assert (latents.FLUX.scale, latents.FLUX.channels) == (flux.scale_factor, flux.z_channels)


def test_four_channels_of_flux_2_are_one_of_its_vae() -> None:
    models = classes.module("flux_2.flux2_models")
    vae = models.AutoEncoderParams()
    assert "(c pi pj) i j" in inspect.getsource(models.AutoEncoder)  # those of one channel stand together
    assert Flux2.latents is latents.FLUX2
    assert latents.FLUX2.channels == 4 * vae.z_channels
    channels = torch.tensor(latents.FLUX2.weight).unflatten(0, (vae.z_channels, 4))
    assert torch.equal(channels, channels[:, :1].expand(-1, 4, -1))
