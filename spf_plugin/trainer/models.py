"""Base models: SD1.x, SD2.x and SDXL from a diffusers folder, a hub name or a single .safetensors file; SD3 from the
first two."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.files import expanded
from spf_plugin.seam import Call
from spf_plugin.trainer import mmdits, unets
from spf_plugin.trainer.processes import Process

SUPPORTED = "Supported are Stable Diffusion 1.x, 2.x and XL, and 3 in diffusers' format"


class BaseModel(Protocol):
    """The parts of a text-to-image model that training needs, all frozen."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def family(self) -> str:
        """`sd1`, `sd2`, `sdxl` or `sd3`."""
        ...

    @property
    def denoiser(self) -> Any:
        """diffusers' model."""
        ...

    @property
    def vae(self) -> Any:
        """In float32; SDXL's overflows in half precision."""
        ...

    @property
    def text_encoders(self) -> Sequence[Any]:
        """All that it has."""
        ...

    @property
    def process(self) -> Process:
        """How its latents become noisy."""
        ...

    @property
    def adapted(self) -> str:
        """Regular expression for the LoRA names of what a plain LoRA trains of it."""
        ...

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along one side."""
        ...

    @property
    def least(self) -> int:
        """The side length in pixels up to which there is too little for the model to work on."""
        ...

    @property
    def most(self) -> int | None:
        """The largest side length in pixels, if there is one."""
        ...

    @property
    def multiple(self) -> int:
        """Of what the side length in pixels must be a multiple."""
        ...

    @property
    def resolution(self) -> int:
        """The side length in pixels that the model was made for."""
        ...

    @property
    def text_limit(self) -> int:
        """Tokens of text that the text encoder takes."""
        ...

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        """Token ids without begin, end and padding; of the second tokenizer (T5's) with `which=1`, none without one."""
        ...

    def encode(self, prompts: Sequence[str]) -> Text:
        """Their conditioning, by the names that the denoiser's family has for it."""
        ...

    def call(self, noisy_latents: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Call:
        """A call of the denoiser.

        Args:
            noisy_latents: `[B, C, h, w]`.
            timesteps: `[B]`.
            text: as `encode` gives it.
            sizes: SDXL's size conditioning, `[B, 6]`: original height and width, crop top and left, target height and
                width.
        """
        ...

    def to_latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A seeded sample of the VAE's posterior, scaled: `[3, R, R]` -> `[C, R/8, R/8]`, float32 on the CPU."""
        ...


#: Which base model a diffusers pipeline is.
KINDS: Mapping[str, Callable[[Any, str], BaseModel]] = {
    "StableDiffusionPipeline": unets.UNetModel.of,
    "StableDiffusionXLPipeline": unets.UNetModel.of,
    "StableDiffusion3Pipeline": mmdits.SD3Model.of,
}


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
    model = KINDS[type(pipeline).__name__](pipeline, name)
    for part in (model.denoiser, model.vae, *model.text_encoders):
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
        config = diffusers.DiffusionPipeline.load_config(source)
        kind = config.get("_class_name", "")
        if kind not in KINDS:
            raise SPFError(f"--model {name} is a {kind}. {SUPPORTED}.")
        if kind == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        # A part that a model goes without must be said to be absent, else diffusers looks for it.
        options |= {name: None for name, what in config.items() if name.endswith("_3") and what == [None, None]}
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
