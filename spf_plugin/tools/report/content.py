"""The report's sentences and the choice of its pictures: a `Result` in, the template's variables out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.tools.report import figures, page
from spf_plugin.tools.report.measures import drift_at
from spf_plugin.tools.report.models import short
from spf_plugin.tools.report.results import Request, Result, Row, Variant

IN_HERO = 4  # columns
MAPPED = 2  # prompts whose maps are shown
PHRASE_COLUMNS = (5, 8)  # at least, so that two maps are not as large as the page; and at most
MISSING = "–"


def command_of(settings: Request) -> str:
    """The command that makes this page again."""
    words = ["spf", "report", "--model", settings.model]
    for option, lora in zip(("--lora", "--lora2"), settings.loras, strict=False):
        words += [option, lora.as_posix()]
    for prompt in settings.prompts:
        words += ["--prompt", prompt]
    words += ["--target", settings.target] if settings.target else []
    words += ["--seeds", ",".join(map(str, settings.seeds)), "--steps", str(settings.steps)]
    words += ["--guidance", f"{settings.guidance:g}", "--out", settings.out.as_posix()]
    defaults = Request(settings.model, settings.loras, settings.out)
    given = (
        "held_out", "size", "weight", "batch", "device", "dtype", "clip", "dino", "subject", "lpips", "faces",
        "segmentation", "target_class",
    )  # fmt: skip
    for option in given:
        value = getattr(settings, option)
        if value != getattr(defaults, option):
            words += [
                "--batch-size" if option == "batch" else f"--{option.replace('_', '-')}",
                f"{value:g}" if option == "weight" else value,
            ]
    return shlex.join(map(str, words))


def _written(row: Row, value: float | None) -> str:
    return MISSING if value is None or not np.isfinite(value) else row.form.format(value)


def named(variant: Variant) -> str:
    """Name and short hash."""
    return f"{variant.name} {short(variant.digest)}".rstrip()


def target_words(result: Result) -> str:
    """All targets in words."""
    return ", ".join(dict.fromkeys(q.target.phrase.replace("_", " ") for q in result.questions))


def lead(result: Result) -> list[str]:
    """What was done, and what the two plainest numbers say."""
    base, loras = result.variants[0], result.variants[1:]
    target = target_words(result)
    first = (
        f"{' and '.join(v.name for v in loras)} on {base.name}: the same prompts with and without “{target}”, from the "
        "same noise. Whatever else moves, nobody asked for."
    )
    unasked = next(row for row in result.rows if row.key == "pixels_without")
    shares = [f"{v.name} by {_written(unasked, x)}" for v, x in zip(loras, unasked.values[1:], strict=True)]
    second = (
        f"Where the prompt does not name the target, pictures differ from the base model's: {', '.join(shares)} of the "
        f"pixel range, mean of {unasked.n}."
    )
    return [first, second]


def hero(result: Result) -> dict[str, Any]:
    """The base model unasked above every LoRA asked, a column per prompt and seed."""
    shots, seeds = result.shots, len(result.settings.seeds)
    # One seed of each prompt first, then the others.
    order = sorted(range(len(shots)), key=lambda i: (i % seeds, i // seeds))[:IN_HERO]
    rows = []
    for variant in result.variants:
        asked = variant.kind != "base"
        images = variant.with_ if asked else variant.without
        note = f"asked for {target_words(result)}" if asked else "not asked"
        cells = [
            page.picture(images[i], f"{variant.label}, {note}, seed {shots[i][1]}: {_text(shots[i][0], asked)}")
            for i in order
        ]
        label = variant.label[0].upper() + variant.label[1:]
        rows.append({"kind": variant.kind, "label": label, "note": note, "images": cells})
    names = ", ".join(f"{v.label}: {v.name}" for v in result.variants)
    chosen = "The first prompts of the list, not chosen. A column is one prompt and one seed."
    return {"columns": len(order), "rows": rows, "caption": f"{chosen} {names[0].upper()}{names[1:]}."}


def _text(question: Any, asked: bool) -> str:
    return (question.full if asked else question.base) or "(empty prompt)"


def tiles(result: Result) -> list[dict[str, Any]]:
    """Bars for the rows that have a title."""
    out = []
    for row in (row for row in result.rows if row.tile and not row.groups):
        known = [value for value in row.values if value is not None and np.isfinite(value)]
        if not known:  # such as a face, where no picture shows one
            continue
        top = max([*map(abs, known), 1e-9])
        bars = _bars(result, row, row.values, top)
        out.append({"title": row.tile, "text": f"{row.note[0].upper()}{row.note[1:]}. Mean of {row.n}.", "bars": bars})
    return out


def _bars(result: Result, row: Row, values: Sequence[float | None], top: float) -> list[dict[str, Any]]:
    return [
        {
            "kind": v.kind,
            "label": v.label,
            "value": _written(row, x),
            "width": round(100 * abs(x) / (top or 1), 1),
            "below": x < 0,
        }
        for v, x in zip(result.variants, values, strict=True)
        if x is not None and np.isfinite(x)
    ]


def table(result: Result) -> dict[str, Any]:
    """Every row with what measured it and over how many."""
    head = [{"name": v.label, "note": named(v)} for v in result.variants]
    rows = [
        {
            "name": row.name,
            "note": row.note,
            "by": f"n = {row.n}; {row.by}",
            "cells": [{"value": _written(row, value), "spread": ""} for value in row.values],
        }
        for row in result.rows
    ]
    return {"head": head, "rows": rows, "caption": "In the head: file names and the first digits of their sha256."}


def cards(result: Result) -> list[dict[str, Any]]:
    """Every prompt and seed, without and with the target, for every variant."""
    return [
        {
            "without": [
                page.picture(v.without[i], f"{v.label} without the target: {_text(q, False)}") for v in result.variants
            ],
            "with_": [
                page.picture(v.with_[i], f"{v.label} with the target: {_text(q, True)}") for v in result.variants
            ],
            "text": q.base,
            "added": q.added,
            "seed": seed,
        }
        for i, (q, seed) in enumerate(result.shots)
    ]


def _mapped(result: Result) -> list[tuple[int, Variant, NDArray[np.uint8]]]:
    """(index of the question, variant, the base model's image it is laid over)."""
    seeds, base = len(result.settings.seeds), result.variants[0]
    count = min(MAPPED, len(result.questions))
    return [(i, v, base.without[i * seeds]) for i in range(count) for v in result.variants[1:]]


def held_part(result: Result) -> dict[str, Any] | None:
    """The prompts that nobody trained: a bar per group beside that of the trained prompts, and every picture."""
    held, rows = result.held, {row.key: row for row in result.rows}
    if not held.texts:
        return None
    trained = f"the report's own prompts, target not asked for ({len(result.questions)})"
    charts = []
    for row in (row for row in result.rows if row.groups):
        parts = {f"{group} ({len(held.members[group])})": values for group, values in row.groups.items()}
        shown = {trained: rows[row.beside].values, **parts}
        top = max([abs(x) for values in shown.values() for x in values if x is not None and np.isfinite(x)] or [0.0])
        groups = [{"name": name, "bars": _bars(result, row, values, top)} for name, values in shown.items()]
        pale = " Pale bars are below 0." if any(x < 0 for xs in shown.values() for x in xs if x is not None) else ""
        charts.append({"title": row.tile, "text": f"{row.note[0].upper()}{row.note[1:]}.{pale}", "groups": groups})
    cards = [
        {
            "without": [page.picture(v.held[i], f"{v.label}: {text}") for v in result.variants],
            "text": text,
            "added": "",
            "seed": f"{result.settings.seeds[0]}, {group}",
        }
        for i, (text, group) in enumerate(zip(held.texts, held.groups, strict=True))
    ]
    noted = "; ".join(f"“{text}” {why}" for text, why in held.noted)
    said = {
        False: "Left out by rule, for a word of the target or as a caption",
        True: "Not quite unrelated, and counted",
    }
    return {
        "text": (
            f"{held.source}, one picture each. "
            + (
                "What has nothing to do with the target"
                if held.is_given
                else "Neither target nor captions say any of it: it"
            )
            + " should not move at all."
        ),
        "noted": f"{said[held.is_given]}: {noted}." if noted else "",
        "charts": charts,
        "cards": cards,
    }


def subject_part(result: Result) -> dict[str, Any] | None:
    """The kept-back photos beside what every variant draws for their captions."""
    photos, seeds = result.photos, result.settings.seeds
    if not photos.images:
        return None
    cards = [
        {
            "without": [
                page.picture(np.ascontiguousarray(photo), f"A kept-back photo: {caption}"),
                *(page.picture(v.subject[i * len(seeds)], f"{v.label}: {caption}") for v in result.variants),
            ],
            "text": caption,
            "added": "",
            "seed": seeds[0],
        }
        for i, (photo, caption) in enumerate(zip(photos.images, photos.captions, strict=True))
    ]
    heads = [("photo", "photo"), *_heads(result)]
    return {"text": f"{len(cards)} photos, and what is drawn for their captions.", "cards": cards, "heads": heads}


def _heads(result: Result) -> list[tuple[str, str]]:
    return [(v.kind, "base" if v.kind == "base" else v.label) for v in result.variants]


def map_parts(result: Result) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """The control maps over the base model's images, and all of them as one sheet."""
    parts, sheet = [], []
    for i, variant, image in _mapped(result):
        heats = next(iter(variant.maps[i].control.values()))
        pictures = {step: figures.heat_over(image, heat) for step, heat in heats.items()}
        about = f"of {variant.label} for {result.questions[i].full}"
        images = [page.picture(image, f"Base model: {_text(result.questions[i], False)}", caption="base model")]
        images += [
            page.picture(
                p, f"Control map {about}, timestep {step}", caption=f"t = {step}, mean {heats[step].mean():.2f}"
            )
            for step, p in pictures.items()
        ]
        parts.append({"title": f"{variant.label}: {result.questions[i].full}", "images": images})
        sheet.append([image, *pictures.values()])
    text = (
        "Two predictions of the same noisy picture are compared: the base model's for the prompt without the target, "
        "and the LoRA's with it. The map (SFCM) glows where the LoRA answers the target, and is dark where SPF holds a "
        "LoRA to the base model. A plain LoRA is measured in the same way; nothing held it."
    )
    kind = next(iter(result.variants[1].maps[0].control))
    caption = f"Map “{kind}”, mean of {result.draws} noise samples, over the base model's image for the base prompt."
    return {"text": text, "parts": parts, "columns": 1 + len(result.timesteps), "caption": caption}, figures.sheet(
        sheet
    )


def phrase_parts(result: Result) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Each phrase's attention over the base model's images, and all of them as one sheet."""
    parts, sheet = [], []
    for i, variant, image in _mapped(result):
        maps = variant.maps[i]
        pictures = {name: figures.heat_over(image, heat) for name, heat in maps.phrases.items()}
        images = []
        for name, picture in pictures.items():
            more = f", distance {maps.distances[name]:.2f}" if name in maps.distances else " (the target)"
            alt = f"Where {variant.label} looks for the phrase {name!r}"
            images.append(page.picture(picture, alt, caption=name + more))
        parts.append({"title": f"{variant.label}: {result.questions[i].full}", "images": images})
        sheet.append([image, *pictures.values()])
    middle = result.timesteps[len(result.timesteps) // 2]
    text = (
        f"Each phrase's share of the cross-attention, at timestep {middle}. Distance is how far a phrase's meaning is "
        "from the target's (0 to 1), by the model's own text encoder."
    )
    fewest, most = PHRASE_COLUMNS
    columns = min(most, max(fewest, *(len(part["images"]) for part in parts)))
    return {"text": text, "parts": parts, "columns": columns}, figures.sheet(sheet)


def drift_part(result: Result) -> tuple[dict[str, Any], bytes]:
    """The drift over the timesteps, and its plot."""
    lines: dict[str, tuple[str, bool, Mapping[int, float]]] = {}
    for variant in result.variants[1:]:
        for dashed, key, what in (
            (False, "base_prompt", "target not asked for"),
            (True, "outside", "asked, outside the map"),
        ):
            points = {step: drift_at(variant, key, step) for step in result.timesteps}
            lines[f"{variant.label}, {what}"] = (variant.kind, dashed, points)
    plot = figures.drift_lines(lines)
    n = len(result.questions) * result.draws
    caption = (
        f"Squared change of the predicted noise, relative to the prediction; each point is the mean of {n} predictions."
    )
    text = "A change at high noise moves composition and pose; at low noise, texture and colour."
    alt = "Relative drift of the predicted noise against the timestep, for every LoRA"
    return {"text": text, "src": page.data_uri(plot), "alt": alt, "caption": caption}, plot


def facts(result: Result) -> list[tuple[str, str]]:
    """Request, versions, seeds and hashes."""
    hashes = [(f"sha256 of {name}", digest) for name, digest in result.hashes.items()]
    notes = [("note", note) for note in result.notes]
    return [*notes, ("prompts", result.source), *result.facts, *hashes]


def build(result: Result) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The template's variables, and the PNGs that lie beside the page: name -> bytes."""
    maps, map_sheet = map_parts(result)
    phrases, phrase_sheet = phrase_parts(result)
    drift, plot = drift_part(result)
    samples = [
        [image for v in result.variants for image in (v.without[i], v.with_[i])] for i in range(len(result.shots))
    ]
    loras = " and ".join(v.label for v in result.variants[1:])
    content = {
        "title": f"What else changed with {target_words(result)}?",
        "lead": lead(result),
        "hero": hero(result),
        "numbers_text": (
            "Everything is compared with the base model's picture or prediction for the prompt without the target. The "
            "base model's own bars show what adding the words does without any LoRA."
        ),
        "tiles": tiles(result),
        "table": table(result),
        "missing": list(result.missing.items()),
        "held": held_part(result),
        "subject": subject_part(result),
        "cards_text": f"Every prompt and seed, without and with the target. Columns: base model, {loras}.",
        "cards": cards(result),
        "heads": _heads(result),
        "maps": maps,
        "phrases": phrases,
        "drift": drift,
        "command": command_of(result.settings),
        "facts": facts(result),
        "footer": (
            f"{len(result.shots)} samples per model and kind of prompt: enough to look at, too few to rank models by "
            "small differences. SPF: SPF-Portrait, arXiv 2504.00396, as the plugin reads it."
        ),
    }
    sheets: Sequence[tuple[str, NDArray[np.uint8]]] = (
        ("samples", figures.sheet(samples)), ("maps", map_sheet), ("phrases", phrase_sheet),
    )  # fmt: skip
    pictures = {f"{name}.png": figures.png(image) for name, image in sheets} | {"drift.png": plot}
    for v, prefix in zip(result.variants, ("base", "lora", "lora2"), strict=False):
        for i, (_question, seed) in enumerate(result.shots):
            number = f"images/prompt{i // len(result.settings.seeds) + 1:02d}-seed{seed}-{prefix}"
            pictures[f"{number}-without.png"] = figures.png(v.without[i])
            pictures[f"{number}-with.png"] = figures.png(v.with_[i])
        for i, image in enumerate(v.subject):
            photo, seed = divmod(i, len(result.settings.seeds))
            number = f"photo{photo + 1:02d}-seed{result.settings.seeds[seed]}"
            pictures[f"images/{number}-{prefix}.png"] = figures.png(image)
        for i, image in enumerate(v.held):
            pictures[f"images/held-out{i + 1:02d}-seed{result.settings.seeds[0]}-{prefix}.png"] = figures.png(image)
    return content, pictures
