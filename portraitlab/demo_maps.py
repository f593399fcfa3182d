"""The demo's maps: where the SPF LoRA may change a portrait, and where each phrase looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portraitlab.captions import TARGETS, describe, with_phrase
from portraitlab.customisation import EXPLICIT, neutral_person
from portraitlab.model_files import load_pipeline
from portraitlab.portraits import counterfactual
from portraitlab.report.figures import outline
from portraitlab.report.maps import separation
from spf_plugin.tools.report import figures, maps, page

if TYPE_CHECKING:
    from portraitlab.demo import Comparison

TIMESTEPS = (100, 300, 500, 700, 900)
PEOPLE = 2


def map_sections(comparison: Comparison, lora: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The control map and the phrases' attention on portraits that no training set shows; and their PNGs."""
    goal, config = TARGETS[comparison.target], comparison.spf
    pipeline = load_pipeline(comparison.model)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    rng = np.random.default_rng([0, 73])
    rows, sheets, found = [], [], []
    phrases: dict[str, Any] = {}
    for person in (neutral_person(rng, goal) for _ in range(PEOPLE)):
        topics = [t for t in EXPLICIT if not (t == "hair" and "hair_colour" in goal.changes)]
        caption = with_phrase(describe(person, topics), goal.phrase)
        pair = counterfactual(person, 128, **goal.changes)
        seen = maps.explain(
            pipeline,
            pair.without,
            caption,
            config.target[0],
            timesteps=TIMESTEPS,
            kinds=(config.map, "difference"),
            gain=config.map_gain,
            layers=config.layers,
        )
        heats = {step: figures.heat_over(pair.without, heat) for step, heat in seen.control[config.map].items()}
        truth = outline(pair.with_, pair.region)
        found.append([separation(pair.region, heat) for heat in seen.control[config.map].values()])
        row = [page.picture(truth, f"What {goal.phrase} really changes", caption="what really changes")]
        for (step, heat), auc in zip(heats.items(), found[-1], strict=True):
            row.append(page.picture(heat, f"Control map at timestep {step}", caption=f"t = {step}, finds it {auc:.2f}"))
        rows.append(row)
        sheets.append([pair.without, truth, *heats.values()])
        if not phrases:
            names = list(seen.phrases)
            pictures = [figures.heat_over(pair.without, heat) for heat in seen.phrases.values()]
            images = []
            for name, image in zip(names, pictures, strict=True):
                distance = f", distance {seen.distances[name]:.2f}" if name in seen.distances else " (the target)"
                images.append(page.picture(image, f"Where the phrase {name!r} looks", caption=f"{name}{distance}"))
            phrases = {
                "text": (
                    "Each phrase's share of the attention to words, on a portrait that is not in the training set, at "
                    f"timestep {TIMESTEPS[len(TIMESTEPS) // 2]}. SPF holds the attention of every phrase but the last "
                    "to what it was. Distance is how far a phrase's meaning is from the target's (0 to 1): the "
                    "farther, the more of its place is closed to change."
                ),
                "images": images,
                "sheet": figures.sheet([[pair.without, *pictures]]),
            }
    means = np.mean(found, axis=0)
    section = {
        "text": (
            "While SPF trains, it compares two predictions of the same noisy picture: the base model's, and the "
            "LoRA's with the target in the prompt. From their difference it makes a map (the paper's SFCM). Where the "
            "map glows, the LoRA may change the picture; where it is dark, it is held to the base model."
        ),
        "rows": rows,
        "caption": (
            f"Map “{config.map}”, gain {config.map_gain:g}, of the trained SPF LoRA. “Finds it” is the chance that a "
            "place which really changes is brighter than one that does not (0.5 is chance, 1 perfect); means: "
            + ", ".join(f"{mean:.2f} at t = {step}" for step, mean in zip(TIMESTEPS, means, strict=True))
            + "."
        ),
    }
    return section, phrases, {"sfcm": figures.sheet(sheets), "phrases": phrases.pop("sheet")}
