"""How well each control map finds the target in training pictures, where drawn portraits tell what it should find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from portraitlab.lab.tables import Cells
from portraitlab.lab.tasks import Task
from portraitlab.model_files import load_pipeline
from portraitlab.portraits import render
from portraitlab.report.maps import separation
from spf_plugin.config import SPFConfig
from spf_plugin.tools.report import maps

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
) -> Cells:
    """A line for every map and timestep: separation, and the map's mean inside and outside the target's true region.

    Separation is the chance that a place inside is brighter than one outside (0.5: the map knows nothing).

    Args:
        task: the task; its training pictures are looked at.
        lora: the LoRA whose response makes the maps.
        model: folder of the base model.
        config: the target, the map's gain and the compared layers.
        kinds: maps, see `spf_plugin.core.sfcm.control_map`.
        pictures: how many training pictures.
        report: called with (pictures done, pictures).
        seed: chooses the training pictures.
    """
    pipeline = load_pipeline(model)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    masks = task.masks(seed)[:, 0].numpy() > 0
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for index, example in enumerate(task.examples(seed)[:pictures]):
        picture = render(example.person, 128)[0]
        seen = maps.explain(
            pipeline,
            picture,
            example.caption,
            config.target[0],
            timesteps=TIMESTEPS,
            kinds=kinds,
            gain=config.map_gain,
            layers=config.layers,
            seed=index,
        )
        mask = masks[index]
        for kind in kinds:
            for timestep, heat in seen.control[kind].items():
                numbers = (separation(mask, heat), float(heat[mask].mean()), float(heat[~mask].mean()))
                found.setdefault((kind, timestep), []).append(numbers)
        report(index + 1, pictures)
    head = ["map", "timestep", "separation", "inside", "outside"]
    lines = [[kind, str(t), *(f"{v:.2f}" for v in np.mean(n, axis=0))] for (kind, t), n in found.items()]
    return head, lines
