"""Write the model card from the facts that training, judge and evaluation left: `python -m portraitlab.model_card`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from portraitlab.captions import TARGETS
from portraitlab.model_files import MODEL_FOLDER

app = typer.Typer(add_completion=False)

TEXT = """# Drawn portraits: a small latent diffusion model

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
Autoencoder: {psnr:.1f} dB on 64 held-out portraits.

{scores}
"""


def table(header: str, rows: list[str]) -> str:
    """A Markdown table from a header and finished rows."""
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def describe_scores(folder: Path) -> str:
    """The judge's accuracy and the base model's agreement with its captions, where they have been measured."""
    found = []
    if (folder / "judge" / "accuracy.json").exists():
        accuracy = json.loads((folder / "judge" / "accuracy.json").read_text())
        rows = [f"| {n} | {v:.1%} | {accuracy['round_trips'][n]:.1%} |" for n, v in accuracy["renders"].items()]
        found.append("The judge on portraits it has not seen (renders, and renders through the autoencoder):\n")
        found.append(table("| attribute | renders | round trips |", rows) + "\n")
    if (folder / "scores.json").exists():
        scores = json.loads((folder / "scores.json").read_text())
        how = "{prompts} prompts, DDIM {steps} steps, guidance {guidance}, seed {seed}".format(**scores)
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


def card(folder: Path) -> str:
    """The model card of a model folder, as Markdown."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text())
    notes = "".join(f"\n{note}\n" for note in facts.get("notes", []))
    for seen, planned in facts.get("extended", []):
        notes += f"\nThe run was planned for {planned} images; at {seen} it was resumed with another `--images`.\n"
    by_kind = {k: ", ".join(t.phrase for t in TARGETS.values() if t.kind == k) for k in ("weak", "new")}
    return TEXT.format(
        **{**facts, "notes": notes},
        **by_kind,
        psnr=facts["vae_psnr"],
        scores=describe_scores(folder).rstrip(),
    )


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
