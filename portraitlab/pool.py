"""The training pool: renders of the base distribution, encoded once, kept in chunks on disk.

Persons are never stored: a chunk's number and the seed draw them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from portraitlab.portraits import BASE_RATES, Person, render_batch, sample_person

CHUNK = 500


def chunk_persons(seed: int, chunk: int) -> list[Person]:
    """The persons of one chunk of the pool."""
    rng = np.random.default_rng([seed, 21, chunk])
    return [sample_person(rng, BASE_RATES) for _ in range(CHUNK)]


def _encode_chunk(folder: str, vae: str, seed: int, chunk: int, device: str) -> None:
    from portraitlab import environment

    from diffusers import AutoencoderKL  # isort: skip

    from portraitlab.autoencoder import SCALING_FACTOR, encode

    if device == "cpu":
        torch.set_num_threads(1)
        environment.keep_freed_memory()
    model = AutoencoderKL.from_pretrained(vae).eval().to(device)
    images, _ = render_batch(chunk_persons(seed, chunk))
    with environment.bfloat16_where_fast(device):
        latents = (encode(model, images) * SCALING_FACTOR).half().numpy()
    final = Path(folder) / f"latents-{chunk:04d}.npy"
    aside = final.with_name(final.name + ".part")
    with aside.open("wb") as file:
        np.save(file, latents)
    os.replace(aside, final)


def build_pool(
    folder: Path, vae: Path, *, chunks: int, seed: int, device: str, workers: int, report: Callable[[int, int], None]
) -> None:
    """Render and encode the chunks that `folder` lacks.

    Args:
        folder: where the chunks go.
        vae: folder of the normalised autoencoder.
        chunks: how many chunks of `CHUNK` portraits.
        seed: of the persons.
        device: where to encode.
        workers: processes on the CPU; 1 encodes in this one.
        report: called with (chunks done, chunks in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in range(chunks) if not (folder / f"latents-{c:04d}.npy").exists()]
    jobs = [(str(folder), str(vae), seed, chunk, device) for chunk in missing]
    if workers <= 1 or device != "cpu":
        for index, job in enumerate(jobs):
            _encode_chunk(*job)
            report(chunks - len(jobs) + index + 1, chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for index, future in enumerate([pool.submit(_encode_chunk, *job) for job in jobs]):
            future.result()
            report(chunks - len(jobs) + index + 1, chunks)


def prepare_pool(
    folder: Path, vae: Path, *, chunks: int, seed: int, device: str, workers: int
) -> tuple[Tensor, list[Person]]:
    """Build what `folder` lacks, with progress, and load it: `build_pool`, then `load_pool`."""
    from portraitlab.training import Progressor

    with Progressor("encoding portraits") as progress:
        build_pool(folder, vae, chunks=chunks, seed=seed, device=device, workers=workers, report=progress)
    latents, persons = load_pool(folder, chunks=chunks, seed=seed)
    mean, std = latents.float().mean(), latents.float().std()
    print(f"pool: {len(persons)} portraits, latents mean {mean:.3f} std {std:.3f}", flush=True)
    return latents, persons


def load_pool(folder: Path, *, chunks: int, seed: int) -> tuple[Tensor, list[Person]]:
    """Latents float16 `[N, 4, 16, 16]` (unit variance) and the persons they show."""
    latents = np.concatenate([np.load(folder / f"latents-{c:04d}.npy", allow_pickle=False) for c in range(chunks)])
    persons = [person for chunk in range(chunks) for person in chunk_persons(seed, chunk)]
    return torch.from_numpy(latents), persons
