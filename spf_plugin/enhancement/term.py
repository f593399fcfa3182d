"""Runs the response term of a step: prediction -> x0 -> pixels -> CLIP -> a gradient with respect to the prediction.

Only that gradient leaves this module. The decoder's and the encoder's graphs are gone before the UNet's backward pass
begins, the map can confine it, and it can be compared with the diffusion loss's own gradient at the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spf_plugin import terminal
from spf_plugin.config import SPFConfig
from spf_plugin.enhancement import decoders, limits
from spf_plugin.enhancement.clip import ClipEncoder
from spf_plugin.enhancement.clip import load as load_clip
from spf_plugin.enhancement.decoders import Decoder, VaeDecoder
from spf_plugin.errors import SPFError
from spf_plugin.families.latents import LatentSpace
from spf_plugin.step import Step
from spf_plugin.text import Cache

logger = terminal.logger(__name__)

CACHED_IMAGES = CACHED_TEXTS = 2**16  # embeddings, 2 kB each
KEY_VALUES = 4096  # values of an image that identify it in the cache


class ImageHost(Protocol):
    """What the response term needs of a host."""

    @property
    def vae(self) -> Any:
        """The run's own VAE, wherever it lies at present."""
        ...

    @property
    def vae_scaling_factor(self) -> float: ...

    def clean_images(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """`(latents [B, 4, h, w] as the UNet sees them, pixels [B, 3, H, W] in [-1, 1])`; one of them may be None."""
        ...


@dataclass(frozen=True)
class Response:
    """The response term of a step.

    Attributes:
        gradient: with respect to the prediction, `[B, 4, h, w]`, float32, unweighted; mean over the batch.
        loss: mean over the samples that have the term.
    """

    gradient: Tensor
    loss: Tensor


def load(config: SPFConfig, host: ImageHost, space: LatentSpace | None) -> Enhancement:
    """Load what the response term needs, before training starts.

    Args:
        config: the settings.
        host: images and VAE.
        space: the latents of the model's family.

    Raises:
        SPFError: the CLIP model or the decoder is missing or broken.
    """
    vae = host.vae
    with torch.random.fork_rng(devices=[]):  # libraries draw initial weights before they load the real ones
        encoder = load_clip(config.clip)
        decoder = decoders.load(config.decoder, space, vae, lambda: VaeDecoder(vae, host.vae_scaling_factor))
    logger.info(f"SPF: response term {config.response!r} with {encoder.name} and the {type(decoder).__name__}")
    return Enhancement(config, host, encoder, decoder)


class Enhancement:
    """The response term of a run.

    Args:
        config: the settings.
        host: images and VAE.
        encoder: CLIP, frozen.
        decoder: latents to pixels.
    """

    def __init__(self, config: SPFConfig, host: ImageHost, encoder: ClipEncoder, decoder: Decoder):
        self.config, self.host, self.encoder, self.decoder = config, host, encoder, decoder
        self.skipped = 0  # steps whose gradient was not finite
        self._texts: Cache[str, Tensor] = Cache(CACHED_TEXTS)
        self._images: Cache[bytes, Tensor] = Cache(CACHED_IMAGES)

    def __call__(self, step: Step, batch: Any) -> Response | None:
        """The term of a batch, or None if no sample has it or it is not finite.

        Args:
            step: both passes; the response's graph is left alone.
            batch: the host's batch.
        """
        # The others are too noisy to be looked at.
        which = step.shown & (step.schedule.level(step.timesteps) < limits.MAX_LEVEL).to(step.shown.device)
        chosen = which.nonzero().flatten()
        if not len(chosen):
            return None
        self._move(step.response.eps.device)
        return self._compute(step, chosen, batch)

    def _compute(self, step: Step, chosen: Tensor, batch: Any) -> Response | None:
        config, prediction = self.config, step.response.eps
        timesteps = step.timesteps.to(prediction.device)[chosen]
        abar, z = step.schedule.signal(timesteps), step.noisy_latents[chosen]
        prompts = [step.text.prompts[i] for i in chosen.tolist()]
        with torch.enable_grad():
            leaf = prediction.detach().float().requires_grad_()
            embedded = self._image(step.schedule.clean(z, leaf[chosen], timesteps))
            if config.response == "anchor":
                target = self._text([prompt.target for prompt in prompts]).to(embedded.device)
                per_sample = limits.anchor(embedded, self._data(batch, chosen).to(embedded.device), target)
            else:
                with torch.no_grad():
                    before = self._image(step.schedule.clean(z, step.reference.eps[chosen], timesteps))
                full, base = (
                    self._text([p.full for p in prompts]).to(embedded.device),
                    self._text([p.base for p in prompts]).to(embedded.device),
                )
                per_sample = limits.directional(embedded, before, full, base)
            # A one-step prediction is the blurrier the noisier its input: weight it by its signal level.
            (gradient,) = torch.autograd.grad((abar * per_sample).sum() / len(prediction), leaf)
        gradient = gradient * step.result.map  # it cannot pull the background along
        if not torch.isfinite(gradient).all():
            self.skipped += 1
            if self.skipped == 1:
                logger.warning("SPF: the response term is not finite at this step and was left out; further ones too")
            return None
        return Response(gradient, per_sample.detach().mean())

    def _move(self, device: torch.device) -> None:
        """Encoder and decoder to the device; the encoder in half precision where the device computes in it."""
        if self.encoder.device != device:
            self.encoder.to(device, torch.bfloat16 if _computes_in_bf16(device) else torch.float32)
        self.decoder.to(device)  # the host moves its VAE about, so this is asked every time

    def _image(self, latents: Tensor) -> Tensor:
        """`I` of latents `[B, 4, h, w]`. They are shrunk first where the decoder would draw more than CLIP looks at."""
        h, w = latents.shape[-2:]
        wanted = -(-self.encoder.size // self.decoder.scale)
        if self.decoder.scale > 1 and min(h, w) > wanted:
            factor = wanted / min(h, w)
            size = (max(wanted, round(h * factor)), max(wanted, round(w * factor)))
            latents = F.interpolate(latents, size=size, mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(latents.device.type, enabled=False):
            return self.encoder.image(self.decoder(latents))

    def _text(self, texts: Sequence[str]) -> Tensor:
        """`T` of texts `[N, E]`, each computed once, on the CPU."""
        return torch.stack(
            [self._texts.get_or(t, partial(lambda text: self.encoder.text([text])[0].cpu(), t)) for t in texts]
        )

    @torch.no_grad()
    def _data(self, batch: Any, chosen: Tensor) -> Tensor:
        """`I` of the training images `[N, E]`, each computed once, on the CPU.

        Latents go through the same decoder as the prediction, so that what the decoder loses is lost on both sides.
        """
        latents, pixels = self.host.clean_images(batch)
        images = latents if latents is not None else pixels
        if images is None:
            raise SPFError("spf_response=anchor needs the batch's images or latents, and this host gives neither")
        rows = []
        for i in chosen.tolist():
            image = images[i : i + 1].to(next(self.encoder.model.parameters()).device).float()

            def embed(image: Tensor = image) -> Tensor:
                return (self._image(image) if latents is not None else self.encoder.image(image))[0].cpu()

            rows.append(self._images.get_or(_key(image), embed))
        return torch.stack(rows)


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether it has bfloat16 units; cards before compute capability 8 emulate them."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8


def _key(image: Tensor) -> bytes:
    """Identifies an image, flips and crops included, by its shape and evenly spaced values."""
    flat = image.detach().flatten()
    values = flat[:: max(1, len(flat) // KEY_VALUES)].cpu()
    return repr(tuple(image.shape)).encode() + values.numpy().tobytes()
