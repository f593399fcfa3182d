"""What every base model's training from scratch shares: the batches, the schedule, checkpoints that resume exactly.

What is trained, and on which loss, is a `Recipe`: `train_base.py` has the UNet's, `train_dit.py` the transformer's.
Every random draw of a step comes from the seed and the step's number, so a resumed run is the same run.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from portraitlab import environment
from portraitlab.captions import caption
from portraitlab.portraits import Person

EMPTY_CAPTIONS = 0.1  # share of them, for classifier-free guidance
CHECKPOINT = "base.pt"


@contextmanager
def half_precision(device: str) -> Iterator[None]:
    """bfloat16 where it is fast, with attention as two matrix products on a CPU: PyTorch's own bfloat16 kernel for CPUs
    takes twice their time in the backward pass, and its float32 one, which masked attention still gets, half as much
    again.
    """
    attention = F.scaled_dot_product_attention

    def on_cpu(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        masked = any(isinstance(given, Tensor) or given for given in (*args, *options.values()))  # or dropout
        if torch.is_autocast_enabled("cpu") and not masked:
            scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
            return scores.softmax(-1, dtype=torch.bfloat16) @ value
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), *args, **options)

    if torch.device(device).type == "cpu":
        F.scaled_dot_product_attention = on_cpu
    try:
        with environment.bfloat16_where_fast(device):
            yield
    finally:
        F.scaled_dot_product_attention = attention


class Progressor:
    """A bar on a terminal, one line a while elsewhere; both say how long it will still take."""

    def __init__(self, title: str, every: float = 30.0) -> None:
        self.console = Console()
        self.title, self.every, self.last = title, every, 0.0
        self.start: tuple[float, int] | None = None  # when, and how much was done then: a resumed run begins late
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
        now = time.monotonic()
        self.start = self.start or (now, done)
        if not self.console.is_terminal and (now - self.last > self.every or done >= total):
            self.last = now
            print(f"{time.strftime('%H:%M:%S')} {text} {done}/{total}{self.remaining(now, done, total)}", flush=True)

    def remaining(self, now: float, done: int, total: int) -> str:
        """The speed so far and the time left at that speed, once there is one."""
        assert self.start is not None
        speed = (done - self.start[1]) / max(now - self.start[0], 1e-9)
        return f", {speed:.1f}/s, {(total - done) / speed / 60:.0f} min left" if 0 < done < total and speed > 0 else ""


class Recipe(Protocol):
    """The networks of a base model, and how wrong they are."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What is trained, by name; their parameters are optimised in this order."""

    def settings(self) -> dict[str, Any]:
        """What of it must agree for a resumed run to be the same run; JSON types."""

    def loss(self, clean: Tensor, captions: Sequence[str], source: torch.Generator) -> Tensor:
        """The mean loss, a scalar, of clean latents `[B, 4, 16, 16]`; all of its randomness is drawn from `source`."""


class Trainer:
    """A recipe's networks, their moving average and the optimiser, with exact checkpoints."""

    def __init__(self, recipe: Recipe, *, images: int, batch: int, lr: float, seed: int, device: str) -> None:
        self.recipe = recipe
        self.images, self.batch, self.lr, self.seed, self.device = images, batch, lr, seed, device
        named = [pair for network in recipe.networks.values() for pair in network.named_parameters()]
        self.parameters = [p for _, p in named]
        self.ema = [p.detach().clone() for p in self.parameters]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named if "embeddings." not in name], "weight_decay": 0.01},
            {"params": [p for name, p in named if "embeddings." in name], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.99), fused=True)
        self.step = 0
        self.extended: list[list[int]] = []  # [images seen, planned until then] of every bent schedule

    @property
    def done(self) -> int:
        """Images seen."""
        return self.step * self.batch

    def train_step(self, latents: Tensor, persons: Sequence[Person]) -> float:
        """One optimiser step on a batch drawn from the pool; returns the loss."""
        rng = np.random.default_rng([self.seed, 31, self.step])
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        chosen = rng.integers(0, len(persons), self.batch)
        texts = ["" if rng.random() < EMPTY_CAPTIONS else caption(persons[i], rng) for i in chosen]
        clean = latents[torch.from_numpy(chosen)].float().to(self.device)
        fraction = self.done / self.images
        lr = self.lr * min(1.0, (self.step + 1) / 300) * max(0.01, 0.5 * (1 + math.cos(math.pi * fraction)))
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        loss = self.recipe.loss(clean, texts, source)
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
            **{name: network.state_dict() for name, network in self.recipe.networks.items()},
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
        for name, network in self.recipe.networks.items():
            network.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.ema = [value.to(self.device) for value in state["ema"]]
        self.step = state["step"]

    def settings(self) -> dict[str, Any]:
        """What must agree for a resumed run to be the same run."""
        own = {"images": self.images, "batch": self.batch, "lr": self.lr, "seed": self.seed}
        return {**own, **self.recipe.settings()}

    def run(self, title: str, latents: Tensor, persons: Sequence[Person], checkpoint: Path, minutes: float) -> bool:
        """Train to the end, from `checkpoint` on if it is there; False where a signal stopped it before.

        Args:
            title: what the progress calls it.
            latents: the pool, float16 `[N, 4, 16, 16]` of unit variance.
            persons: whom they show.
            checkpoint: file for the state; it is also written at the end, and after Ctrl-C or a termination signal.
            minutes: between checkpoints.
        """
        if checkpoint.exists():
            self.load(checkpoint)
            print(f"going on from image {self.done}")
        saved, smooth = time.monotonic(), None
        with stoppable() as stopped, Progressor(title) as progress:
            while self.done < self.images and not stopped():
                loss = self.train_step(latents, persons)
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                progress(self.done, self.images, smooth)
                if time.monotonic() - saved > 60 * minutes:
                    self.save(checkpoint)
                    saved = time.monotonic()
        self.save(checkpoint)
        if self.done < self.images:
            print(f"stopped at image {self.done} of {self.images}: the same command goes on from {checkpoint}")
        return self.done >= self.images


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and a termination signal only ask: the step in progress is finished, so that the state saved is whole."""
    asked: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, lambda number, _frame: asked.append(number)) for name in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in zip(signals, before, strict=True):
            signal.signal(name, handler)


def averaged(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Give a recipe's networks the averaged weights of a checkpoint; returns its facts (step, settings)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    parameters = [p for network in recipe.networks.values() for p in network.parameters()]
    with torch.no_grad():
        for parameter, value in zip(parameters, state["ema"], strict=True):
            parameter.copy_(value)
    for network in recipe.networks.values():
        network.eval()
    return {"step": state["step"], **state["settings"], "extended": state.get("extended", [])}


def prepare_process(device: str, threads: int) -> str:
    """Set up this process for training; returns the device that `auto` stands for."""
    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
