"""Train one row of a table."""

from __future__ import annotations

from pathlib import Path

from portraitlab.demo import Show, timed_training
from portraitlab.lab import peers, variants
from portraitlab.lab.rows import LEARNING_RATE, PLAIN, Row
from portraitlab.lab.tasks import Task
from portraitlab.model_files import min_snr_gamma
from spf_plugin.trainer.settings import Settings

RANK = 8


def train_row(
    task: Task, row: Row, learning_rate: float, seed: int, model: Path, out: Path, device: str, label: str, show: Show
) -> float:
    """Train a LoRA into the file `out`; returns the seconds of an optimiser step.

    Raises:
        KeyboardInterrupt: it was stopped.
        SPFError: training failed.
    """
    run = Settings(
        model=str(model),
        data=task.write(out.parent.parent / "data", seed),
        out=out,
        spf=row.config(task) if row.peer == "" or row.with_spf else None,
        steps=row.steps or task.steps,
        rank=RANK,
        learning_rate=learning_rate,
        batch_size=task.batch,
        seed=seed,
        min_snr_gamma=min_snr_gamma(model),
        device=device,
    )
    attach, batches = None, 1  # of an optimiser step
    if row.variant:
        variant = variants.KINDS[row.variant]()
        attach, steps, run = variants.attach(variant, task, seed), run.steps, variant.settings(run)
        batches = run.steps // steps
    if row.peer:
        options = dict(row.options)
        if row.peer == "pure_cc":
            first = out.with_name(f"extractor-{task.target}-{task.data}-{seed}.safetensors")
            if not first.exists():
                train_row(task, Row(PLAIN), LEARNING_RATE, seed, model, first, device, f"{label}, stage one", show)
            options["extractor"] = first
        attach = peers.attach(peers.KINDS[row.peer](**options), task, seed)
    with row.in_effect():
        return batches * timed_training(run, f"{label}: training", show, attach)[1]
