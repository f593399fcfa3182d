"""SD1.x, SD2.x and SDXL, of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.seam import Call
from spf_plugin.trainer import vae as vaes
from spf_plugin.trainer.processes import Diffusion

FAMILIES = {"StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl"}
TEXT_TOKENS = 77  # begin and end among them


@dataclass
class UNetModel:
    """`spf_plugin.trainer.models.BaseModel`.

    Attributes:
        denoiser: diffusers' `UNet2DConditionModel`.
        text_encoders: one, or two for SDXL.
        tokenizers: one for each.
    """

    name: str
    family: str
    denoiser: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    process: Diffusion

    adapted = "_attentions_"  # the transformers, as networks.lora has them

    @classmethod
    def of(cls, pipeline: Any, name: str) -> UNetModel:
        """The parts of a pipeline.

        Raises:
            SPFError: it is no text-to-image model.
        """
        unet = pipeline.unet
        if unet.config.in_channels != 4:
            raise SPFError(
                f"--model {name} is not a text-to-image model: its UNet takes {unet.config.in_channels} channels "
                "(inpainting and editing models do). Use the model that it was made from."
            )
        family = FAMILIES[type(pipeline).__name__]
        if family == "sd1" and unet.config.cross_attention_dim == 1024:
            family = "sd2"
        encoders = [getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")]
        tokenizers = [getattr(pipeline, part, None) for part in ("tokenizer", "tokenizer_2")]
        schedule = pipeline.scheduler.config
        return cls(
            name=name,
            family=family,
            denoiser=unet,
            vae=pipeline.vae.float(),
            text_encoders=[encoder for encoder in encoders if encoder is not None],
            tokenizers=[tokenizer for tokenizer in tokenizers if tokenizer is not None],
            process=Diffusion(_alphas_cumprod(schedule), schedule.get("prediction_type", "epsilon")),
        )

    @property
    def latent_scale(self) -> int:
        return vaes.scale(self.vae)

    @property
    def least(self) -> int:
        """Where the UNet's lowest level is one place, and its norms have nothing to do."""
        return int(self.latent_scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1))

    @property
    def most(self) -> None:
        return None

    @property
    def multiple(self) -> int:
        return self.latent_scale

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.latent_scale

    @property
    def text_limit(self) -> int:
        return TEXT_TOKENS - 2  # begin and end

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        if which:
            return ()
        ids: Sequence[int] = self.tokenizers[0](
            text, add_special_tokens=False, truncation=False, verbose=False
        ).input_ids
        return ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """What the UNet's cross-attention gets: `hidden` `[B, 77, E]`; for SDXL also `pooled` `[B, E2]`."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
            ).input_ids.to(next(encoder.parameters()).device)
            if self.family == "sdxl":
                out = encoder(ids, output_hidden_states=True)
                hidden.append(out.hidden_states[-2])
                pooled = out[0]
            else:
                hidden.append(encoder(ids)[0])
        if pooled is None:
            return {"hidden": hidden[0]}
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": pooled}

    def call(self, noisy_latents: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Call:
        kwargs: dict[str, Any] = {"encoder_hidden_states": text["hidden"]}
        if "pooled" in text:
            pooled = text["pooled"]
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.to(pooled.device, torch.float32)}
        return Call((noisy_latents, timesteps), kwargs)

    def to_latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return vaes.to_latents(self.vae, pixels, generator)


def _alphas_cumprod(config: Any) -> Tensor:
    from diffusers import DDPMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    return DDPMScheduler(**{key: config[key] for key in keys if key in config}).alphas_cumprod  # type: ignore[attr-defined]
