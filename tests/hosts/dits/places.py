"""Where phrases lie among tokens, by the tokenizers' own offsets."""

from __future__ import annotations

from collections.abc import Sequence

from spf_plugin.core.prompt import Kind, Prompt

Place = tuple[int, int] | None
"""The characters of the text at a position; None for what is no part of it."""

PROMPTS = {
    "start": "blonde hair, a woman in a brown jacket, curtain background",
    "middle": "a woman in a brown jacket, blonde hair, curtain background",
    "end": "a woman in a brown jacket, curtain background, blonde hair",
    "twice": "a woman with blonde hair in a jacket, smiling, blonde hair",
    "introduced": "a woman with blonde hair and sunglasses, brown jacket",
    "long": "blonde hair, " + "a woman in a brown jacket, curtain background, " * 10,  # for CLIP and for T5
    "cut off": "a woman in a brown jacket, curtain background, blonde hair, with a red hat and sunglasses",
}


def by_offsets(prompt: Prompt, places: Sequence[Place], *, full: bool) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The positions of each phrase, and of the target, in the full or the base prompt."""
    phrases, target = [list[int]() for _ in prompt.phrases], list[int]()
    pieces, end = [], 0
    for piece in prompt.pieces:
        if piece.in_full if full else piece.in_base:
            pieces.append((end, end + len(piece.text), piece))
            end += len(piece.text)
    for position, place in enumerate(places):
        if place is None:
            continue
        last = place[1] - 1  # a token may begin with the space before it
        piece = next(piece for start, stop, piece in pieces if start <= last < stop)
        if piece.kind is Kind.TARGET:
            target.append(position)
        elif piece.phrase >= 0:
            phrases[piece.phrase].append(position)
    return [tuple(phrase) for phrase in phrases], tuple(target)
