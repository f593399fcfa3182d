"""Export a training checkpoint as a Stable Diffusion pipeline folder: `python -m portraitlab.export_base`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from portraitlab.model_files import MODEL_FOLDER
from portraitlab.pool import CHUNK
from portraitlab.text import build_text_encoder, save_tokenizer
from portraitlab.train_base import DEFAULT_WORK, SCHEDULE, build_unet

app = typer.Typer(add_completion=False)


def load_checkpoint(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """UNet and text encoder with the averaged weights of a checkpoint, and its facts (step, settings)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    unet, text = build_unet(), build_text_encoder()
    with torch.no_grad():
        for parameter, value in zip([*unet.parameters(), *text.parameters()], state["ema"], strict=True):
            parameter.copy_(value)
    facts = {"step": state["step"], **state["settings"], "extended": state.get("extended", [])}
    return unet.eval(), text.eval(), facts


def build_pipeline(unet: Any, text: Any, vae: Any, tokenizer: Any) -> Any:
    """The parts as a `StableDiffusionPipeline` with Stable Diffusion 1's noise schedule and no safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path, out: Path) -> dict[str, Any]:
    """Write the model folder in half precision; other files in `out` (judge, model card) stay. Returns the facts.

    Raises:
        FileNotFoundError: if `work` holds no checkpoint or autoencoder.
    """
    from diffusers import AutoencoderKL

    for needed in (work / "base.pt", work / "vae" / "config.json"):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: run python -m portraitlab.train_base --out {work} first")
    unet, text, facts = load_checkpoint(work / "base.pt")
    folder = work / "vae-tuned" if (work / "vae-tuned" / "config.json").exists() else work / "vae"
    vae = AutoencoderKL.from_pretrained(folder)
    facts["images_seen"] = facts["step"] * facts["batch"]
    facts["pool"] = sum(1 for _ in (work / "pool").glob("latents-*.npy")) * CHUNK
    facts["machine"] = f"{platform.machine()}, torch {torch.__version__}"
    if (work / "notes.json").exists():  # what a rerun of the commands would not repeat exactly
        facts["notes"] = json.loads((work / "notes.json").read_text())
    facts["vae_psnr"] = json.loads((folder / "score.json").read_text())["psnr"]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        aside = Path(temporary)
        tokenizer = save_tokenizer(aside / "tokenizer")
        build_pipeline(unet.half(), text.half(), vae.half(), tokenizer).save_pretrained(aside)
        save_tokenizer(aside / "tokenizer")  # the pipeline wrote an indented vocabulary, 0.2 MB longer
        for config in aside.rglob("config.json"):  # not where this machine keeps its files
            words = json.loads(config.read_text())
            words.pop("_name_or_path", None)
            config.write_text(json.dumps(words, indent=2) + "\n")
        (aside / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        for source in sorted(p for p in aside.rglob("*") if p.is_file()):
            target = out / source.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    return facts


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of python -m portraitlab.train_base.")] = DEFAULT_WORK,
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = MODEL_FOLDER,
) -> None:
    """Export the averaged weights of the newest checkpoint."""
    try:
        facts = export(work, out)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {facts['images_seen']} images seen, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
