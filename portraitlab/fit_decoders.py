"""The embedded model's two cheap decoders, for `spf_decoder`: `python -m portraitlab.fit_decoders`.

A fitted matrix (one colour per latent), and a tiny autoencoder's decoder that imitates the model's own.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from portraitlab import environment
from portraitlab.autoencoder import to_tensor
from portraitlab.model_files import DECODERS, MODEL_FOLDER
from portraitlab.portraits import BALANCED_RATES, render_batch, sample_person
from portraitlab.training import Progressor
from spf_plugin.enhancement.decoders import TinyDecoder, VaeDecoder, fit_linear, save_linear
from spf_plugin.trainer.models import load

app = typer.Typer(add_completion=False)


def colours(pixels: Tensor, side: int) -> Tensor:
    """Pixels averaged to `side` x `side`: what all decoders can be compared at."""
    return F.interpolate(pixels, size=(side, side), mode="area")


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL_FOLDER,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = DECODERS,
    portraits: Annotated[int, typer.Option(help="Distinct portraits.", min=8)] = 640,
    images: Annotated[int, typer.Option(help="Images the tiny decoder sees.", min=8)] = 4_000,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Fit both and report how far they are from the model's own decoder."""
    from diffusers import AutoencoderTiny

    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    torch.manual_seed(seed)
    base = load(str(model))
    own = VaeDecoder(base.vae, base.vae.config.scaling_factor)
    rng = np.random.default_rng([seed, 66])
    pictures, _ = render_batch(sample_person(rng, BALANCED_RATES) for _ in range(portraits))
    pixels = to_tensor(pictures)
    random = torch.Generator().manual_seed(seed)
    with Progressor("encoding portraits") as progress, torch.no_grad():
        latents, decoded = [], []
        for i, picture in enumerate(pixels, 1):
            latents.append(base.to_latents(picture, random))
            decoded.append(own(latents[-1][None])[0])
            progress(i, portraits)
        z, wanted = torch.stack(latents), torch.stack(decoded)
    linear, _ = fit_linear(z, pixels)
    save_linear(linear, out / "linear.safetensors")

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1, 1, 1, 1),
        decoder_block_out_channels=(14, 14, 14, 14), num_decoder_blocks=(2, 1, 1, 1),
    )  # fmt: skip
    tiny.encoder.requires_grad_(False)  # only there because the format wants one
    decoder = TinyDecoder(tiny)
    optimiser = torch.optim.AdamW(tiny.decoder.parameters(), lr=lr)
    steps = images // batch
    with Progressor("tiny decoder") as progress:
        for step in range(steps):
            chosen = torch.from_numpy(np.random.default_rng([seed, 67, step]).integers(0, portraits, batch))
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * max(0.01, 0.5 * (1 + math.cos(math.pi * step / steps)))
            loss = F.l1_loss(decoder(z[chosen]), wanted[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
            optimiser.step()
            progress((step + 1) * batch, images, float(loss.detach()))
    aside = out / "tiny.part"
    shutil.rmtree(aside, ignore_errors=True)
    tiny.half().save_pretrained(aside)
    tiny.float()
    shutil.rmtree(out / "tiny", ignore_errors=True)
    aside.rename(out / "tiny")

    held, _ = render_batch(sample_person(rng, BALANCED_RATES) for _ in range(48))
    with torch.no_grad():
        z = torch.stack([base.to_latents(picture, random) for picture in to_tensor(held)])
        reference = own(z)
        side = z.shape[-1]
        scores = {
            "linear": float((linear(z) - colours(reference, side)).square().mean().sqrt()),
            "tiny": float((decoder(z) - reference).square().mean().sqrt()),
            "tiny, averaged per latent": float((colours(decoder(z) - reference, side)).square().mean().sqrt()),
        }
    (out / "scores.json").write_text(
        json.dumps({"seed": seed, "images": images, "rms": scores}, indent=1) + "\n", encoding="utf-8"
    )
    for name, value in scores.items():
        print(f"{name:<26}{value:.3f}  (root mean square against the model's own decoder, pixels in [-1, 1])")


if __name__ == "__main__":
    app()
