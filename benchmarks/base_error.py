"""What `spf_base` does to the base model: `python -m benchmarks.base_error`.

The embedded model's noise predictions with quantised weights, against those with its own weights in float32, on
portraits that it never saw. Beside it sd-scripts' `--fp8_base` (every weight of the UNet through float8_e4m3fn), and,
to show what such a number means, what a caption changes: the same prediction with the hair colour left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from portraitlab.captions import describe
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.portraits import BASE_RATES, render_batch, sample_person
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.config import BASES
from spf_plugin.families import known
from spf_plugin.trainer.models import BaseModel, load

TIMESTEPS = (100, 300, 500, 700, 900)
IMAGES, SEED = 32, 77
NO_HAIR = "caption without the hair colour"


def inputs(model: BaseModel, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[N, 4, h, w]`, and text `[N, 77, E]` of full captions and of captions without the hair colour."""
    rng = np.random.default_rng(SEED)
    persons = [sample_person(rng, BASE_RATES) for _ in range(count)]
    pixels = torch.from_numpy(np.asarray(render_batch(persons)[0])).permute(0, 3, 1, 2).float() / 127.5 - 1
    random = torch.Generator().manual_seed(SEED)
    latents = torch.stack([model.to_latents(image, random) for image in pixels])
    topics = ("hair", "expression", "clothes", "background")
    return latents, *(model.encode([describe(p, names) for p in persons])["hidden"] for names in (topics, topics[1:]))  # type: ignore[return-value]


@torch.no_grad()
def predictions(unet: nn.Module, model: BaseModel, latents: Tensor, text: Tensor, timestep: int) -> Tensor:
    """Predicted noise, `[N, 4, h, w]`; the noise is a function of the timestep."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
    timesteps = torch.full((len(latents),), timestep)
    noisy = model.process.noisy(latents, noise, timesteps)
    return unet(noisy, timesteps, encoder_hidden_states=text).sample


def quantised(unet: nn.Module, kind: str) -> nn.Module:
    """A copy of the UNet with `spf_base=kind`, or with all weights rounded to `fp8`."""
    unet = copy.deepcopy(unet)
    if kind == "fp8":
        return unet.to(torch.float8_e4m3fn).float()
    QuantisedBase(known.find(unet).linear_layers(), kind, torch.device("cpu"))
    return unet


def measure(count: int = IMAGES, timesteps: Sequence[int] = TIMESTEPS) -> dict[str, list[float]]:
    """Relative error of the prediction, `|a - b| / |b|` over all images, for each timestep."""
    model = load(str(MODEL_FOLDER))
    latents, full, less = inputs(model, count)
    exact = [predictions(model.denoiser, model, latents, full, t) for t in timesteps]
    found: dict[str, list[float]] = {}
    for kind in ("fp8", *BASES[1:], NO_HAIR):
        unet = model.denoiser if kind == NO_HAIR else quantised(model.denoiser, kind)
        text = less if kind == NO_HAIR else full
        others = [predictions(unet, model, latents, text, t) for t in timesteps]
        found[kind] = [float((a - b).norm() / b.norm()) for a, b in zip(others, exact, strict=True)]
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table(title=f"Relative error of the predicted noise, {IMAGES} portraits, embedded model")
    table.add_column("base")
    for timestep in TIMESTEPS:
        table.add_column(f"t = {timestep}", justify="right")
    for kind, errors in measure().items():
        table.add_row(kind, *(f"{error:.4f}" for error in errors))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
