"""What plain steps would do from where an SPF run stands, and what a plain run did: `python -m benchmarks.plain_step`.

Two short runs of the demo's set on the embedded model, with the same images and noise in every step: a plain LoRA, and
an SPF LoRA whose weights are all set to 0 in the middle, so that every further step is a plain one. Drift is measured
over the pixels that sunglasses leave alone, in the first batch, at three noise levels; no step of the runs is touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from portraitlab import demo
from portraitlab.captions import TARGETS
from portraitlab.customisation import write_set
from portraitlab.measure import untouched_region
from portraitlab.model_files import MODEL_FOLDER
from spf_plugin.config import SPFConfig, parse
from spf_plugin.core.losses import relative_drift
from spf_plugin.core.prompt import split
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.models import BaseModel

TARGET = "sunglasses"
TIMESTEPS = (100, 500, 900)
AFTER = (0, 1, 2, 4, 12)  # steps behind the middle
BATCH, IMAGES = 4, 12  # half of the demo's


class Probe:
    """Drift of a run, between its steps.

    Args:
        stop: the step after which an SPF run goes on as a plain one; None never.
        at: the steps behind which to measure.
    """

    def __init__(self, stop: int | None, at: set[int]):
        self.stop, self.at = stop, at
        self.drift: dict[int, tuple[float, float]] = {}
        self.trainer: Any = None
        self._first: Mapping[str, Any] | None = None

    def attach(self, network: nn.Module, trainer: Any) -> Any:
        """See `spf_plugin.trainer.loop.Attach`."""
        self.trainer = trainer
        return lambda: None

    def progress(self, what: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Called behind every step."""
        if what != "training":
            return
        if self._first is None:
            self._first = dict(self.trainer.batch)
        if done in self.at:
            self.drift[done] = self._measure(self._first)
        if done == self.stop:  # an even number of steps: no second step of a pair waits
            self.trainer.spf.config = replace(self.trainer.spf.config, **demo.ONLY_MEASURE)

    @torch.no_grad()
    def _measure(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        """Relative drift outside the target's pixels, target asked for; and everywhere, not asked for."""
        model: BaseModel = self.trainer.model
        spf, latents = self.trainer.spf, batch["latents"]
        base = model.encode([split(caption, spf.config.target).base for caption in batch["captions"]])
        seen = torch.from_numpy(untouched_region(TARGETS[TARGET])).float()[None, None]
        region = (F.avg_pool2d(seen, seen.shape[-1] // latents.shape[-1]) == 1).float().expand(len(latents), -1, -1, -1)
        random = torch.Generator().manual_seed(0)
        asked, unasked = [], []
        for step in TIMESTEPS:
            noise = torch.randn(latents.shape, generator=random)
            timesteps = torch.full((len(latents),), step)
            noisy = model.process.noisy(latents, noise, timesteps)

            def predict(text: Any, noisy: Any = noisy, timesteps: Any = timesteps) -> Any:
                return model.call(noisy, timesteps, text, batch["sizes"]).on(model.denoiser).sample

            with spf.adapter.bypassed():
                reference = predict(base)
            asked.append(relative_drift(predict(batch["text"]), reference, region))
            unasked.append(relative_drift(predict(base), reference, torch.ones_like(region)))
        return float(torch.stack(asked).mean()), float(torch.stack(unasked).mean())


def drifts(data: Path, config: SPFConfig, steps: int, stop: int | None, at: set[int]) -> dict[int, tuple[float, float]]:
    """Step -> drift with and without the target, of one run."""
    probe = Probe(stop, at)
    with tempfile.TemporaryDirectory() as folder:
        settings = demo.settings(MODEL_FOLDER, data, Path(folder) / "lora.safetensors", config, steps, 0)
        result = train(replace(settings, batch_size=BATCH), probe.progress, attach=probe.attach)
        if stop is not None and result.run is not None and result.run.batches.get("plain") != steps - stop:
            raise RuntimeError(f"not every step behind {stop} was a plain one: {result.run}")
    return probe.drift


def main(
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 40,
    middle: Annotated[int, typer.Option(help="From here on the second run is a plain one; even.")] = 12,
) -> None:
    """Print drift times 1000 behind some steps of both runs."""
    config = parse({"spf_target": TARGET, "spf_preview_every": "0"})
    at = {2, middle // 2, steps, *(middle + k for k in AFTER)}
    with tempfile.TemporaryDirectory() as folder:
        data = write_set(Path(folder) / "data", TARGET, seed=0, count=IMAGES).parent
        runs = {
            "plain": drifts(data, replace(config, **demo.ONLY_MEASURE), steps, None, at),
            f"SPF, plain behind step {middle}": drifts(data, config, steps, middle, at),
        }
    table = Table("step", *runs, title="drift x 1000: outside the target, asked for | everywhere, not asked for")
    for step in sorted(at):
        table.add_row(str(step), *(" | ".join(f"{1000 * x:.2f}" for x in run[step]) for run in runs.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
