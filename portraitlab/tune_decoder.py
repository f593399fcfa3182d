"""Improve the decoder, the latents staying what they are: `python -m portraitlab.tune_decoder --work DIR`.

The encoder is frozen, so a base model trained on its latents goes on to fit; only `post_quant_conv` and the decoder
learn. The work is bounded by images, and a stopped run goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from portraitlab import environment
from portraitlab.autoencoder import decode, detail_weights, encode, psnr, to_tensor
from portraitlab.portraits import BALANCED_RATES, BASE_RATES, render_batch, sample_person
from portraitlab.train_base import DEFAULT_WORK
from portraitlab.training import Progressor

app = typer.Typer(add_completion=False)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of python -m portraitlab.train_base.")] = DEFAULT_WORK,
    images: Annotated[int, typer.Option(help="Images seen.", min=8)] = 40_000,
    pool: Annotated[int, typer.Option(help="Portraits rendered.", min=64)] = 6_000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.0e-3,
    seed: int = 2,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train on with a frozen encoder and write `vae-tuned` beside `vae`."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    model = AutoencoderKL.from_pretrained(work / "vae")
    rng = np.random.default_rng([seed, 61])
    half = pool // 2
    persons = [sample_person(rng, BASE_RATES if i < half else BALANCED_RATES) for i in range(pool)]
    pictures, parts = render_batch(persons)
    latents = encode(model.eval(), pictures).half()
    trained = [*model.post_quant_conv.parameters(), *model.decoder.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = [p.detach().clone() for p in trained]
    checkpoint, step, batch = work / "decoder.pt", 0, 8
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        ema, step = state["ema"], state["step"]
    with Progressor("decoder") as progress:
        while step * batch < images:
            rng = np.random.default_rng([seed, 62, step])
            chosen = rng.integers(0, pool, batch)
            x, w = to_tensor(pictures[chosen]), detail_weights(parts[chosen])
            for group in optimiser.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step * batch / images))
                group["lr"] = lr * min(1, (step + 1) / 100) * max(0.01, cosine)
            with environment.bfloat16_where_fast("cpu"):
                y = model.decode(latents[torch.from_numpy(chosen)].float()).sample
            error = y.float() - x
            loss = (w * (error.abs() + error.square())).sum() / (3 * w.sum())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            step += 1
            keep = min(0.995, (step + 1) / (step + 20))
            torch._foreach_lerp_(ema, [p.detach() for p in trained], 1 - keep)
            progress(step * batch, images, float(loss.detach()))
            if step % 250 == 0:
                aside = checkpoint.with_suffix(".part")
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema, "step": step}
                torch.save(state, aside)
                aside.replace(checkpoint)
    with torch.no_grad():
        for parameter, value in zip(trained, ema, strict=True):
            parameter.copy_(value)
    rng = np.random.default_rng([0, 13])  # the held-out portraits of train_base
    held_out, _ = render_batch([sample_person(rng, BASE_RATES) for _ in range(384)][320:])
    quality = psnr(decode(model.eval(), encode(model, held_out)), to_tensor(held_out))
    model.save_pretrained(work / "vae-tuned")
    (work / "vae-tuned" / "score.json").write_text(json.dumps({"psnr": quality}), encoding="utf-8")
    print(f"autoencoder: {quality:.2f} dB on {len(held_out)} held-out portraits")


if __name__ == "__main__":
    app()
