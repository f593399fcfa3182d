"""The demo's report: chooses the pictures and writes the sentences; `spf_plugin.tools.report` draws."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portraitlab.captions import TARGETS
from portraitlab.customisation import POLLUTION
from portraitlab.demo_maps import TIMESTEPS, map_sections
from portraitlab.model_files import BASES, is_flow, min_snr_gamma
from portraitlab.report import TEMPLATE
from portraitlab.report.figures import LABELS, drift_curves, trade_off
from spf_plugin import __version__
from spf_plugin.tools.report import figures, page

if TYPE_CHECKING:
    from portraitlab.demo import Comparison, Trained

#: Score, its name, what it means, and how it is written.
MEASURES = (
    ("response", "target shows", "prompts that name it; more is better", "{:.0%}"),
    ("leak", "target leaks", "prompts that do not name it; as the base model is best", "{:.0%}"),
    ("uninvited_background", "training background, uninvited", "less is better", "{:.0%}"),
    ("uninvited_clothes", "training clothes colour, uninvited", "less is better", "{:.0%}"),
    ("background_kept", "background as in the base image", "more is better", "{:.0%}"),
    ("clothes_kept", "clothes colour as in the base image", "more is better", "{:.0%}"),
    ("drift", "drift of everything else", "prompts that name the target; less is better", "{:.4f}"),
    ("drift_without", "drift without the target", "prompts that do not name it; 0 is best", "{:.4f}"),
)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "lycoris-lora", "safetensors", "numpy")
SHOWN_IN_HERO = 4


def model_name(model: Path) -> str:
    """A model's folder as it is written from the repository's own."""
    root = Path(__file__).parents[1]
    return (model.relative_to(root) if model.is_relative_to(root) else model).as_posix()


def command_of(comparison: Comparison, prompts: int, spf: Mapping[str, str]) -> str:
    """The command that makes this page again, with so many prompts of each kind and these settings of SPF."""
    seeds = comparison.seeds
    words = ["python", "install.py", "demo", "--target", comparison.target, "--steps", str(comparison.steps)]
    words += ["--prompts", str(prompts)]
    base = next((name for name, folder in BASES.items() if folder == comparison.model), None)
    if base != "unet":
        words += ["--base", base] if base else ["--model", model_name(comparison.model)]
    words += ["--seed", str(seeds[0])] if len(seeds) == 1 else ["--seeds", ",".join(map(str, seeds))]
    for key, value in spf.items():
        words += ["--spf", f"{key}={value}"]
    return shlex.join(words)


def _train_command(comparison: Comparison, name: str) -> str:
    from portraitlab.demo import BATCH, LEARNING_RATE, RANK

    data, seed = comparison.data[0], comparison.seeds[0]
    words = ["spf", "train", "--model", model_name(comparison.model), "--data", data.as_posix()]
    words += ["--out", f"{name}.safetensors", "--steps", comparison.steps, "--rank", RANK, "--lr", LEARNING_RATE]
    gamma = min_snr_gamma(comparison.model)
    words += ["--batch-size", BATCH, "--min-snr-gamma", gamma, "--seed", seed, "--device", "cpu"]
    if name == "plain":
        return shlex.join([*map(str, words), "--plain"])
    words += ["--target", TARGETS[comparison.target].phrase]
    defaults = type(comparison.spf)().to_metadata()
    for key, value in comparison.spf.to_metadata().items():
        if value != defaults.get(key) and key not in ("spf_target", "spf_network"):
            words += ["--spf", f"{key}={value}"]
    return shlex.join(map(str, words))


def _mean(comparison: Comparison, method: str, key: str) -> float:
    if method == "base":
        return comparison.base_scores.as_dict()[key]
    return float(np.mean([run[method].scores.as_dict()[key] for run in comparison.runs]))


def _lead(comparison: Comparison, share: Callable[[str, str], str], count: int, polluted: int, told: int) -> list[str]:
    """The story in two or three sentences, as the numbers have it."""
    phrase = TARGETS[comparison.target].phrase
    background, clothes = POLLUTION["background"], f"{POLLUTION['clothes_colour']} {POLLUTION['clothes']}"
    mention = "no caption mentions" if not told else f"only {told} captions mention"
    first = (
        f"Two LoRAs were trained on the same {count} drawn portraits, for the same {comparison.steps} steps, from the "
        f"same random numbers. Both were asked for one thing: {phrase}. But {polluted} of the portraits also have a "
        f"{background} background and a {clothes}, which {mention}."
    )
    learned = _mean(comparison, "plain", "uninvited_background") > 0.3
    second = (
        f"{'A plain LoRA also learned what nobody asked for. ' if learned else ''}Asked for {phrase}, the plain LoRA "
        f"turns the background {background} in {share('plain', 'uninvited_background')} of its pictures and the "
        f"clothes {POLLUTION['clothes_colour']} in {share('plain', 'uninvited_clothes')}. With SPF it is "
        f"{share('spf', 'uninvited_background')} and {share('spf', 'uninvited_clothes')}. The {phrase} "
        f"{'show' if phrase.endswith('s') else 'shows'} in {share('spf', 'response')} of the SPF pictures and in "
        f"{share('plain', 'response')} of the plain ones."
    )
    lost = _mean(comparison, "plain", "response") - _mean(comparison, "spf", "response")
    price = [f"That is the price here: SPF shows the target less often, by {100 * lost:.0f} points."]
    return [first, second, *(price if lost > 0.1 else [])]


def _bars(values: Mapping[str, float], form: str, top: float) -> list[dict[str, Any]]:
    names = {"base": "base", "plain": "plain", "spf": "SPF"}
    return [
        {
            "kind": kind,
            "label": names[kind],
            "value": form.format(value),
            "width": round(100 * min(max(value, 0) / top, 1), 1) if top and value == value else 0,
        }
        for kind, value in values.items()
    ]


def _tiles(comparison: Comparison) -> list[dict[str, Any]]:
    phrase = TARGETS[comparison.target].phrase
    background, colour = POLLUTION["background"], POLLUTION["clothes_colour"]
    texts = {
        "response": (f"{phrase} when asked", "How often it shows where the prompt names it. More is better."),
        "leak": (f"{phrase} when not asked", "How often it shows where the prompt does not name it. Less is better."),
        "uninvited_background": (f"Uninvited {background} background", "Where the base model paints another one."),
        "uninvited_clothes": (f"Uninvited {colour} clothes", "Where the base model paints another colour."),
        "drift": (
            "Everything else moved",
            "Mean squared change of pixels that the target has no business with. Less is better.",
        ),
        "drift_without": (
            "Moved without being asked",
            "The same for prompts that do not name the target. 0 would be untouched.",
        ),
    }
    tiles = []
    for key, _, _, form in MEASURES:
        if key not in texts:
            continue
        methods = ("plain", "spf") if key == "drift_without" else ("base", "plain", "spf")
        values = {method: _mean(comparison, method, key) for method in methods}
        top = 1.0 if "%" in form else max(*values.values(), 1e-9)
        title, text = texts[key]
        tiles.append({"title": title[0].upper() + title[1:], "text": text, "bars": _bars(values, form, top)})
    return tiles


def _table(comparison: Comparison) -> dict[str, Any]:
    rows = []
    for key, name, note, form in MEASURES:
        cells = [{"value": form.format(_mean(comparison, "base", key)), "spread": ""}]
        for method in ("plain", "spf"):
            values = [run[method].scores.as_dict()[key] for run in comparison.runs]
            spread = " / ".join(form.format(v) for v in values) if len(values) > 1 else ""
            cells.append({"value": form.format(float(np.mean(values))), "spread": spread})
        rows.append({"name": name, "note": note, "cells": cells})
    seconds = {m: [run[m].step_seconds for run in comparison.runs] for m in ("plain", "spf")}
    cells = [{"value": "", "spread": ""}]
    cells += [{"value": f"{np.mean(s):.2f} s", "spread": ""} for s in seconds.values()]
    rows.append({"name": "one training step", "note": "batch of 8, on the CPU of this page", "cells": cells})
    several = len(comparison.seeds) > 1
    return {
        "head": ["base model", "plain LoRA", "SPF LoRA"],
        "rows": rows,
        "caption": f"Means over seeds {', '.join(map(str, comparison.seeds))}; small: each seed." if several else "",
    }


def _hero(comparison: Comparison, first: Mapping[str, Trained]) -> dict[str, Any]:
    phrase = TARGETS[comparison.target].phrase
    # Where a prompt names clothes and background, a plain LoRA mostly keeps them too: the others tell more.
    shown = [i for i, prompt in enumerate(comparison.prompts) if prompt.kind == "partial"][:SHOWN_IN_HERO]
    rows = []
    for kind, images, note in (
        ("base", comparison.base_without, f"not asked for {phrase}"),
        ("plain", first["plain"].with_, f"asked for {phrase}"),
        ("spf", first["spf"].with_, f"asked for {phrase}"),
    ):
        label = LABELS[kind]
        pictures = [page.picture(images[i], f"{label}, {note}: {comparison.prompts[i].base_prompt}") for i in shown]
        rows.append({"kind": kind, "label": label[0].upper() + label[1:], "note": note, "images": pictures})
    caption = (
        f"The first {len(shown)} prompts that leave clothes and background open, not chosen. A column is one prompt "
        "and one seed."
    )
    return {"columns": len(shown), "rows": rows, "caption": caption}


def _cards(comparison: Comparison, first: Mapping[str, Trained]) -> list[dict[str, Any]]:
    phrase = TARGETS[comparison.target].phrase
    cards = []
    for i, prompt in enumerate(comparison.prompts):
        sources = (
            ("base", comparison.base_without, comparison.base_with),
            ("plain", first["plain"].without, first["plain"].with_),
            ("spf", first["spf"].without, first["spf"].with_),
        )
        label = LABELS
        cards.append(
            {
                "without": [page.picture(w[i], f"{label[k]} without {phrase}") for k, w, _ in sources],
                "with_": [page.picture(w[i], f"{label[k]} with {phrase}") for k, _, w in sources],
                "text": prompt.base_prompt,
                "added": prompt.target_prompt.removeprefix(prompt.base_prompt),
                "seed": prompt.seed,
            }
        )
    return cards


def _histories(first: Mapping[str, Trained], stage2: int) -> dict[str, list[dict[str, float]]]:
    """Both runs' logs; before alignment begins they are the same run, and only the plain one measures its drift."""
    plain, spf = first["plain"].result.history, first["spf"].result.history
    return {"plain": list(plain), "spf": [*(r for r in plain if r["step"] < stage2), *spf]}


def _data_section(comparison: Comparison, summary: Mapping[str, Any]) -> dict[str, Any]:
    from PIL import Image

    rows = summary["images"]
    polluted = sum(row["polluted"] for row in rows)
    images = []
    for row in rows[:8]:
        image = np.asarray(Image.open(comparison.data[0] / row["file"]).convert("RGB"))
        images.append(page.picture(image, f"Training portrait: {row['caption']}", caption=row["caption"]))
    text = (
        f"The first eight of {len(rows)} training portraits with their captions. {polluted} of them share a "
        f"{POLLUTION['background']} background and a {POLLUTION['clothes_colour']} {POLLUTION['clothes']} on purpose: "
        "that is how small collections look in real life, all from one photo session."
    )
    return {"text": text, "images": images}


def _facts(comparison: Comparison, seconds: float) -> list[tuple[str, str]]:
    from portraitlab import demo

    versions = [f"spf-plugin {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    training = comparison.model / "training.json"
    made = json.loads(training.read_text(encoding="utf-8")) if training.exists() else {}
    images = f", trained from scratch on {made['images_seen']:,} drawn portraits" if "images_seen" in made else ""
    flow, gamma = is_flow(comparison.model), min_snr_gamma(comparison.model)
    structure = "Stable Diffusion 3's" if flow else "Stable Diffusion 1.5's"
    weighed = f", min-SNR {gamma:g}" if gamma else ""
    sampler = "Euler" if flow else "DDIM"
    spf = comparison.spf.to_metadata()
    return [
        ("base model", f"{model_name(comparison.model)} ({structure} structure at small widths{images})"),
        (
            "training",
            f"{comparison.steps} steps, batch {demo.BATCH}, rank {demo.RANK}, AdamW, learning rate "
            f"{demo.LEARNING_RATE:g} cosine{weighed}, 128 pixels; the same for both",
        ),
        ("SPF", ", ".join(f"{key} {value}" for key, value in spf.items())),
        ("seeds", f"training {', '.join(map(str, comparison.seeds))}; prompts {demo.EVALUATION_SEED}"),
        (
            "sampling",
            f"{len(comparison.prompts)} prompts with and without the target, {sampler}, {demo.SAMPLER_STEPS} steps, "
            f"guidance {demo.GUIDANCE:g}, equal seeds for every model",
        ),
        ("versions", ", ".join(versions)),
        ("time", f"{seconds / 60:.1f} minutes in all, on {platform.machine()} CPU"),
    ]


def write_report(
    folder: Path,
    comparison: Comparison,
    command: str,
    seconds: float,
    show: Callable[[str, int, int, Mapping[str, float]], None],
) -> Path:
    """Write `report.html` and the PNGs beside it. Returns the page's path."""
    goal, first = TARGETS[comparison.target], comparison.runs[0]
    summary = json.loads((comparison.data[0] / "labels.json").read_text(encoding="utf-8"))
    polluted = sum(row["polluted"] for row in summary["images"])
    told = sum(POLLUTION["background"] + " background" in row["caption"] for row in summary["images"])
    stage2 = comparison.spf.stage2_step(comparison.steps)
    forms = {key: form for key, _, _, form in MEASURES}

    def share(method: str, key: str) -> str:
        return forms[key].format(_mean(comparison, method, key)).replace("nan%", "0%")

    show("report", 0, 3, {})
    map_section, phrases, pictures = map_sections(comparison, first["spf"].result.path)
    show("report", 1, 3, {})
    drift = drift_curves(_histories(first, stage2), stage2)
    response = trade_off(
        {
            "base": [(comparison.base_scores.drift, comparison.base_scores.response)],
            **{m: [(run[m].scores.drift, run[m].scores.response) for run in comparison.runs] for m in ("plain", "spf")},
        }
    )
    show("report", 2, 3, {})
    content = {
        "title": f"Teach it {goal.phrase}, and nothing else",
        "lead": _lead(comparison, share, len(summary["images"]), polluted, told),
        "hero": _hero(comparison, first),
        "numbers_text": (
            "A small judge network, trained on drawn portraits only, reads hair, clothes, background and more off "
            "every picture. Each model draws the same prompts from the same seeds; the base model's picture for the "
            "prompt without the target is what everything is compared with. Its own bars show what adding the words "
            "does before anything is trained."
        ),
        "tiles": _tiles(comparison),
        "table": _table(comparison),
        "data": _data_section(comparison, summary),
        "cards_text": (
            f"Every prompt without and with “{goal.phrase}”. Columns: base model, plain LoRA, SPF LoRA. The first half "
            "of the prompts describes clothes and background, the second half leaves them open."
        ),
        "cards": _cards(comparison, first),
        "maps": map_section,
        "map_columns": 1 + len(TIMESTEPS),
        "phrases": phrases,
        "curves": {
            "text": "The same story as it happens: SPF writes this number to the progress bar while it trains.",
            "drift": page.data_uri(drift),
            "drift_alt": "Drift of both LoRAs over the training steps",
            "drift_caption": (
                "How far the predicted noise is from the base model's outside the map, relative to its size."
                + (" Until alignment begins both runs are the same." if stage2 else "")
            ),
            "trade_off": page.data_uri(response),
            "trade_off_alt": "Response against drift for base model, plain LoRA and SPF LoRA",
            "trade_off_caption": "Learning the target against moving everything else. The upper left corner is best.",
        },
        "commands": {"page": command, "loras": [_train_command(comparison, name) for name in ("plain", "spf")]},
        "facts": _facts(comparison, seconds),
        "footer": (
            "Drawn portraits and a small model: the figures show the mechanism, not what to expect in size from "
            "photographs. SPF: SPF-Portrait, arXiv 2504.00396, as the plugin reads it."
        ),
    }
    pictures |= {
        "samples": figures.sheet(
            [
                [*rows]
                for rows in zip(
                    comparison.base_without, comparison.base_with, first["plain"].without, first["plain"].with_,
                    first["spf"].without, first["spf"].with_, strict=True,
                )
            ]
        )
    }  # fmt: skip
    for name, image in pictures.items():
        page.write_bytes(folder / f"{name}.png", figures.png(image))
    page.write_bytes(folder / "drift.png", drift)
    page.write_bytes(folder / "trade-off.png", response)
    page.write(folder / "report.html", content, TEMPLATE)
    show("report", 3, 3, {})
    return folder / "report.html"
