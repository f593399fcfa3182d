"""Write a model card from the facts that training, judge and evaluation left: `python -m portraitlab.model_card`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from portraitlab.captions import TARGETS
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.train_text import claims

app = typer.Typer(add_completion=False)

UNET = """# Drawn portraits: a small latent diffusion model

A text-to-image model for demonstrations and tests: 128 px drawn portraits from comma-separated captions, on a CPU in
seconds. It has exactly the block structure of Stable Diffusion 1.5 with small widths, so LoRA files have the same keys.
It was trained from scratch on the portraits that `portraitlab.portraits` draws: no foreign images or weights went in.

| part | what |
|---|---|
| UNet | SD1.5's blocks, widths (64, 64, 128, 128), 2 heads, cross-attention 64; 9.7 M parameters |
| text encoder | CLIP, 2 layers of width 64, 77 tokens, CLIP's own vocabulary (49408) |
| autoencoder | factor 8, 4 channels, widths (16, 32, 64, 64); latents x 0.18215 have unit variance |
| schedule | scaled linear .00085-.012, 1000 steps, noise prediction; the folder's scheduler is DDIM |
| judge | a small CNN that reads attributes off a portrait (`judge/judge.safetensors`) |

Weights are half precision safetensors. Licence: that of the project.

## Data
Base distribution: {pool} renders, captions drawn anew at every step with synonyms and dropped parts (10 % empty).
Weak targets ({weak}) are in 1-2 % of the images each and named. New targets ({new}) were never shown to the UNet or
named to the text encoder; the autoencoder, a codec without words, was trained on all parts.

## Training
| | |
|---|---|
| images seen | {images_seen} of {images} planned (batch {batch}, {step} steps) |
| optimiser | AdamW (.9, .99), learning rate {lr} with 300 warm-up steps, cosine; moving average .998 |
| loss | noise prediction, min-SNR weights (gamma 5) times max(1, snr^-0.5) |
| seed | {seed} |
| machine | {machine} |

    python -m portraitlab.train_base --out DIR --images {images}
    python -m portraitlab.tune_decoder --work DIR
    python -m portraitlab.export_base --work DIR
    python -m portraitlab.train_judge --work DIR
    python -m portraitlab.evaluate_base --scores portraitlab/model/scores.json
    python -m portraitlab.model_card
{notes}
## Scores
Autoencoder: {vae_psnr:.1f} dB on 64 held-out portraits.

{scores}
"""

DIT = """# Drawn portraits: a small diffusion transformer

The second embedded model: the same 128 px drawn portraits as [the first one](../model/README.md), from the same
captions in the same latents, drawn by a transformer with the layout of Stable Diffusion 3. Its text encoders have read
every word, those included whose pictures the transformer never saw, as real ones have. It was trained from scratch on
the portraits that `portraitlab.portraits` draws: no foreign images or weights went in.

| part | what |
|---|---|
| transformer | `SD3Transformer2DModel`: {layers} joint blocks of width {width}, {heads} heads, patches \
of {patch}x{patch} latents, queries and keys normalised (RMS); 3.5 M parameters |
| text encoders | two CLIPs from two seeds, 4 layers of width 96, 40 tokens, the part of CLIP's vocabulary that \
captions use; their last states but one side by side, then 40 zeros in T5's place, as SD3 without T5 |
| autoencoder | the first model's, weight for weight (`shift_factor` 0 is added to its configuration) |
| schedule | rectified flow, velocity prediction; the folder's scheduler is Euler with a shift of {shift:g} |
| judge | the first model's (`../model/judge/judge.safetensors`) |

Weights are half precision safetensors. Licence: that of the project.

## Data
Transformer: {pool} renders, captions drawn anew at every step with synonyms and dropped parts (10 % empty).
Weak targets ({weak}) are in 1-2 % of the images each and named.
New targets ({new}) were never shown or named to it.
Text encoders: {text_portraits} renders each, three of four counterparts that differ from the first in one
attribute or have two colours exchanged, with every part and every word; each weak or new part is in a fifth of
them or more.

## Training
| | transformer | text encoders |
|---|---|---|
| images seen | {images_seen} of {images} planned (batch {batch}, {step} steps) | {text_images} each \
(batch {text_batch}) |
| optimiser | AdamW (.9, .99), learning rate {lr} with 300 warm-up steps, cosine; moving average .998 | \
AdamW (.9, .98), learning rate {text_lr} with 60 warm-up steps, cosine |
| loss | velocity, times drawn evenly and shifted by {shift:g} | contrast of pictures and texts, and what \
each phrase says, read off its last word; the image half, a small convolutional network, is thrown away, and the text \
half frozen |
| seed | {seed} | {text_seeds} |
| machine | {machine} | |

    python -m portraitlab.train_dit --out DIR --images {images}
    python -m portraitlab.export_base --work DIR
    python -m portraitlab.evaluate_base --model portraitlab/model_dit --picture docs/images/dit-samples.png \\
        --scores portraitlab/model_dit/scores.json
    python -m portraitlab.model_card --model portraitlab/model_dit
{notes}
## What the text encoders know
How often, on 1000 held-out portraits with every part, a portrait that shows a phrase lies nearer to its text than one
that does not (area under the curve; 50 % is chance), by the worse of the two encoders. A portrait shows "red
jacket" where both words are true of it.

{words}

## Scores
{scores}
"""


def table(header: str, rows: list[str]) -> str:
    """A Markdown table from a header and finished rows."""
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def describe_scores(folder: Path) -> str:
    """The judge's accuracy and the base model's agreement with its captions, where they have been measured."""
    found = []
    if (folder / "judge" / "accuracy.json").exists():
        accuracy = json.loads((folder / "judge" / "accuracy.json").read_text(encoding="utf-8"))
        rows = [f"| {n} | {v:.1%} | {accuracy['round_trips'][n]:.1%} |" for n, v in accuracy["renders"].items()]
        found.append("The judge on portraits it has not seen (renders, and renders through the autoencoder):\n")
        found.append(table("| attribute | renders | round trips |", rows) + "\n")
    if (folder / "scores.json").exists():
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        how = "{prompts} prompts, {sampler} {steps} steps, guidance {guidance}, seed {seed}".format(**scores)
        found.append(f"Captioned attributes that the judge sees in samples ({how}):\n")
        found.append(table("| attribute | share |", [f"| {n} | {v:.1%} |" for n, v in scores["shares"].items()]) + "\n")
        if "targets" in scores:
            found.append("Targets in samples, the same prompts and seeds without and with the target's phrase:\n")
            rows = [
                f"| {n} | {TARGETS[n].kind} | {v['without']:.1%} | {v['with']:.1%} |"
                for n, v in scores["targets"].items()
            ]
            found.append(table("| target | kind | without | with |", rows) + "\n")
    return "\n".join(found) or "Not measured yet."


def describe_text(encoders: list[dict[str, Any]]) -> dict[str, Any]:
    """What the transformer's card says of its text encoders, from the `scores.json` of each."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for phrase, what in claims().items():
        worse = min(encoder["separation"][phrase] for encoder in encoders)
        groups.setdefault(" and ".join(what), []).append((worse, phrase))
    rows = []
    for name, found in groups.items():
        mean, (worst, phrase) = sum(value for value, _ in found) / len(found), min(found)
        rows.append(f"| {name} | {len(found)} | {mean:.1%} | {worst:.1%} ({phrase}) |")
    return {
        "text_portraits": encoders[0]["portraits"],
        "text_images": encoders[0]["images"],
        "text_batch": encoders[0]["batch"],
        "text_lr": encoders[0]["lr"],
        "text_seeds": ", ".join(str(e["seed"]) for e in encoders),
        "words": table("| attribute | phrases | mean | worst |", rows),
    }


def card(folder: Path) -> str:
    """The model card of a model folder, as Markdown."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    notes = "".join(f"\n{note}\n" for note in facts.get("notes", []))
    for seen, planned in facts.get("extended", []):
        notes += f"\nThe run was planned for {planned} images; at {seen} it was resumed with another `--images`.\n"
    by_kind = {k: ", ".join(t.phrase for t in TARGETS.values() if t.kind == k) for k in ("weak", "new")}
    text, encoders = (UNET, {}) if "text_encoders" not in facts else (DIT, describe_text(facts["text_encoders"]))
    return text.format(**{**facts, "notes": notes, **by_kind, **encoders}, scores=describe_scores(folder).rstrip())


@app.command()
def main(model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL_FOLDER) -> None:
    """Write README.md into the model folder."""
    if not (model / "training.json").exists():
        raise typer.BadParameter(f"{model} holds no training.json: export a model there first")
    aside = model / "README.part"
    aside.write_text(card(model), encoding="utf-8")
    os.replace(aside, model / "README.md")
    print(model / "README.md")


if __name__ == "__main__":
    app()
