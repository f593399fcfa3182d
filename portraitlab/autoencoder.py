"""The small autoencoder of the embedded model: 128 px portraits to 16x16x4 latents and back.

It has the block structure of Stable Diffusion's (factor 8, four levels) and small widths. Trained on renders with a
pixel loss that counts small parts (eyes, mouth, glasses, ...) more, and hardly any KL. Because trainers hard-code
Stable Diffusion's scaling factor, the latents are normalised inside the network until `0.18215 * latents` has unit
variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from portraitlab import environment
from portraitlab.portraits import BALANCED_RATES, PARTS, render_batch, sample_person

SCALING_FACTOR = 0.18215
WIDTHS = (16, 32, 64, 64)
#: How much more a pixel of a part counts than background, hair, skin and clothes.
DETAIL_WEIGHT = 3.0
_LARGE_PARTS = ("background", "hair", "skin", "clothes", "hat", "scarf")


def build_autoencoder() -> Any:
    """A fresh diffusers `AutoencoderKL` with four levels, 4 latent channels and small widths."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
    )


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 images `[N, H, W, 3]` as float32 `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """float pixels `[N, 3, H, W]` in [-1, 1] as uint8 images `[N, H, W, 3]`."""
    out: NDArray[np.uint8] = (
        ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )
    return out


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], over all images together."""
    return float(10 * torch.log10(4.0 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


def detail_weights(parts: NDArray[np.uint8]) -> Tensor:
    """Loss weights `[N, 1, H, W]` float32 for part maps `[N, H, W]`: more for the small parts."""
    table = np.array([1.0 if name in _LARGE_PARTS else 1.0 + DETAIL_WEIGHT for name in PARTS], np.float32)
    return torch.from_numpy(table[parts])[:, None]


def train_autoencoder(
    *,
    images: int,
    seed: int,
    device: str,
    checkpoint: Path,
    pool: int = 5000,
    lr: float = 2e-3,
    report: Callable[[int, int, float], None],
) -> Any:
    """Train an autoencoder; resumes from `checkpoint` if it is there.

    The first 60 % of the work sees 64 px crops (cheaper steps, the same scale of detail), the rest crops of the face
    and whole portraits by turns.

    Args:
        images: work in whole 128 px images; a 64 px crop counts as a quarter.
        seed: of weights, data and order.
        device: torch device; the network runs in bfloat16 where that is fast.
        checkpoint: file for the state, written about once a minute.
        pool: number of portraits rendered.
        lr: peak learning rate (AdamW, cosine).
        report: called with (work done, work in all, loss).

    Returns:
        The trained autoencoder, not yet normalised.
    """
    torch.manual_seed(seed)
    model = build_autoencoder().to(device)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    done, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        ema, done, step = state["ema"], state["done"], state["step"]
    if done < images:
        rng = np.random.default_rng([seed, 11])
        pictures, parts = render_batch(sample_person(rng, BALANCED_RATES) for _ in range(pool))
    while done < images:
        rng = np.random.default_rng([seed, 12, step])
        late = done >= 0.6 * images
        whole = late and step % 2 == 1
        count = 8 if whole else 20
        chosen = rng.integers(0, pool, count)
        x, w = to_tensor(pictures[chosen]), detail_weights(parts[chosen])
        if not whole:
            low, high = (3, 6) if late else (0, 9)  # late crops lie on the face, where the detail is
            corners = rng.integers(low, high, (count, 2)) * 8
            x = torch.stack([x[i, :, a : a + 64, b : b + 64] for i, (a, b) in enumerate(corners)])
            w = torch.stack([w[i, :, a : a + 64, b : b + 64] for i, (a, b) in enumerate(corners)])
        x, w = x.to(device), w.to(device)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * done / images)))
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with environment.bfloat16_where_fast(device):
            moments = model.encode(x).latent_dist
            z = moments.mean + moments.std * torch.randn(moments.mean.shape, generator=noise).to(device)
            y = model.decode(z).sample
        error = y.float() - x
        loss = (w * (error.abs() + error.square())).sum() / (3 * w.sum()) + 1e-6 * moments.kl().float().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        done += count if whole else count / 4
        keep = min(0.995, step / (step + 20))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - keep)
        report(int(done), images, float(loss.detach()))
        if step % 200 == 0 or done >= images:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "ema": ema,
                "done": done,
                "step": step,
            }
            aside = checkpoint.with_suffix(".part")
            torch.save(state, aside)
            aside.replace(checkpoint)
    model.load_state_dict(ema)
    return model.eval()


@torch.no_grad()
def normalise(model: Any, mean: Tensor, std: Tensor) -> None:
    """Fold an affine map into the network: latents of this mean and std become `(z - mean) / std / 0.18215`.

    `quant_conv` maps the mean and shifts the log variance, `post_quant_conv` undoes it: reconstructions stay the same.

    Args:
        model: the autoencoder, changed in place.
        mean: `[C]` mean of the latents now.
        std: `[C]` standard deviation of the latents now.
    """
    channels = model.config.latent_channels
    factor = (1.0 / (std * SCALING_FACTOR)).to(model.quant_conv.weight)
    mean = mean.to(factor)
    model.quant_conv.bias[:channels] -= mean
    model.quant_conv.bias[:channels] *= factor
    model.quant_conv.weight[:channels] *= factor[:, None, None, None]
    model.quant_conv.bias[channels:] += 2 * factor.log()
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    model.post_quant_conv.weight /= factor[None, :, None, None]


@torch.no_grad()
def encode(model: Any, images: NDArray[np.uint8], batch: int = 16) -> Tensor:
    """Mean latents `[N, 4, H/8, W/8]` float32 on the CPU, not multiplied by the scaling factor."""
    device = next(model.parameters()).device
    out = []
    for start in range(0, len(images), batch):
        out.append(model.encode(to_tensor(images[start : start + batch]).to(device)).latent_dist.mean.float().cpu())
    return torch.cat(out)


@torch.no_grad()
def decode(model: Any, latents: Tensor, batch: int = 16) -> Tensor:
    """Pixels `[N, 3, H, W]` float32 in about [-1, 1] on the CPU, from latents not multiplied by the scaling factor."""
    device = next(model.parameters()).device
    return torch.cat([model.decode(part.to(device)).sample.float().cpu() for part in latents.split(batch)])
