"""Train the second embedded model, a small diffusion transformer: `python -m portraitlab.train_dit --out DIR`.

It has the layout of Stable Diffusion 3 (joint attention, flow matching, two CLIP text encoders, no T5) and sees the
same portraits with the same captions as the UNet's base, in the same latents. Unlike there, the text encoders are
trained before it, on pictures and captions with every word of the renderer, and then frozen: they know "hat", which the
transformer never draws. Stages, each resumed where it stopped: text encoders, pool of encoded portraits, transformer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from portraitlab import train_text
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.pool import prepare_pool
from portraitlab.train_clip import PROJECTION, TOKENS
from portraitlab.training import CHECKPOINT, Trainer, half_precision, prepare_process
from spf_plugin.trainer.models import quiet

DEFAULT_WORK = Path.home() / ".cache" / "spf-plugin" / "portraitlab" / "dit"
ENCODERS = ("text_encoder", "text_encoder_2")
#: Patches of one latent place: 16x16 image tokens, the grid that the UNet's finest attention has too. Patches of 2x2
#: would cost .4 of it, and leave control maps of 8x8.
PATCH = 1
WIDTH, HEADS, LAYERS = 128, 4, 6
SHIFT = 2.0  # of the times towards the noise, in training and sampling

app = typer.Typer(add_completion=False)


def build_transformer(text_width: int) -> Any:
    """A fresh `SD3Transformer2DModel`, 3.5 million parameters, in which every block begins as the identity.

    Args:
        text_width: channels of the two text encoders' states together.
    """
    from diffusers import SD3Transformer2DModel

    model: Any = SD3Transformer2DModel(
        sample_size=16,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=text_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=PROJECTION * len(ENCODERS),
        pos_embed_max_size=16 // PATCH,
        qk_norm="rms_norm",
    )
    zero = [model.norm_out.linear, model.proj_out]  # adaLN-Zero (arXiv 2212.09748); diffusers leaves it to the trainer
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def load_encoders(folders: Sequence[Path]) -> tuple[list[Any], list[Any]]:
    """The folders' text encoders as frozen `CLIPTextModelWithProjection`s in float32, and their tokenizers."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    with quiet():
        encoders = [CLIPTextModelWithProjection.from_pretrained(f, torch_dtype=torch.float32) for f in folders]
    for encoder in encoders:
        encoder.requires_grad_(False).eval()
    # Captions have at most 37 tokens. Every one more would be a token of each joint attention, twice: SD3 fills T5's
    # place with as many zeros.
    tokenizers = [CLIPTokenizer.from_pretrained(f, model_max_length=TOKENS) for f in folders]
    return encoders, tokenizers


def build_pipeline(transformer: Any, encoders: Sequence[Any], tokenizers: Sequence[Any], vae: Any = None) -> Any:
    """The parts as a `StableDiffusion3Pipeline` without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


class FlowMatching:
    """The transformer, trained to predict the velocity from picture to noise along a straight line: a `Recipe`.

    Rectified flow (arXiv 2403.03206) with even times, shifted towards the noise as in its equation 23. Of the
    logit-normal times of equation 19 only one in seventy lies above .9, where what is which colour is decided.
    """

    def __init__(self, encoders: Sequence[Any], tokenizers: Sequence[Any], *, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.transformer = build_transformer(sum(e.config.hidden_size for e in encoders)).to(device)
        self.networks = {"transformer": self.transformer}
        self.pipeline = build_pipeline(self.transformer, [e.to(device) for e in encoders], tokenizers)

    def settings(self) -> dict[str, Any]:
        """The shape of the transformer, and of the times."""
        return {"patch": PATCH, "width": WIDTH, "heads": HEADS, "layers": LAYERS, "shift": SHIFT}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `[B, 80, E]` (T5's half are zeros) and pooled vectors `[B, 128]`, as the pipeline makes them."""
        texts = list(captions)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, device=torch.device(self.device), do_classifier_free_guidance=False
        )
        return states, pooled

    def loss(self, clean: Tensor, captions: Sequence[str], source: torch.Generator) -> Tensor:
        """The mean squared error of the predicted velocity, a scalar; of latents `[B, 4, 16, 16]`."""
        noise = torch.randn(clean.shape, generator=source).to(self.device)
        times = torch.rand(len(clean), generator=source).to(self.device)
        sigmas = SHIFT * times / (1 + (SHIFT - 1) * times)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        states, pooled = self.encode(captions)
        with half_precision(self.device):
            predicted = self.transformer(noisy, states, pooled, 1000 * sigmas, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise - clean)


def prepare_encoders(work: Path, *, portraits: int, images: int, seed: int) -> list[Path]:
    """Train the text encoders that `work` lacks, each from a seed of its own; returns their folders."""
    folders = [work / name for name in ENCODERS]
    for index, folder in enumerate(folders):
        if (folder / "scores.json").exists():
            continue
        number = len(ENCODERS) * seed + 10 + index  # not the seeds of the guide and the scorer, which measure
        scores = train_text.train(folder, seed=number, portraits=portraits, images=images)
        least = sorted(scores["separation"].items(), key=lambda pair: pair[1])[:3]
        print(f"{folder.name}: worst words {', '.join(f'{n} {v:.3f}' for n, v in least)}", flush=True)
    return folders


@app.command()
def main(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and working files; a second run resumes.")
    ] = DEFAULT_WORK,
    images: Annotated[
        int, typer.Option(help="Images the transformer sees in all; sets the schedule.", min=32)
    ] = 300_000,
    pool: Annotated[int, typer.Option(help="Chunks of 500 portraits to render and encode.", min=1)] = 32,
    vae: Annotated[Path, typer.Option(help="The autoencoder.")] = MODEL_FOLDER / "vae",
    text_images: Annotated[int, typer.Option(help="Images each text encoder sees in training.", min=100)] = 160_000,
    text_portraits: Annotated[int, typer.Option(help="Distinct portraits for it.", min=100)] = 16_000,
    text_only: Annotated[bool, typer.Option(help="Stop when the text encoders are trained.")] = False,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.0e-3,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the training loop.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Processes that encode the pool on a CPU.", min=1)] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer: 1.2 times the speed; needs a C++ compiler.")
    ] = False,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
) -> None:
    """Train the text encoders, then the transformer, from drawn portraits."""
    device = prepare_process(device, threads)
    out.mkdir(parents=True, exist_ok=True)
    folders = prepare_encoders(out, portraits=text_portraits, images=text_images, seed=seed)
    if text_only:
        return
    if not (out / "vae" / "config.json").exists():
        shutil.copytree(vae, out / "vae", dirs_exist_ok=True)  # the export takes the one that made the latents
    latents, persons = prepare_pool(out / "pool", out / "vae", chunks=pool, seed=seed, device=device, workers=workers)
    recipe = FlowMatching(*load_encoders(folders), seed=seed, device=device)
    if compiled:
        recipe.transformer.compile(dynamic=False)
    trainer = Trainer(recipe, images=images, batch=batch, lr=lr, seed=seed, device=device)
    if not trainer.run("transformer", latents, persons, out / CHECKPOINT, save_minutes):
        raise typer.Exit(130)
    print(f"done: {out / CHECKPOINT}; export it with python -m portraitlab.export_base --work {out}")


if __name__ == "__main__":
    app()
