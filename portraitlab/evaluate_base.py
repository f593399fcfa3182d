"""Does a base model follow captions? `python -m portraitlab.evaluate_base` samples and lets the judge look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from portraitlab import environment
from portraitlab.captions import TARGETS, describe, with_phrase
from portraitlab.customisation import neutral_person
from portraitlab.judge import load_judge, predict
from portraitlab.model_files import JUDGE_FILE, MODEL_FOLDER, load_pipeline, sample, sheet
from portraitlab.portraits import BASE_RATES, Person, sample_person
from portraitlab.training import Progressor

TOPICS = ("hair", "skin", "expression", "clothes", "background", "glasses")
READ = ("hair_colour", "clothes_colour", "background", "skin", "expression", "clothes", "glasses", "presentation")
app = typer.Typer(add_completion=False)


def prompts(count: int, seed: int) -> tuple[list[Person], list[str]]:
    """Held-out persons without targets, and captions that name every topic in canonical words."""
    rng = np.random.default_rng([seed, 81])
    persons: list[Person] = []
    while len(persons) < count:
        person = sample_person(rng, BASE_RATES)
        if not any(target.present(person) for target in TARGETS.values()):
            persons.append(person)
    return persons, [describe(person, TOPICS) for person in persons]


def agreement(persons: Sequence[Person], seen: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of images in which the judge reads what the caption says, per attribute."""
    out = {}
    for name in READ:
        hits = [
            (s[name] > 0.5) == getattr(p, name) if isinstance(getattr(p, name), bool) else s[name] == getattr(p, name)
            for p, s in zip(persons, seen, strict=True)
        ]
        out[name] = float(np.mean(hits))
    return out


def sampler(pipe: Any) -> str:
    """What the pipeline draws with: `DDIM`, `FlowMatchEulerDiscrete`."""
    return type(pipe.scheduler).__name__.removesuffix("Scheduler")


def target_shares(pipe: Any, judge: Any, count: int, seed: int, **options: Any) -> dict[str, dict[str, float]]:
    """Per target: how often the judge sees it with and without its phrase in the prompt, at the same seeds."""
    out = {}
    for name, target in TARGETS.items():
        rng = np.random.default_rng([seed, 82])
        people = [neutral_person(rng, target) for _ in range(count)]
        topics = [t for t in TOPICS if not (t == "hair" and "hair_colour" in target.changes)]
        texts = [describe(p, topics) for p in people]
        seeds = [seed * 1000 + 500 + i for i in range(count)]
        shares = {}
        for kind, lines in (("without", texts), ("with", [with_phrase(t, target.phrase) for t in texts])):
            seen = predict(judge, sample(pipe, lines, seeds, **options))
            blonde = [s["hair_colour"] == "blonde" for s in seen]
            shares[kind] = float(np.mean(blonde if name == "blonde" else [s[name] > 0.5 for s in seen]))
        out[name] = shares
    return out


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL_FOLDER,
    judge_file: Annotated[Path, typer.Option("--judge", help="Judge weights.")] = JUDGE_FILE,
    count: Annotated[int, typer.Option(help="Prompts.", min=1)] = 64,
    targets: Annotated[int, typer.Option(help="Prompts per target, with and without; 0 skips them.", min=0)] = 8,
    steps: int = 25,
    guidance: float = 3.5,
    seed: int = 7,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    picture: Annotated[Path, typer.Option(help="Sample sheet to write.")] = Path("docs/images/base-samples.png"),
    scores: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the share of captioned attributes that appear, and write a sheet of the first 32 samples."""
    torch.set_num_threads(threads)
    environment.keep_freed_memory()
    pipe, judge = load_pipeline(model), load_judge(judge_file)
    persons, texts = prompts(count, seed)
    with Progressor("sampling") as progress:
        images = sample(
            pipe, texts, [seed * 1000 + i for i in range(count)], steps=steps, guidance=guidance, report=progress
        )
    shares = agreement(persons, predict(judge, images))
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(images[:32], 8)).save(picture)
    how = {"prompts": count, "sampler": sampler(pipe), "steps": steps, "guidance": guidance, "seed": seed}
    result: dict[str, Any] = {**how, "shares": shares}
    print(f"captioned attribute appears (judge; {', '.join(f'{name} {value}' for name, value in how.items())})")
    for name, value in shares.items():
        print(f"  {name:<16}{value:>6.1%}")
    if targets:
        result["targets"] = target_shares(pipe, judge, targets, seed, steps=steps, guidance=guidance)
        print(f"target seen ({targets} prompts)    without   with its phrase")
        for name, value in result["targets"].items():
            print(f"  {name:<12}{TARGETS[name].kind:<10}{value['without']:>11.1%}{value['with']:>15.1%}")
    if scores:
        scores.parent.mkdir(parents=True, exist_ok=True)
        scores.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"sheet of the first {min(32, count)}: {picture}")


if __name__ == "__main__":
    app()
