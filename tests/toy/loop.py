"""A training loop for the toy transformer, which knows nothing of SPF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.toy.family import pack
from tests.toy.model import WIDTH, Denoiser

TOKENS = 12


class Encoder:
    """Words to a sequence `[B, 12, WIDTH]` and a vector `[B, 6]`, by a fixed table."""

    def __init__(self) -> None:
        self.table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))

    def tokenize(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 97 for word in text.replace(",", " , ").split()]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = [(self.tokenize(prompt) + [99] * TOKENS)[:TOKENS] for prompt in prompts]
        words = self.table[torch.tensor(ids)]
        return words, words.mean(dim=1)[:, :6]


class Accelerator:
    sync_gradients, num_processes, is_main_process, device = True, 1, False, torch.device("cpu")
    trackers: tuple[Any, ...] = ()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def end_training(self) -> None:
        pass


class Loop:
    """The loop: cached text, a text encoder that is gone when training starts, and a preview in every step."""

    def __init__(self, captions: Sequence[str], steps: int):
        self.model, self.encoder, self.accelerator = Denoiser().requires_grad_(False), Encoder(), Accelerator()
        self.images, self.steps, self.losses = list(captions), steps, list[float]()
        self.texts = self.encoder(self.images)

    def train_step(self, captions: Sequence[str], random: torch.Generator) -> Tensor:
        which = [self.images.index(caption) for caption in captions]
        clean, noise = torch.randn(2, len(which), 4, 8, 12, generator=random)
        sigma = torch.rand(len(which), generator=random)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        words, style = (part[which] for part in self.texts)
        velocity = self.model(patches=pack(noisy), sigma=sigma, words=words, style=style, grid=(4, 6))
        return (velocity - pack(noise - clean)).square().mean()

    def run(self, parameters: list[nn.Parameter]) -> None:
        self.encoder = None  # type: ignore[assignment]
        random, optimizer = torch.Generator().manual_seed(1), torch.optim.SGD(parameters, lr=0.05)
        for step in range(self.steps):
            loss = self.train_step([self.images[step % len(self.images)], self.images[0]], random)
            self.accelerator.backward(loss)
            self.losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                self.train_step(self.images[:1], torch.Generator().manual_seed(2))
        self.accelerator.end_training()
