"""Where the embedded model lies, how it is loaded, and how portraits are sampled from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from portraitlab import environment  # noqa: F401  (before diffusers)
from spf_plugin.trainer import models

MODEL_FOLDER = Path(__file__).parent / "model"
#: The second embedded model, a diffusion transformer.
DIT_FOLDER = Path(__file__).parent / "model_dit"
BASES = {"unet": MODEL_FOLDER, "dit": DIT_FOLDER}
JUDGE_FILE = MODEL_FOLDER / "judge" / "judge.safetensors"
#: Cheap decoders of the embedded model's latents: `linear.safetensors` and the folder `tiny`.
DECODERS = MODEL_FOLDER.parent / "decoders"
#: Small CLIP models of portraits: the first may guide training, the second only scores.
CLIP_FOLDERS = (MODEL_FOLDER.parent / "clip" / "guide", MODEL_FOLDER.parent / "clip" / "scorer")


def is_flow(model: Path) -> bool:
    """Whether a folder's model is the transformer, which predicts a flow."""
    return (model / "transformer").is_dir()


def min_snr_gamma(model: Path) -> float:
    """What LoRAs for a folder's model are trained with: the UNet's errors are weighed, a flow's are not (0)."""
    return 0.0 if is_flow(model) else 5.0


def load_pipeline(folder: Path = MODEL_FOLDER, device: str = "cpu") -> Any:
    """An embedded model in float32: a `StableDiffusionPipeline` or a `StableDiffusion3Pipeline`.

    Raises:
        FileNotFoundError: if the folder holds no model.
    """
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"no model in {folder}: train one with python -m portraitlab.train_base (or train_dit), "
            "then export it with python -m portraitlab.export_base"
        )
    with models.quiet():
        pipe = models.load_pipeline(str(folder), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 3.5,
    batch: int = 16,
    report: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw one image a prompt with the pipeline's own scheduler, each from its own seed.

    Args:
        pipe: as `load_pipeline` gives it.
        prompts: N captions.
        seeds: N seeds of the starting noise; the image does not depend on its neighbours' seeds.
        steps: of the scheduler: DDIM, or Euler along the flow.
        guidance: classifier-free guidance scale.
        batch: images at a time.
        report: called with (images done, N).

    Returns:
        uint8 images `[N, 128, 128, 3]`.
    """
    out = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
        pictures = pipe(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=128,
            width=128,
            output_type="np",
        ).images
        out.append((pictures * 255).round().astype(np.uint8))
        if report:
            report(min(start + batch, len(prompts)), len(prompts))
    return np.concatenate(out)


def sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Images `[N, H, W, 3]` as one picture with so many columns; missing cells are white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, h, w, c), 255, np.uint8)
    cells[:n] = images
    return cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
