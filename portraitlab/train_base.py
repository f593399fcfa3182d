"""Train the embedded text-to-image model from scratch: `python -m portraitlab.train_base --out DIR`.

Stages, each resumed where it stopped: autoencoder, pool of encoded portraits, then text encoder and UNet jointly.
Every random draw of a step comes from the seed and the step's number, so a resumed run is the same run.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from portraitlab import environment
from portraitlab.captions import caption
from portraitlab.portraits import BASE_RATES, Person, render_batch, sample_person
from portraitlab.text import build_text_encoder, save_tokenizer, token_ids

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


@contextmanager
def half_precision(device: str) -> Iterator[None]:
    """bfloat16 where it is fast (1.3 times the images a second on a CPU with AMX), but attention in float32 on a CPU:
    the backward pass of its bfloat16 kernel takes three times as long there.
    """
    attention = F.scaled_dot_product_attention

    def in_float32(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), *args, **options)

    if torch.device(device).type == "cpu":
        F.scaled_dot_product_attention = in_float32  # type: ignore[assignment]
    try:
        with environment.bfloat16_where_fast(device):
            yield
    finally:
        F.scaled_dot_product_attention = attention


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights for noise prediction, with more weight at the highest noise: float32 `[B]`.

    `min(snr, gamma) / snr` (arXiv 2303.09556) times `max(1, snr ** -0.5)`: the flat colours of a portrait are decided
    at the highest noise, where a small error of the predicted noise is a large one of the picture. The factor lies half
    way between counting errors of the noise and errors of the picture.
    """
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr * snr.rsqrt().clamp(min=1.0)


class Progressor:
    """A bar on a terminal, one line a while elsewhere."""

    def __init__(self, title: str, every: float = 30.0) -> None:
        self.console = Console()
        self.title, self.every, self.last = title, every, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(title)

    def __enter__(self) -> Progressor:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, loss: float | None = None) -> None:
        text = self.title if loss is None else f"{self.title} loss {loss:.4f}"
        self.bar.update(self.task, completed=done, total=total, description=text)
        if not self.console.is_terminal and (time.monotonic() - self.last > self.every or done >= total):
            self.last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {text} {done}/{total}", flush=True)


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
    (aside / "score.json").write_text(json.dumps({"psnr": quality}))
    aside.replace(final)
    return final


class Trainer:
    """UNet, text encoder, their moving averages and the optimiser, with exact checkpoints."""

    def __init__(self, *, images: int, batch: int, lr: float, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.images, self.batch, self.lr, self.seed, self.device = images, batch, lr, seed, device
        self.unet, self.text = build_unet().to(device), build_text_encoder().to(device)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.ema = [p.detach().clone() for p in self.parameters]
        embeddings = {id(p) for name, p in self.text.named_parameters() if "embeddings." in name}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in embeddings], "weight_decay": 0.01},
            {"params": [p for p in self.parameters if id(p) in embeddings], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
        betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2  # type: ignore
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).to(device)
        self.step = 0
        self.extended: list[list[int]] = []  # [images seen, planned until then] of every bent schedule

    @property
    def done(self) -> int:
        """Images seen."""
        return self.step * self.batch

    def train_step(self, latents: Tensor, persons: Sequence[Person], tokenizer: Any) -> float:
        """One optimiser step on a batch drawn from the pool; returns the loss."""
        rng = np.random.default_rng([self.seed, 31, self.step])
        noise_source = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        chosen = rng.integers(0, len(persons), self.batch)
        texts = ["" if rng.random() < 0.1 else caption(persons[i], rng) for i in chosen]
        ids = token_ids(tokenizer, texts).to(self.device)
        clean = latents[torch.from_numpy(chosen)].float().to(self.device)
        noise = torch.randn(clean.shape, generator=noise_source).to(self.device)
        timesteps = torch.randint(0, 1000, (self.batch,), generator=noise_source).to(self.device)
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        fraction = self.done / self.images
        lr = self.lr * min(1.0, (self.step + 1) / 300) * max(0.01, 0.5 * (1 + math.cos(math.pi * fraction)))
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        with half_precision(self.device):
            states = self.text(ids)[0]
            predicted = self.unet(noisy, timesteps, states, return_dict=False)[0]
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (error * snr_weights(self.alphas_cumprod, timesteps)).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - keep)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the whole state aside, then put it in place."""
        state = {
            "unet": self.unet.state_dict(),
            "text": self.text.state_dict(),
            "ema": self.ema,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "settings": self.settings(),
            "extended": self.extended,
        }
        aside = path.with_suffix(".part")
        torch.save(state, aside)
        aside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; other `images` than it was written with bend the schedule from here on.

        Raises:
            ValueError: if it was written with other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.extended = list(state.get("extended", []))
        before = state["settings"]["images"]
        if self.images != before:
            self.extended.append([state["step"] * self.batch, before])
            state["settings"]["images"] = self.images
        if state["settings"] != self.settings():
            raise ValueError(
                f"{path} was written with {state['settings']}, this run has {self.settings()}: "
                "use the same options, or another --out"
            )
        self.unet.load_state_dict(state["unet"])
        self.text.load_state_dict(state["text"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.ema = [value.to(self.device) for value in state["ema"]]
        self.step = state["step"]

    def settings(self) -> dict[str, Any]:
        """What must agree for a resumed run to be the same run."""
        return {
            "images": self.images,
            "batch": self.batch,
            "lr": self.lr,
            "seed": self.seed,
            "widths": list(WIDTHS),
        }


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
    from portraitlab.pool import build_pool, load_pool

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    vae = prepare_autoencoder(out, images=vae_images, seed=seed, device=device)
    with Progressor("encoding portraits") as progress:
        build_pool(out / "pool", vae, chunks=pool, seed=seed, device=device, workers=workers, report=progress)
    latents, persons = load_pool(out / "pool", chunks=pool, seed=seed)
    print(f"pool: {len(persons)} portraits, latents mean {latents.float().mean():.3f} std {latents.float().std():.3f}")
    tokenizer = save_tokenizer(out / "tokenizer")
    trainer = Trainer(images=images, batch=batch, lr=lr, seed=seed, device=device)
    checkpoint = out / "base.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on from image {trainer.done}")
    saved, smooth = time.monotonic(), None
    stop: list[int] = []  # a signal ends the run after the step in progress, so that the state saved is whole
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _frame: stop.append(number))
    with Progressor("UNet and text encoder") as progress:
        while trainer.done < images and not stop:
            loss = trainer.train_step(latents, persons, tokenizer)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            progress(trainer.done, images, smooth)
            if time.monotonic() - saved > 60 * save_minutes:
                trainer.save(checkpoint)
                saved = time.monotonic()
    trainer.save(checkpoint)
    if stop:
        print(f"stopped at image {trainer.done} of {images}: the same command goes on from {checkpoint}")
        raise typer.Exit(130)
    print(f"done: {checkpoint}; export it with python -m portraitlab.export_base --work {out}")


if __name__ == "__main__":
    app()
