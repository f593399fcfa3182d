"""Export a training checkpoint as a diffusers pipeline folder: `python -m portraitlab.export_base`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from portraitlab import train_base, train_dit
from portraitlab.model_files import DIT_FOLDER, MODEL_FOLDER
from portraitlab.pool import CHUNK
from portraitlab.text import save_tokenizer
from portraitlab.training import CHECKPOINT, averaged
from spf_plugin.trainer.models import quiet

app = typer.Typer(add_completion=False)


def build_pipeline(unet: Any, text: Any, vae: Any, tokenizer: Any) -> Any:
    """The parts as a `StableDiffusionPipeline` with Stable Diffusion 1's noise schedule and no safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(**train_base.SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
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


def unet_pipeline(work: Path, vae: Any, tokenizer: Path) -> tuple[Any, dict[str, Any]]:
    """The UNet's base with averaged weights in half precision, and the facts of its checkpoint.

    Args:
        work: folder of `train_base`.
        vae: its autoencoder.
        tokenizer: folder that receives the tokenizer.
    """
    recipe = train_base.NoisePrediction(None, seed=0, device="cpu")
    facts = averaged(recipe, work / CHECKPOINT)
    return build_pipeline(recipe.unet.half(), recipe.text.half(), vae.half(), save_tokenizer(tokenizer)), facts


def dit_pipeline(work: Path, vae: Any) -> tuple[Any, dict[str, Any]]:
    """The transformer's base with averaged weights in half precision, and the facts of its training.

    Args:
        work: folder of `train_dit`.
        vae: its autoencoder.
    """
    folders = [work / name for name in train_dit.ENCODERS]
    encoders, tokenizers = train_dit.load_encoders(folders)
    recipe = train_dit.FlowMatching(encoders, tokenizers, seed=0, device="cpu")
    facts = averaged(recipe, work / CHECKPOINT)
    facts["text_encoders"] = [json.loads((folder / "scores.json").read_text(encoding="utf-8")) for folder in folders]
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    halves = [encoder.half() for encoder in encoders]
    return train_dit.build_pipeline(recipe.transformer.half(), halves, tokenizers, vae.half()), facts


def export(work: Path, out: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write the model folder in half precision; other files in it (judge, model card) stay.

    Args:
        work: folder of `train_base` or `train_dit`.
        out: folder to write; by default that of the embedded model of this kind.

    Returns:
        The folder, and the facts in its `training.json`.

    Raises:
        FileNotFoundError: if `work` holds no checkpoint or autoencoder.
    """
    from diffusers import AutoencoderKL

    is_dit = all((work / name).is_dir() for name in train_dit.ENCODERS)
    script = "train_dit" if is_dit else "train_base"
    for needed in (work / CHECKPOINT, work / "vae" / "config.json"):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: run python -m portraitlab.{script} --out {work} first")
    out = out or (DIT_FOLDER if is_dit else MODEL_FOLDER)
    out.mkdir(parents=True, exist_ok=True)
    folder = work / "vae-tuned" if (work / "vae-tuned" / "config.json").exists() else work / "vae"
    vae = AutoencoderKL.from_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        aside = Path(temporary)
        pipeline, facts = dit_pipeline(work, vae) if is_dit else unet_pipeline(work, vae, aside / "tokenizer")
        facts["images_seen"] = facts["step"] * facts["batch"]
        facts["pool"] = sum(1 for _ in (work / "pool").glob("latents-*.npy")) * CHUNK
        facts["machine"] = f"{platform.machine()}, torch {torch.__version__}"
        if (work / "notes.json").exists():  # what a rerun of the commands would not repeat exactly
            facts["notes"] = json.loads((work / "notes.json").read_text(encoding="utf-8"))
        if (folder / "score.json").exists():  # a finished model's autoencoder is not measured again
            facts["vae_psnr"] = json.loads((folder / "score.json").read_text(encoding="utf-8"))["psnr"]
        with quiet():  # it says of every part that is None that it cannot be saved
            pipeline.save_pretrained(aside)
        if not is_dit:
            save_tokenizer(aside / "tokenizer")  # the pipeline wrote an indented vocabulary, 0.2 MB longer
        for config in aside.rglob("config.json"):  # not where this machine keeps its files
            words = json.loads(config.read_text(encoding="utf-8"))
            words.pop("_name_or_path", None)
            config.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
        (aside / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for source in sorted(p for p in aside.rglob("*") if p.is_file()):
            target = out / source.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    return out, facts


@app.command()
def main(
    work: Annotated[
        Path, typer.Option(help="Folder of python -m portraitlab.train_base or portraitlab.train_dit.")
    ] = train_base.DEFAULT_WORK,
    out: Annotated[
        Path | None, typer.Option(help="Model folder to write.", show_default="the embedded model's")
    ] = None,
) -> None:
    """Export the averaged weights of the newest checkpoint."""
    try:
        folder, facts = export(work, out)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {facts['images_seen']} images seen, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
