"""Train a text encoder that knows every word: `python -m portraitlab.train_text --out DIR`.

A small CLIP on the portraits and captions of all parts, weak and new ones in every tenth picture and more. Each person
stands beside a counterpart that differs in one attribute: within such a batch only that attribute's word tells which
text is whose, so small parts (freckles, earrings) are bound to their words too. Its image half is a convolutional
network, which learns small parts from far fewer pictures than a vision transformer, and is thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from portraitlab.autoencoder import to_tensor
from portraitlab.captions import (
    BACKGROUND_WORDS,
    CLOTHES_WORDS,
    EXPRESSION_WORDS,
    FLAG_WORDS,
    HAIR_STYLE_WORDS,
    HAIR_WORDS,
    SKIN_WORDS,
    SUBJECTS,
    TEXTURE_WORDS,
)
from portraitlab.judge import CHOICES, Judge
from portraitlab.portraits import (
    BACKGROUNDS,
    BALANCED_RATES,
    CLOTHES_COLOURS,
    EYE_COLOURS,
    FLAGS,
    Person,
    render_batch,
    sample_person,
)
from portraitlab.text import clip_merges, merges_for, save_tokenizer
from portraitlab.train_clip import PROJECTION, auc, build, embed_images, embed_texts, fit, words
from portraitlab.train_judge import draw
from portraitlab.training import prepare_process

app = typer.Typer(add_completion=False)

#: What `counterpart` may change, and to what; a flag is put on or taken away.
CHANGES: Mapping[str, tuple[str, ...]] = {
    **{name: values for name, values in CHOICES.items() if name != "presentation"},
    "eye_colour": tuple(EYE_COLOURS),
}


def counterpart(person: Person, rng: np.random.Generator) -> Person:
    """The same person with one attribute changed: a flag (6 of 10 times), or another value of a choice."""
    if rng.random() < 0.6:
        possible = [flag for flag in FLAGS if flag != "beard" or person.presentation == "man"]
        flag = possible[int(rng.integers(len(possible)))]
        return person.with_(**{flag: not getattr(person, flag)})
    name = tuple(CHANGES)[int(rng.integers(len(CHANGES)))]
    others = [value for value in CHANGES[name] if value != getattr(person, name)]
    return person.with_(**{name: others[int(rng.integers(len(others)))]})


def draw_pairs(seed: int, part: int, count: int) -> tuple[list[Person], NDArray[np.uint8]]:
    """`count // 2` balanced persons, each followed by its counterpart, and their renders."""
    rng = np.random.default_rng([seed, part])
    persons: list[Person] = []
    for _ in range(count // 2):
        person = sample_person(rng, BALANCED_RATES)
        persons += [person, counterpart(person, rng)]
    return persons, render_batch(persons)[0]


def claims() -> dict[str, dict[str, Any]]:
    """Every phrase that captions use, and what it says of a person."""
    found: dict[str, dict[str, Any]] = {}
    tables: Mapping[str, Mapping[str, Sequence[str]]] = {
        "hair_colour": HAIR_WORDS,
        "skin": SKIN_WORDS,
        "expression": EXPRESSION_WORDS,
    }
    for name, table in tables.items():
        found |= {phrase: {name: value} for value, synonyms in table.items() for phrase in synonyms}
    for value, subjects in SUBJECTS.items():  # the last one says nothing
        found |= {f"a {word}": {"presentation": value} for word in subjects[:-1]}
    found |= {word: {"hair_style": value} for value, word in HAIR_STYLE_WORDS.items()}
    found |= {f"{value} eyes": {"eye_colour": value} for value in EYE_COLOURS}
    for colour in CLOTHES_COLOURS:
        for value, garments in CLOTHES_WORDS.items():
            found |= {f"{colour} {word}": {"clothes": value, "clothes_colour": colour} for word in garments}
    for word in BACKGROUND_WORDS:
        found |= {f"{value} {word}": {"background": value} for value in BACKGROUNDS}
        for texture, adjectives in TEXTURE_WORDS.items():
            found |= {f"{name} {word}": {"texture": texture} for name in adjectives}
    return found | {word: {flag: True} for flag, synonyms in FLAG_WORDS.items() for word in synonyms}


class Eyes(nn.Module):
    """The judge's convolutions, fresh, in the place of a `CLIPModel`'s vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Judge()
        self.width = self.layers.head.in_features
        self.layers.head = nn.Identity()  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Features `[N, 160]`, as `pooler_output`, of pixels `[N, 3, 128, 128]` in [-1, 1]."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=self.layers.features(pixel_values))  # type: ignore[arg-type]


def separation(model: Any, tokenizer: Any, persons: Sequence[Person], pixels: Tensor) -> dict[str, float]:
    """For every phrase of captions: how often an image that shows it lies nearer to its text than one that does not."""
    said = claims()
    similarity = embed_images(model, pixels) @ embed_texts(model, tokenizer, tuple(said)).T
    scores = {}
    for column, (phrase, what) in enumerate(said.items()):
        there = torch.tensor([all(getattr(p, name) == value for name, value in what.items()) for p in persons])
        scores[phrase] = auc(similarity[there, column], similarity[~there, column])
    return scores


def train(
    folder: Path, *, seed: int, portraits: int, images: int, batch: int = 100, lr: float = 1.5e-3
) -> dict[str, Any]:
    """Train one and write it as a `CLIPTextModelWithProjection` with its tokenizer; returns its `scores.json`.

    Args:
        folder: receives the files; without `scores.json` it is not finished.
        seed: of weights, data and order.
        portraits: distinct renders, half of them counterparts.
        images: images seen.
        batch: images a step, each with its text.
        lr: peak learning rate.
    """
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder, merges_for(words(), clip_merges()))
    model, eyes = build(len(tokenizer)), Eyes()
    model.vision_model, model.visual_projection = eyes, nn.Linear(eyes.width, PROJECTION, bias=False)
    persons, pictures = draw_pairs(seed, 61, portraits)

    def batch_of(rng: np.random.Generator) -> tuple[NDArray[np.int64], Tensor]:
        pairs = rng.integers(0, len(persons) // 2, batch // 2)
        chosen = np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()
        return chosen, to_tensor(pictures[chosen])

    fit(model, tokenizer, persons, batch_of, seed=seed, images=images, lr=lr, title="text encoder")
    held, held_pictures = draw(seed, 64, 1000)
    facts = {"seed": seed, "portraits": portraits, "images": images, "batch": batch, "lr": lr}
    summary = {**facts, "separation": separation(model, tokenizer, held, to_tensor(held_pictures))}
    half = CLIPTextModelWithProjection(model.config.text_config)
    half.text_model.load_state_dict(model.text_model.state_dict())
    half.text_projection.load_state_dict(model.text_projection.state_dict())
    half.half().save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0)] = 10,
    portraits: Annotated[int, typer.Option(help="Distinct portraits.", min=64)] = 16_000,
    images: Annotated[int, typer.Option(help="Images seen in training.", min=64)] = 120_000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train, print how well it separates every word on held-out portraits, and write the text encoder."""
    prepare_process("cpu", threads)
    scores = train(out, seed=seed, portraits=portraits, images=images)
    for phrase, value in sorted(scores["separation"].items(), key=lambda pair: pair[1]):
        print(f"{phrase:<22}{value:>8.3f}")


if __name__ == "__main__":
    app()
