"""Train the judge on renders, clean and damaged: `python -m portraitlab.train_judge --work DIR`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor

from portraitlab import environment
from portraitlab.autoencoder import decode, encode, to_images, to_tensor
from portraitlab.judge import Judge, accuracy, judge_loss, label_tensors, predict, save_judge
from portraitlab.model_files import JUDGE_FILE
from portraitlab.portraits import BALANCED_RATES, Person, render_batch, sample_person
from portraitlab.train_base import DEFAULT_WORK
from portraitlab.training import Progressor

app = typer.Typer(add_completion=False)


def round_trips(vae: Any, images: NDArray[np.uint8], noise: float, seed: int, report: Any = None) -> NDArray[np.uint8]:
    """Images after the autoencoder, with noise of up to `noise` standard deviations on their latents."""
    source = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(images), 32):
        with environment.bfloat16_where_fast("cpu"):
            z = encode(vae, images[start : start + 32], 4)
        scale = torch.rand((len(z), 1, 1, 1), generator=source) * noise
        # Noise on a coarser grid too: samples differ from renders in patches, not only in single cells.
        coarse = F.interpolate(torch.randn((len(z), 4, 4, 4), generator=source), size=z.shape[-2:], mode="bilinear")
        z = z + scale * z.std() * (0.7 * torch.randn(z.shape, generator=source) + 0.7 * coarse)
        with environment.bfloat16_where_fast("cpu"):
            out.append(to_images(decode(vae, z, 4)))
        if report:
            report(min(start + 32, len(images)), len(images))
    return np.concatenate(out)


def damage(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Random blur, noise, brightness and shift for a batch of pixels `[N, 3, H, W]`; flips half of the batches."""
    choice = rng.random(4)
    if choice[0] < 0.3:
        factor = float(rng.uniform(0.4, 0.8))
        small = F.interpolate(pixels, scale_factor=factor, mode="bilinear", antialias=True)
        pixels = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    if choice[1] < 0.5:
        source = torch.Generator().manual_seed(int(rng.integers(2**31)))
        pixels = pixels + float(rng.uniform(0, 0.12)) * torch.randn(pixels.shape, generator=source)
    shift = torch.from_numpy(rng.uniform(-0.05, 0.05, (len(pixels), 3, 1, 1))).float()
    pixels = (pixels + shift).clamp(-1, 1)
    dx, dy = (int(v) for v in rng.integers(-6, 7, 2))
    pixels = F.pad(pixels, (6, 6, 6, 6), mode="replicate")[:, :, 6 + dy : 134 + dy, 6 + dx : 134 + dx]
    return pixels.flip(3) if choice[2] < 0.5 else pixels


def draw(seed: int, part: int, count: int) -> tuple[list[Person], NDArray[np.uint8]]:
    """`count` balanced persons and their renders."""
    rng = np.random.default_rng([seed, part])
    persons = [sample_person(rng, BALANCED_RATES) for _ in range(count)]
    return persons, render_batch(persons)[0]


@app.command()
def main(
    work: Annotated[
        Path, typer.Option(help="Folder of python -m portraitlab.train_base: its autoencoder is used.")
    ] = DEFAULT_WORK,
    out: Annotated[Path, typer.Option(help="File to write.")] = JUDGE_FILE,
    clean: Annotated[int, typer.Option(help="Clean renders.", min=100)] = 12_000,
    trips: Annotated[int, typer.Option(help="Renders sent through the autoencoder.", min=64)] = 3_000,
    images: Annotated[int, typer.Option(help="Images seen in training.", min=64)] = 80_000,
    seed: int = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train, report the accuracy on held-out renders and round trips, and write the weights."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    torch.manual_seed(seed)
    folder = work / "vae-tuned" if (work / "vae-tuned" / "config.json").exists() else work / "vae"
    vae = AutoencoderKL.from_pretrained(folder).eval()
    persons, pictures = draw(seed, 51, clean)
    with Progressor("round trips") as progress:
        trip_persons, trip_pictures = draw(seed, 52, trips)
        trip_pictures = round_trips(vae, trip_pictures, 0.5, seed, progress)
    persons, pictures = persons + trip_persons, np.concatenate([pictures, trip_pictures])
    classes, flags = label_tensors(persons)
    judge = Judge()
    batch, lr, done, step = 64, 3e-3, 0, 0
    optimiser = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    with Progressor("judge") as progress:
        while done < images:
            rng = np.random.default_rng([seed, 53, step])
            half = batch // 2
            chosen = np.concatenate([rng.integers(0, clean, half), clean + rng.integers(0, trips, batch - half)])
            x = torch.cat([damage(part, rng) for part in to_tensor(pictures[chosen]).split(16)])
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * max(0.01, 0.5 * (1 + math.cos(math.pi * done / images)))
            index = torch.from_numpy(chosen)
            with environment.bfloat16_where_fast("cpu"):
                logits = judge(x)
            loss = judge_loss(logits.float(), classes[index], flags[index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            step, done = step + 1, done + batch
            progress(done, images, float(loss.detach()))
    save_judge(judge.eval(), out)
    held, held_pictures = draw(seed, 54, 600)
    truth = [p.labels() for p in held]
    scores = {
        "renders": accuracy(predict(judge, held_pictures), truth),
        "round_trips": accuracy(predict(judge, round_trips(vae, held_pictures, 0.0, seed)), truth),
    }
    out.with_name("accuracy.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print(f"{'held-out accuracy':<18}{'renders':>9}{'round trips':>13}")
    for name, value in scores["renders"].items():
        print(f"{name:<18}{value:>9.3f}{scores['round_trips'][name]:>13.3f}")


if __name__ == "__main__":
    app()
