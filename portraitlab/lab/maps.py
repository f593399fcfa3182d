"""How well each control map finds the target in training pictures, where drawn portraits tell what it should find."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portraitlab.lab.tables import Cells
from portraitlab.lab.tasks import Task
from portraitlab.model_files import load_pipeline
from portraitlab.report.maps import separation
from spf_plugin.config import SPFConfig
from spf_plugin.families.known import find
from spf_plugin.tools.report import maps
from spf_plugin.trainer.models import from_pipeline

TIMESTEPS = (100, 300, 500, 700, 900)


def quality(
    task: Task,
    lora: Path,
    model: Path,
    config: SPFConfig,
    kinds: Sequence[str],
    pictures: int,
    report: Callable[[int, int], None],
    seed: int = 0,
    by_layer: bool = False,
) -> Cells:
    """A line for every map and timestep: separation, the map's mean inside and outside the target's true region, and
    the mean there of what the phrases take from the noise difference in the `soft` map. Or, by layer, a line for every
    map and attention layer, with the separation at every timestep.

    Separation is the chance that a place inside is brighter than one outside (0.5: the map knows nothing). A style
    has no outside.

    Args:
        task: the task; its training pictures are looked at.
        lora: the LoRA whose response makes the maps.
        model: folder of the base model.
        config: the target, the map's gain and the compared layers.
        kinds: maps, see `spf_plugin.core.sfcm.control_map`.
        pictures: how many training pictures.
        report: called with (pictures done, pictures).
        seed: chooses the training pictures.
        by_layer: compare each attention layer of the model alone.
    """
    pipeline = load_pipeline(model)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    masks = task.masks(seed)[:, 0].numpy() > 0
    layers = {config.layers: config.layers}
    if by_layer:
        every = find(from_pipeline(pipeline).denoiser).layers("all")
        layers = {layer.name: f"^{re.escape(layer.name)}$" for layer in every}
    found: dict[tuple[str, str, int], list[tuple[float, ...]]] = {}
    jobs = [(i, example, which) for i, example in enumerate(task.examples(seed)[:pictures]) for which in layers]
    for done, (index, example, which) in enumerate(jobs, start=1):
        target = next(t for t, part in zip(config.target, task.goal.each, strict=True) if part.present(example.person))
        seen = maps.explain(
            pipeline,
            task.picture(example.person),
            example.caption,
            target,
            timesteps=TIMESTEPS,
            kinds=kinds,
            gain=config.map_gain,
            layers=layers[which],
            seed=index,
        )
        mask = masks[index]
        for kind in kinds:
            for timestep, heat in seen.control[kind].items():
                taken = seen.subtracted[timestep]
                brightness = (_mean(part[where]) for part in (heat, taken) for where in (mask, ~mask))
                numbers = (separation(mask, heat), *brightness)
                found.setdefault((kind, which, timestep), []).append(numbers)
        report(done, len(jobs))
    means = {key: np.mean(numbers, axis=0) for key, numbers in found.items()}
    if by_layer:
        head = ["map", "layer", *(f"separation at {t}" for t in TIMESTEPS)]
        return head, [
            [kind, name, *(f"{means[kind, name, t][0]:.2f}" for t in TIMESTEPS)] for kind in kinds for name in layers
        ]
    head = ["map", "timestep", "separation", "inside", "outside", "subtracted inside", "outside"]
    return head, [
        [kind, str(t), *("" if np.isnan(v) else f"{v:.2f}" for v in mean)] for (kind, _, t), mean in means.items()
    ]


def _mean(values: NDArray[np.floating[Any]]) -> float:
    return float(values.mean()) if values.size else float("nan")
