"""Train a small CLIP on drawn portraits: `python -m portraitlab.train_clip --seed 0`.

Two are in the repository, from two seeds: one guides training (`spf_response`), the other only scores, so that what is
gained is not the guide's own blind spot. Every word and every part of the renderer is in the training data, as a real
CLIP has seen hats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from portraitlab.autoencoder import to_tensor
from portraitlab.captions import DROP, FLAG_WORDS, TARGETS, caption, phrases
from portraitlab.model_files import CLIP_FOLDERS
from portraitlab.portraits import BALANCED_RATES, CLOTHES_COLOURS, HAIR_COLOURS, Person, sample_person
from portraitlab.text import clip_merges, merges_for, save_tokenizer
from portraitlab.train_judge import damage, draw
from portraitlab.training import Progressor, prepare_process

SIZE, TOKENS, PROJECTION = 96, 40, 64
SINGLE = 0.3  # share of texts that are one phrase alone, as a target is
app = typer.Typer(add_completion=False)


def words() -> list[str]:
    """Every word that captions use."""
    rng = np.random.default_rng(0)
    texts = [caption(sample_person(rng, BALANCED_RATES), rng, dict.fromkeys(DROP, 0.0)) for _ in range(4000)]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]+", text.lower())})


def build(vocabulary: int, text_layers: int = 2) -> Any:
    """A fresh `CLIPModel`: a vision transformer on 96 px and a text transformer, 1.1 million parameters."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 3,
        "max_position_embeddings": TOKENS,
        "projection_dim": PROJECTION,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 16,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def text_of(person: Person, rng: np.random.Generator) -> str:
    """A caption, or one phrase of it alone."""
    if rng.random() < SINGLE:
        parts = phrases(person, rng)[1:]
        rare = [part for part in parts if part.topic in FLAG_WORDS]
        chosen = rare if rare and rng.random() < 0.6 else parts
        return chosen[int(rng.integers(len(chosen)))].text
    return caption(person, rng)


def tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `[N, 40]`."""
    return dict(tokenizer(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"))


def resized(pixels: Tensor) -> Tensor:
    """Pixels `[N, 3, 128, 128]` in [-1, 1] as the vision transformer takes them (mean and deviation one half)."""
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def embed_images(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors `[N, 64]` of pixels as the model's image half takes them."""
    parts = [model.visual_projection(model.vision_model(p).pooler_output) for p in pixels.split(100)]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors `[N, 64]` of texts."""
    states = model.text_model(**tokens(tokenizer, texts))
    return F.normalize(model.text_projection(states.pooler_output), dim=-1)


def auc(positive: Tensor, negative: Tensor) -> float:
    """How often one of `positive` `[N]` is larger than one of `negative` `[M]`."""
    return float((positive[:, None] > negative[None]).float().mean())


def zero_shot(model: Any, tokenizer: Any, persons: Sequence[Person], pixels: Tensor) -> dict[str, float]:
    """Share of portraits whose attribute the model names right, by the nearest of the possible phrases.

    Flags are told by "FLAG" against the mean of the other phrases' texts: right where images with it lie nearer to its
    text than images without (area under the curve).
    """
    model.eval()
    images = embed_images(model, pixels)

    def embed(texts: Sequence[str]) -> Tensor:
        return embed_texts(model, tokenizer, texts)

    scores = {}
    for name, values, form in (
        ("hair_colour", tuple(HAIR_COLOURS), "{} hair"),
        ("background", tuple({p.background for p in persons}), "{} background"),
        ("clothes_colour", tuple(CLOTHES_COLOURS), "{} " + "jacket"),
    ):
        best = (images @ embed([form.format(v) for v in values]).T).argmax(1)
        scores[name] = float(np.mean([values[int(b)] == getattr(p, name) for b, p in zip(best, persons, strict=True)]))
    for target in TARGETS.values():
        there = torch.tensor([target.present(p) for p in persons])
        similarity = images @ embed([target.phrase])[0]
        scores[f"{target.name} (AUC)"] = auc(similarity[there], similarity[~there])
    return scores


def fit(
    model: Any,
    tokenizer: Any,
    batch_of: Callable[[np.random.Generator], tuple[Tensor, list[str], Tensor]],
    *,
    seed: int,
    images: int,
    lr: float,
    warm_up: int = 200,
    title: str,
    readout: nn.Module | None = None,
) -> None:
    """Train a `CLIPModel` on the contrast of pictures and texts.

    Args:
        model: trained in place.
        tokenizer: its own.
        batch_of: draws a batch: B pictures as the model's image half takes them, T texts, and float32 `[T, B]` with 1
            where a text fits a picture. A text that fits several is to lie equally near to them (arXiv 2204.03610).
        seed: of the batches; what is drawn for a step depends on its number alone.
        images: images seen.
        lr: peak learning rate.
        warm_up: steps until it is reached.
        title: what the progress calls it.
        readout: a further loss, a scalar, of the text half's states before the last layer `[T, 40, E]` and the texts;
            trained along.
    """
    parameters = [*model.parameters(), *(readout.parameters() if readout else ())]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    model.train()
    done, step = 0, 0
    with Progressor(title) as progress:
        while done < images:
            rng = np.random.default_rng([seed, 62, step])
            pixels, texts, fits = batch_of(rng)
            for group in optimiser.param_groups:
                group["lr"] = (
                    lr * min(1, (step + 1) / warm_up) * max(0.01, 0.5 * (1 + math.cos(math.pi * done / images)))
                )
            outputs = model(pixel_values=pixels, **tokens(tokenizer, texts), output_hidden_states=readout is not None)
            logits = outputs.logits_per_text
            per_text = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
            per_image = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
            loss = (per_text + per_image) / 2
            if readout:
                loss = loss + readout(outputs.text_model_output.hidden_states[-2], texts)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            step, done = step + 1, done + len(pixels)
            progress(done, images, float(loss.detach()))
    model.eval()


@app.command()
def main(
    seed: Annotated[int, typer.Option(help="0 makes the guide, 1 the scorer.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="beside the model")] = None,
    portraits: Annotated[int, typer.Option(help="Distinct portraits.", min=64)] = 12_000,
    images: Annotated[int, typer.Option(help="Images seen in training.", min=64)] = 80_000,
    batch: Annotated[int, typer.Option(min=8)] = 100,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train, report how well it names attributes of held-out portraits, and write the model."""
    prepare_process("cpu", threads)
    torch.manual_seed(seed)
    folder = out or CLIP_FOLDERS[seed]
    tokenizer = save_tokenizer(folder, merges_for(words(), clip_merges()))
    model = build(len(tokenizer))
    persons, pictures = draw(seed, 61, portraits)

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, list[str], Tensor]:
        chosen = rng.integers(0, portraits, batch)
        pixels = torch.cat([damage(part, rng) for part in to_tensor(pictures[chosen]).split(batch // 4)])
        return resized(pixels), [text_of(persons[i], rng) for i in chosen], torch.eye(batch)

    fit(model, tokenizer, batch_of, seed=seed, images=images, lr=lr, title="CLIP")
    held, held_pictures = draw(seed, 64, 1000)
    scores = zero_shot(model, tokenizer, held, resized(to_tensor(held_pictures)))
    model.half().save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    summary = {"seed": seed, "images": images, "zero_shot": scores}
    (folder / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for name, value in scores.items():
        print(f"{name:<22}{value:>8.3f}")


if __name__ == "__main__":
    app()
