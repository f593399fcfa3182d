"""A run of the reference trainer, from its settings to its file."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spf_plugin import lora, terminal
from spf_plugin.errors import SPFError
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.lorafile import writer
from spf_plugin.lorafile.record import KEY, Run
from spf_plugin.trainer import output
from spf_plugin.trainer.cache import Progress
from spf_plugin.trainer.models import BaseModel
from spf_plugin.trainer.settings import DEFAULT_NETWORK, DTYPES, PLAIN_LORA, Result, Settings
from spf_plugin.trainer.start import ready
from spf_plugin.trainer.steps import Trainer

logger = terminal.logger(__name__)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in the block only asks the loop to stop after its step; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def numbered(out: Path, step: int) -> Path:
    """kohya's name of a LoRA saved along the way: `NAME-step00000100.safetensors`."""
    return writer.renamed(out, f"-step{step:08d}{out.suffix}")


def _silent(*_: Any) -> None:
    pass


Attach = Callable[[nn.Module, Trainer], Callable[[], None]]
"""Attaches to a network that is created and not applied yet, and to its trainer; returns what detaches it."""


def train(
    settings: Settings,
    progress: Progress = _silent,
    warn: Callable[[str], None] = logger.warning,
    attach: Attach | None = None,
    faults: Sequence[str] = (),
    wrong: Collection[str] = (),
) -> Result:
    """Train a LoRA and save it.

    After Ctrl-C the weights so far are saved: to `settings.out`, or beside it if that file is an older one.

    Args:
        settings: the run.
        progress: called while images are encoded and after every step.
        warn: receives what the user should know and nothing stops for.
        attach: another objective, at the same seam; with `settings.spf` too, around SPF's.
        faults: what is known to be wrong already. Then nothing is trained, and everything else that is wrong is looked
            for.
        wrong: SPF's settings whose value is not known (`config.Read`).

    Raises:
        SPFError: with every mistake found, before training where it can be; existing files are left alone.
    """
    run = ready(settings, progress, warn, faults, wrong)
    model, network, trainer, accelerator = run.model, run.network, run.trainer, run.accelerator
    attached = contextlib.ExitStack()
    try:
        if settings.spf is not None:
            attached.callback(lora.attach(network, ReferenceHost(trainer), settings.spf).spf.close)  # type: ignore
        if attach is not None:
            attached.callback(attach(network, trainer))
        network.apply_to([], model.denoiser, apply_text_encoder=False, apply_unet=True)  # type: ignore[operator]
        model.denoiser.to(accelerator.device)  # not before: `spf_base` has made it smaller
        network.to(accelerator.device).requires_grad_(True).train()
        dtype = DTYPES[settings.save_precision]
        output.check_space(settings.out, network, dtype)
        model.denoiser.train()
        if settings.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()

        def ran() -> Run | None:
            return None if settings.spf is None else trainer.spf.numbers.run()  # type: ignore[attr-defined]

        def write(path: Path, steps: int, card: bool = False) -> list[str]:
            metadata = _metadata(settings, path, model, run.resolution, steps, sum(run.cache.repeats), ran())
            return output.save(path, network, metadata, dtype, paths=run.paths, card=card)

        def every(step: int) -> None:
            if settings.save_every and step % settings.save_every == 0 and step < settings.steps:
                write(numbered(settings.out, step), step)

        with interruptible() as stopped:
            steps, history = trainer.run(network, run.cache, progress, every, stopped)
            if steps == 0:
                raise KeyboardInterrupt
            path = settings.out
            if steps < settings.steps and path.exists():
                path = numbered(path, steps)
            notes = write(path, steps, card=True)
        attached.close()  # the last one first; SPF's own end would take its patches away from below the other's
        accelerator.end_training()
    except torch.cuda.OutOfMemoryError as error:
        raise SPFError(
            "the GPU is out of memory. Use --gradient-checkpointing, --mixed-precision bf16, a smaller --batch-size or "
            "a smaller --resolution."
        ) from error
    finally:
        attached.close()
    return Result(path, steps, history, notes, ran())


def _metadata(
    settings: Settings, path: Path, model: BaseModel, resolution: int, steps: int, images: int, run: Run | None
) -> dict[str, str]:
    arguments: dict[str, str] = settings.full_network_args
    ours = {**(settings.spf.to_metadata() if settings.spf else {}), **({} if run is None else {KEY: run.as_json()})}
    plain = settings.network == DEFAULT_NETWORK and arguments == PLAIN_LORA
    return output.kohya_metadata(
        out=path,
        model_name=settings.model,
        family=model.family,
        prediction=model.process.prediction,
        # What the file is, for whoever reads it: a plain LoRA is the same from either module.
        network="networks.lora" if plain else settings.network,
        network_args={**({} if plain else arguments), **ours},
        rank=settings.rank,
        alpha=settings.rank if settings.alpha is None else settings.alpha,
        learning_rate=settings.learning_rate,
        steps=steps,
        planned_steps=settings.steps,
        batch_size=settings.batch_size,
        resolution=resolution,
        seed=settings.seed,
        images=images,
        mixed_precision=settings.mixed_precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        min_snr_gamma=settings.min_snr_gamma,
    )
