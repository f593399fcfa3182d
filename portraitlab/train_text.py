"""Train a text encoder that knows every word: `python -m portraitlab.train_text --out DIR`.

A small CLIP on the portraits and captions of all parts, weak and new ones in every tenth picture and more, whose image
half is locked (LiT, arXiv 2111.07991): it is the judge's convolutions, and each picture goes through them once. Two
things more bind small parts (freckles, earrings) to their words, where `train_clip` hardly binds them: each person
stands beside counterparts that differ in one attribute each, and a text belongs to every picture of the batch that it
is true of. The image half is thrown away.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from portraitlab import captions
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
    caption,
    phrases,
)
from portraitlab.judge import CHOICES, load_judge
from portraitlab.model_files import JUDGE_FILE
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
from portraitlab.train_clip import PROJECTION, TOKENS, auc, build, embed_images, embed_texts, fit, words
from portraitlab.train_judge import draw
from portraitlab.training import prepare_process

#: The transformer reads the states before the last layer, and what lies below must tell whose colour a colour is.
LAYERS = 4
WARM_UP = 60
GROUP = 4  # a person and its counterparts
SINGLE = 0.5  # share of texts that are one phrase alone
FLAG = 0.6  # share of those that name a flag, where there is one
DROP = 0.15  # how often a topic is left out of the others; the base model's captions leave out eyes and skin more often
app = typer.Typer(add_completion=False)

#: What `counterpart` may change, and to what; a flag is put on or taken away.
CHANGES: Mapping[str, tuple[str, ...]] = {
    **{name: values for name, values in CHOICES.items() if name != "presentation"},
    "eye_colour": tuple(EYE_COLOURS),
}


def counterpart(person: Person, rng: np.random.Generator) -> Person:
    """The same person with clothes and background in each other's colour (2 of 10 times, where both can have both), or
    with one attribute changed: a flag (5 of 10 times), or another value of a choice.
    """
    kind = rng.random()
    clothes, background = person.background, person.clothes_colour
    if kind >= 0.8 and clothes != background and clothes in CLOTHES_COLOURS and background in BACKGROUNDS:
        return person.with_(clothes_colour=clothes, background=background)
    if kind < 0.5:
        possible = [flag for flag in FLAGS if flag != "beard" or person.presentation == "man"]
        flag = possible[int(rng.integers(len(possible)))]
        return person.with_(**{flag: not getattr(person, flag)})
    name = tuple(CHANGES)[int(rng.integers(len(CHANGES)))]
    others = [value for value in CHANGES[name] if value != getattr(person, name)]
    return person.with_(**{name: others[int(rng.integers(len(others)))]})


def draw_groups(seed: int, part: int, count: int) -> tuple[list[Person], NDArray[np.uint8]]:
    """`count // GROUP` balanced persons, each followed by its counterparts, and their renders."""
    rng = np.random.default_rng([seed, part])
    persons: list[Person] = []
    for _ in range(count // GROUP):
        person = sample_person(rng, BALANCED_RATES)
        persons += [person, *(counterpart(person, rng) for _ in range(GROUP - 1))]
    return persons, render_batch(persons)[0]


@functools.cache
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


def phrases_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A caption's parts in order, commas and "with" between them included, and what each says: attribute -> value."""
    styles = {word: {"hair_style": value} for value, word in HAIR_STYLE_WORDS.items()}
    textures = {word: {"texture": value} for value, adjectives in TEXTURE_WORDS.items() for word in adjectives}
    found = []
    for part in re.split("(, | with )", text):
        phrase, said = part.removeprefix("wearing a "), {}
        for word, what in {**styles, **textures}.items():
            if phrase.removeprefix(f"{word} ") in claims() and phrase not in claims():
                phrase = phrase.removeprefix(f"{word} ")
                said |= what
        found.append((part, said | claims().get(phrase, {})))
    return found


def says(text: str) -> dict[str, Any]:
    """What a caption, or a phrase of one, says of a person: attribute -> value."""
    return {name: value for _, said in phrases_of(text) for name, value in said.items()}


def is_true(said: Mapping[str, Any], person: Person) -> bool:
    """Whether all that is said holds for `person`."""
    return all(getattr(person, name) == value for name, value in said.items())


def text_of(person: Person, rng: np.random.Generator) -> str:
    """A caption, or one phrase alone."""
    if rng.random() >= SINGLE:
        return caption(person, rng, dict.fromkeys(captions.DROP, DROP))
    parts = phrases(person, rng)
    flags = [part for part in parts if part.topic in FLAG_WORDS]
    chosen = flags if flags and rng.random() < FLAG else parts
    return chosen[int(rng.integers(len(chosen)))].text


class Readout(nn.Module):
    """Reads what a phrase says off the state of its last word, so that "jacket" in "red jacket" comes to hold the red.

    The contrast asks that of the last word of all only. Encoders of T5's and Qwen's size do it unasked.

    Args:
        tokenizer: the text encoder's.
        width: channels of its states.
    """

    def __init__(self, tokenizer: Any, width: int) -> None:
        super().__init__()
        pairs = dict.fromkeys(pair for said in claims().values() for pair in said.items())
        self.columns = {pair: index for index, pair in enumerate(pairs)}
        self.linear = nn.Linear(width, len(self.columns))
        self.length = functools.cache(lambda part: len(tokenizer(part, add_special_tokens=False).input_ids))

    def places(self, text: str) -> list[tuple[int, list[int]]]:
        """For each phrase that says something: its last token's place, and the columns of what it says."""
        end, found = 0, []
        for part, said in phrases_of(text):
            end += self.length(part)
            if said and end < TOKENS - 1:
                found.append((end, [self.columns[pair] for pair in said.items()]))  # the first token is the start's
        return found

    def forward(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """Binary cross-entropy, summed over all that can be said, mean over phrases; of states `[N, 40, E]`."""
        found = [(row, *place) for row, text in enumerate(texts) for place in self.places(text)]
        target = torch.zeros(len(found), len(self.columns))
        for index, (_, _, columns) in enumerate(found):
            target[index, columns] = 1
        chosen = states[[row for row, *_ in found], [place for _, place, _ in found]]
        return F.binary_cross_entropy_with_logits(self.linear(chosen), target, reduction="sum") / max(len(found), 1)


class Locked(nn.Module):
    """In the place of a `CLIPModel`'s vision transformer: features `[N, 160]` that were seen before, standardised.

    Args:
        features: `[N, 160]`, of all portraits of the training.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0).clamp_min(1e-6))

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """The features of some pictures, `[N, 160]`, as `pooler_output`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        standardised = (pixel_values - self.mean) / self.deviation
        return BaseModelOutputWithPooling(pooler_output=standardised)  # type: ignore[arg-type]


@torch.no_grad()
def seen(pictures: NDArray[np.uint8]) -> Tensor:
    """The judge's features of pictures uint8 `[N, 128, 128, 3]`, `[N, 160]`."""
    judge = load_judge(JUDGE_FILE)
    parts = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
    return torch.cat([judge.features(to_tensor(part)) for part in parts])


def separation(model: Any, tokenizer: Any, persons: Sequence[Person], features: Tensor) -> dict[str, float]:
    """For every phrase of captions: how often an image that shows it lies nearer to its text than one that does not."""
    said = claims()
    similarity = embed_images(model, features) @ embed_texts(model, tokenizer, tuple(said)).T
    scores = {}
    for column, (phrase, what) in enumerate(said.items()):
        there = torch.tensor([is_true(what, person) for person in persons])
        scores[phrase] = auc(similarity[there, column], similarity[~there, column])
    return scores


def train(
    folder: Path, *, seed: int, portraits: int, images: int, batch: int = 100, lr: float = 2e-3
) -> dict[str, Any]:
    """Train one and write it as a `CLIPTextModelWithProjection` with its tokenizer; returns its `scores.json`.

    Args:
        folder: receives the files; without `scores.json` it is not finished.
        seed: of weights, data and order.
        portraits: distinct renders, three of four of them counterparts.
        images: images seen.
        batch: images a step, each with its text.
        lr: peak learning rate.
    """
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder, merges_for(words(), clip_merges()))
    model = build(len(tokenizer), LAYERS)
    persons, pictures = draw_groups(seed, 61, portraits)
    features = seen(pictures)
    model.vision_model = Locked(features)
    model.visual_projection = nn.Linear(features.shape[1], PROJECTION, bias=False)

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, list[str], Tensor]:
        groups = rng.integers(0, len(persons) // GROUP, batch // GROUP)
        chosen = (GROUP * groups[:, None] + np.arange(GROUP)).ravel()
        texts = [text_of(persons[i], rng) for i in chosen]
        fits = [[is_true(said, persons[i]) for i in chosen] for said in map(says, texts)]
        return features[torch.from_numpy(chosen)], texts, torch.tensor(fits).float()

    readout = Readout(tokenizer, model.config.text_config.hidden_size)
    fit(
        model,
        tokenizer,
        batch_of,
        seed=seed,
        images=images,
        lr=lr,
        warm_up=WARM_UP,
        title="text encoder",
        readout=readout,
    )
    held, held_pictures = draw(seed, 64, 1000)
    facts = {"seed": seed, "portraits": portraits, "images": images, "batch": batch, "lr": lr}
    summary = {**facts, "separation": separation(model, tokenizer, held, seen(held_pictures))}
    half = CLIPTextModelWithProjection(model.config.text_config)
    half.text_model.load_state_dict(model.text_model.state_dict())
    half.text_projection.load_state_dict(model.text_projection.state_dict())
    half.half().save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
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
