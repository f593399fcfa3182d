"""Stable Diffusion 3 and 3.5, of diffusers' pipeline, with T5 and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spf_plugin.families.base import Text
from spf_plugin.seam import Call
from spf_plugin.trainer import vae as vaes
from spf_plugin.trainer.processes import RectifiedFlow

T5_TOKENS = 256  # the pipeline's `max_sequence_length`


@dataclass
class SD3Model:
    """`spf_plugin.trainer.models.BaseModel`.

    Attributes:
        denoiser: diffusers' `SD3Transformer2DModel`.
        text_encoders: CLIP-L, CLIP-G and, if the pipeline has it, T5.
        pipeline: encodes prompts.
    """

    name: str
    denoiser: Any
    vae: Any
    text_encoders: list[Any]
    process: RectifiedFlow
    pipeline: Any

    family = "sd3"
    adapted = r"_transformer_blocks_\d+_(attn2?|ff|ff_context)_"  # without the layers of the modulation

    @classmethod
    def of(cls, pipeline: Any, name: str) -> SD3Model:
        """The parts of a pipeline."""
        encoders = [getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
        schedule = pipeline.scheduler.config
        return cls(
            name=name,
            denoiser=pipeline.transformer,
            vae=pipeline.vae.float(),
            text_encoders=[encoder for encoder in encoders if encoder is not None],
            process=RectifiedFlow(schedule.get("shift", 1.0), schedule.get("num_train_timesteps", 1000)),
            pipeline=pipeline,
        )

    @property
    def latent_scale(self) -> int:
        return vaes.scale(self.vae)

    @property
    def least(self) -> int:
        return 0

    @property
    def most(self) -> int:
        """What the model has positions for."""
        return int(self.denoiser.config.pos_embed_max_size) * self.multiple

    @property
    def multiple(self) -> int:
        return self.latent_scale * int(self.denoiser.config.patch_size)

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.latent_scale

    @property
    def text_limit(self) -> int:
        """T5's, which reads on where CLIP has ended."""
        if self.pipeline.tokenizer_3 is not None:
            return T5_TOKENS - 1  # the end
        return int(self.pipeline.tokenizer.model_max_length) - 2  # begin and end

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        tokenizer = self.pipeline.tokenizer_3 if which else self.pipeline.tokenizer
        if tokenizer is None:
            return ()
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """`hidden` `[B, S, E]`, the two CLIPs' positions and behind them T5's (zeros without it), and `pooled`
        `[B, E2]`."""
        texts = list(prompts)
        device = next(self.text_encoders[0].parameters()).device
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"hidden": hidden, "pooled": pooled}

    def call(self, noisy_latents: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Call:
        return Call(
            (noisy_latents,),
            {
                "encoder_hidden_states": text["hidden"],
                "pooled_projections": text["pooled"],
                "timestep": timesteps,
            },
        )

    def to_latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return vaes.to_latents(self.vae, pixels, generator)
