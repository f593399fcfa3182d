"""Base models: SD1.x, SD2.x and SDXL from a diffusers folder, a hub name or a single .safetensors file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.files import expanded
from spf_plugin.seam import Call

FAMILIES = {"StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl"}
SUPPORTED = "Supported are Stable Diffusion 1.x, 2.x and XL"
TEXT_TOKENS = 77  # begin and end among them


@dataclass
class BaseModel:
    """The parts of a text-to-image model that training needs, all frozen.

    Attributes:
        name: what the user called it.
        family: `sd1`, `sd2` or `sdxl`.
        unet: diffusers' `UNet2DConditionModel`.
        vae: in float32; SDXL's overflows in half precision.
        text_encoders: one, or two for SDXL.
        tokenizers: one for each.
        alphas_cumprod: `[1000]`, the noise schedule.
        prediction: `epsilon` or `v_prediction`.
    """

    name: str
    family: str
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    alphas_cumprod: Tensor
    prediction: str

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def least(self) -> int:
        """The side length in pixels at which the UNet's lowest level is one place, and its norms have nothing to do."""
        return int(self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side length in pixels that the model was made for."""
        return int(self.unet.config.sample_size) * self.latent_scale

    @property
    def text_limit(self) -> int:
        """Tokens of text that the text encoder takes."""
        return TEXT_TOKENS - 2  # begin and end

    def tokenize(self, text: str) -> Sequence[int]:
        """Token ids without begin, end and padding."""
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
        """A call of the UNet.

        Args:
            noisy_latents: `[B, 4, h, w]`.
            timesteps: `[B]`.
            text: as `encode` gives it.
            sizes: SDXL's size conditioning, `[B, 6]`: original height and width, crop top and left, target height and
                width.
        """
        kwargs: dict[str, Any] = {"encoder_hidden_states": text["hidden"]}
        if "pooled" in text:
            pooled = text["pooled"]
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.to(pooled.device, torch.float32)}
        return Call((noisy_latents, timesteps), kwargs)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A seeded sample of the VAE's posterior, scaled: `[3, R, R]` -> `[4, R/8, R/8]`, float32 on the CPU."""
        parameters = next(self.vae.parameters())
        posterior = self.vae.encode(pixels[None].to(parameters.device, parameters.dtype)).latent_dist
        mean, std = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
        noise = torch.randn(mean.shape, generator=generator)  # on the CPU: the same on every device
        return (mean + std * noise) * self.vae.config.scaling_factor


def load(name: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Load a base model.

    Args:
        name: a diffusers folder, a single `.safetensors` checkpoint, or a name on the Hugging Face hub.
        dtype: of the UNet and the text encoders.

    Raises:
        SPFError: there is nothing of that name, it is damaged, or it is another kind of model.
    """
    with quiet():
        return from_pipeline(load_pipeline(name, dtype), name)


def from_pipeline(pipeline: Any, name: str = "") -> BaseModel:
    """The parts of a diffusers pipeline, frozen.

    Raises:
        SPFError: it is another kind of model.
    """
    unet = pipeline.unet
    if unet.config.in_channels != 4:
        raise SPFError(
            f"--model {name} is not a text-to-image model: its UNet takes {unet.config.in_channels} channels "
            "(inpainting and editing models do). Use the model that it was made from."
        )
    schedule = pipeline.scheduler.config
    family = FAMILIES[type(pipeline).__name__]
    if family == "sd1" and unet.config.cross_attention_dim == 1024:
        family = "sd2"
    encoders = [getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")]
    tokenizers = [getattr(pipeline, part, None) for part in ("tokenizer", "tokenizer_2")]
    model = BaseModel(
        name=name,
        family=family,
        unet=unet,
        vae=pipeline.vae.float(),
        text_encoders=[encoder for encoder in encoders if encoder is not None],
        tokenizers=[tokenizer for tokenizer in tokenizers if tokenizer is not None],
        alphas_cumprod=_alphas_cumprod(schedule),
        prediction=schedule.get("prediction_type", "epsilon"),
    )
    for part in (model.unet, model.vae, *model.text_encoders):
        part.requires_grad_(False).eval()
    return model


@contextlib.contextmanager
def quiet() -> Any:
    """Without the progress bars of diffusers (for the parts) and transformers (for the weights, from 5 on), and without
    diffusers' notes on old scheduler files."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    level = diffusers_logging.get_verbosity()
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    diffusers_logging.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        for library in shown:
            library.enable_progress_bar()


def _alphas_cumprod(config: Any) -> Tensor:
    from diffusers import DDPMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    return DDPMScheduler(**{key: config[key] for key in keys if key in config}).alphas_cumprod  # type: ignore[attr-defined]


def load_pipeline(name: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a folder, a hub name or a single file; raises as `load` does."""
    path = expanded(name)
    if os.path.isfile(path):  # Path's own fails where a name is too long
        return _from_file(path, dtype)
    if os.path.isdir(path) and not (path / "model_index.json").is_file():
        raise SPFError(
            f"--model {name} is not a diffusers model: it has no model_index.json. Give the folder that contains unet, "
            "vae and text_encoder, or a single .safetensors checkpoint."
        )
    if not os.path.exists(path) and (path.suffix or path.is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise SPFError(f"--model {name}: there is no such file or folder, and a name on the hub is OWNER/MODEL.")
    import diffusers

    # Weights are read from safetensors only: other files can run code when they are opened.
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    try:
        source = str(path) if path.is_dir() else name
        kind = diffusers.DiffusionPipeline.load_config(source).get("_class_name", "")
        if kind not in FAMILIES:
            raise SPFError(f"--model {name} is a {kind}. {SUPPORTED}.")
        if kind == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        return getattr(diffusers, kind).from_pretrained(source, **options)
    except SPFError:
        raise
    except Exception as error:  # whatever diffusers, safetensors, json or the network raise on a damaged model
        raise SPFError(f"--model {name} cannot be loaded: {first_line(error)}") from error


def _from_file(path: Path, dtype: torch.dtype) -> Any:
    """A single checkpoint in the original format."""
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    if path.suffix != ".safetensors":
        raise SPFError(
            f"--model {path}: only .safetensors checkpoints are read, as a {path.suffix or 'file of another kind'} can "
            "run code when it is opened. Convert it first."
        )
    try:
        with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise SPFError(f"--model {path} is damaged or no safetensors file: {first_line(error)}") from error
    if not any(key.startswith("model.diffusion_model.input_blocks.") for key in keys):
        kind = "a LoRA" if any("lora" in key for key in keys) else "no Stable Diffusion checkpoint"
        raise SPFError(f"--model {path} is {kind}. {SUPPORTED}; give the base model's own file.")
    import diffusers

    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    pipeline = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    try:
        return pipeline.from_single_file(str(path), torch_dtype=dtype)
    except Exception as error:
        raise SPFError(
            f"--model {path} cannot be loaded: {first_line(error)}. diffusers fetches the configuration of single "
            "files from the Hugging Face hub; without a network, give a diffusers folder."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says anything, without its full stop."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
