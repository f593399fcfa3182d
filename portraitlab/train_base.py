"""Train the embedded text-to-image model from scratch: `python -m portraitlab.train_base --out DIR`.

Stages, each resumed where it stopped: autoencoder, pool of encoded portraits, then text encoder and UNet jointly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from portraitlab.pool import prepare_pool
from portraitlab.portraits import BASE_RATES, render_batch, sample_person
from portraitlab.text import build_text_encoder, save_tokenizer, token_ids
from portraitlab.training import CHECKPOINT, Progressor, Trainer, half_precision, prepare_process

DEFAULT_WORK = Path.home() / ".cache" / "spf-plugin" / "portraitlab" / "work"
#: Each of the 32 groups of the group norms needs two channels or more: with one, the last norm removes every channel's
#: mean, the output cannot carry the mean of the noise, and captioned flat colours are not learned (seen with 32 here).
WIDTHS = (64, 64, 128, 128)
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

app = typer.Typer(add_completion=False)


def build_unet(text_width: int = 64) -> Any:
    """A fresh `UNet2DConditionModel` with the block structure of Stable Diffusion 1.5 and small widths."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=2,
        norm_num_groups=32,
        cross_attention_dim=text_width,
        attention_head_dim=2,
    )


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights for noise prediction, with more weight at the highest noise: float32 `[B]`.

    `min(snr, gamma) / snr` (arXiv 2303.09556) times `max(1, snr ** -0.5)`: the flat colours of a portrait are decided
    at the highest noise, where a small error of the predicted noise is a large one of the picture. The factor lies half
    way between counting errors of the noise and errors of the picture.
    """
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr * snr.rsqrt().clamp(min=1.0)


def prepare_autoencoder(work: Path, *, images: int, seed: int, device: str) -> Path:
    """Train and normalise the autoencoder unless `work/vae` exists; returns that folder."""
    from portraitlab.autoencoder import decode, encode, normalise, psnr, to_tensor, train_autoencoder

    final = work / "vae"
    if (final / "config.json").exists():
        return final
    with Progressor("autoencoder") as progress:
        model = train_autoencoder(images=images, seed=seed, device=device, checkpoint=work / "vae.pt", report=progress)
    rng = np.random.default_rng([seed, 13])
    pictures, _ = render_batch(sample_person(rng, BASE_RATES) for _ in range(384))
    latents = encode(model, pictures[:320])
    normalise(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    held_out = pictures[320:]
    quality = psnr(decode(model, encode(model, held_out)), to_tensor(held_out))
    print(f"autoencoder: {quality:.2f} dB on {len(held_out)} held-out portraits", flush=True)
    aside = work / "vae.part"
    model.save_pretrained(aside)
    (aside / "score.json").write_text(json.dumps({"psnr": quality}), encoding="utf-8")
    aside.replace(final)
    return final


class NoisePrediction:
    """The UNet and the text encoder, trained jointly to predict the noise: a `Recipe`."""

    def __init__(self, tokenizer: Any, *, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.device = tokenizer, device
        self.unet, self.text = build_unet().to(device), build_text_encoder().to(device)
        self.networks = {"unet": self.unet, "text": self.text}
        betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2  # type: ignore
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).to(device)

    def settings(self) -> dict[str, Any]:
        """The widths of the UNet."""
        return {"widths": list(WIDTHS)}

    def loss(self, clean: Tensor, captions: Sequence[str], source: torch.Generator) -> Tensor:
        """The weighted mean squared error of the predicted noise, a scalar; of latents `[B, 4, 16, 16]`."""
        ids = token_ids(self.tokenizer, captions).to(self.device)
        noise = torch.randn(clean.shape, generator=source).to(self.device)
        timesteps = torch.randint(0, 1000, (len(clean),), generator=source).to(self.device)
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with half_precision(self.device):
            states = self.text(ids)[0]
            predicted = self.unet(noisy, timesteps, states, return_dict=False)[0]
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return (error * snr_weights(self.alphas_cumprod, timesteps)).mean()


@app.command()
def main(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and working files; a second run resumes.")
    ] = DEFAULT_WORK,
    images: Annotated[int, typer.Option(help="Images the UNet sees in all; sets the schedule.", min=32)] = 125_000,
    pool: Annotated[int, typer.Option(help="Chunks of 500 portraits to render and encode.", min=1)] = 32,
    vae_images: Annotated[int, typer.Option(help="Work of the autoencoder, in 128 px images.", min=1)] = 18_500,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.0e-3,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the training loop.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Processes that encode the pool on a CPU.", min=1)] = 2,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
) -> None:
    """Train the autoencoder, then the text encoder and the UNet, from drawn portraits."""
    device = prepare_process(device, threads)
    out.mkdir(parents=True, exist_ok=True)
    vae = prepare_autoencoder(out, images=vae_images, seed=seed, device=device)
    latents, persons = prepare_pool(out / "pool", vae, chunks=pool, seed=seed, device=device, workers=workers)
    recipe = NoisePrediction(save_tokenizer(out / "tokenizer"), seed=seed, device=device)
    trainer = Trainer(recipe, images=images, batch=batch, lr=lr, seed=seed, device=device)
    checkpoint = out / CHECKPOINT
    if not trainer.run("UNet and text encoder", latents, persons, checkpoint, save_minutes):
        raise typer.Exit(130)
    print(f"done: {checkpoint}; export it with python -m portraitlab.export_base --work {out}")


if __name__ == "__main__":
    app()
