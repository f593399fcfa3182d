"""What sd-scripts makes of a caption before it encodes it: `process_caption`, with the choices of its wildcards."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

COMBINATIONS = 64  # of the wildcards in one phrase; of more, only neighbours are combined,
PAIRS = 256  # and of longer lists not even these: then every choice is looked at, beside one of its neighbour
_WILDCARD = re.compile(r"\{([^}]+)\}")  # the host's


def shuffled(subset: Any) -> bool:
    """Whether the host takes the captions of a subset apart."""
    return bool(
        getattr(subset, "shuffle_caption", False)
        or (getattr(subset, "token_warmup_step", None) or 0) > 0
        or (getattr(subset, "caption_tag_dropout_rate", None) or 0) > 0
    )


def of_file(text: str, *, wildcards: bool) -> str:
    """What the host takes of a caption file: its first line, or with enable_wildcard all of them."""
    lines = text.split("\n")
    return "\n".join(line.strip() for line in lines if line.strip()) if wildcards else lines[0].strip()


def dropout(subset: Any) -> float:
    """The share of steps in which the host leaves a subset's captions out."""
    every = getattr(subset, "caption_dropout_every_n_epochs", None) or 0
    return max(float(getattr(subset, "caption_dropout_rate", None) or 0), 1 / every if every > 0 else 0.0)


def taken(caption: str, subset: Any) -> tuple[tuple[str, str], ...]:
    """What tag dropout and token warm-up may take away: for every text of `prompts` what is left of it at worst.

    Empty where the host takes nothing.
    """
    drops = (getattr(subset, "caption_tag_dropout_rate", None) or 0) > 0
    if not drops and not (getattr(subset, "token_warmup_step", None) or 0) > 0:
        return ()
    separator, keeper = (
        getattr(subset, "caption_separator", None) or ",",
        getattr(subset, "keep_tokens_separator", None),
    )
    warm = 0 if drops else getattr(subset, "token_warmup_min", 1)  # tags at the first step
    out = []
    for text in _lines(caption, subset):
        if keeper and keeper in text:
            first, _, rest = text.partition(keeper)
            flexible, _, last = rest.partition(keeper)
            parts = [*first.split(separator), *flexible.split(separator)[:warm], *last.split(separator)]
        else:
            parts = text.strip().split(separator)[: (getattr(subset, "keep_tokens", None) or 0) + warm]
        left = ", ".join(part.strip() for part in parts if part.strip())
        out.append((_finished(text, subset), _finished(left, subset)))
    return tuple(out)


def prompts(caption: str, subset: Any) -> tuple[str, ...]:
    """`process_caption` of the host, with the choices of a wildcard in place of a random one.

    Args:
        caption: the content of a caption file.
        subset: the host's, or anything with (some of) its attributes.

    Returns:
        What the text encoder may be given, without shuffling and dropout; more than one only with wildcards. Then
        every line is there, every choice, and every phrase that choices make together; not every product of phrases.
    """
    return tuple(dict.fromkeys(_finished(text, subset) for text in _lines(caption, subset)))


def _lines(caption: str, subset: Any) -> list[str]:
    """The lines that the host may take of a caption, with what is put around it and with wildcards chosen."""
    if getattr(subset, "caption_prefix", None):
        caption = subset.caption_prefix + " " + caption
    if getattr(subset, "caption_suffix", None):
        caption = caption + " " + subset.caption_suffix
    if getattr(subset, "enable_wildcard", None):
        return [text for line in caption.split("\n") for text in _choices(line)]
    return [caption.split("\n")[0]]


def _finished(text: str, subset: Any) -> str:
    """A line without the separators that only the host reads."""
    separator = getattr(subset, "caption_separator", None) or ","
    if getattr(subset, "secondary_separator", None):
        text = text.replace(subset.secondary_separator, separator)
    if getattr(subset, "keep_tokens_separator", None) and shuffled(subset):
        text = f"{separator} ".join(part.strip() for part in text.split(subset.keep_tokens_separator, 2))
    return text


def _choices(line: str) -> list[str]:
    """Texts that hold every choice of every wildcard of a line.

    A target is a phrase between two commas: within one, choices are combined, and each text takes another combination
    of every phrase. So there are about as many texts as the longest list of choices, and no product of all lists.
    """
    opening, closing = "\0(", "\0)"  # what the host does to braces that are written twice
    line = line.replace("{{", opening).replace("}}", closing)
    phrases: list[list[list[str]]] = [[]]  # per phrase its pieces, and per piece its choices
    for i, piece in enumerate(_WILDCARD.split(line)):
        if i % 2:
            phrases[-1].append(piece.split("|"))
            continue
        first, *others = re.split("(?<=,)", piece)
        phrases[-1].append([first])
        phrases += [[[other]] for other in others]
    combined = [_combined(phrase) for phrase in phrases]
    texts = ("".join(one[i % len(one)] for one in combined) for i in range(max(map(len, combined))))
    return [text.replace(opening, "{").replace(closing, "}") for text in texts]


def _combined(pieces: list[list[str]]) -> list[str]:
    """A phrase with every combination of its wildcards; where these are many, of every two that are neighbours."""
    count = math.prod(map(len, pieces))
    if count <= COMBINATIONS:
        return ["".join(chosen) for chosen in product(*pieces)]
    texts = []
    lists = [i for i, piece in enumerate(pieces) if len(piece) > 1]
    for here, there in zip(lists, [*lists[1:], lists[0]], strict=True):
        first, second = len(pieces[here]), len(pieces[there])
        pairs = list(product(range(first), range(second))) if here != there and first * second <= PAIRS else []
        for a, b in [*pairs, *((i % first, i % second) for i in range(max(first, second)))]:
            taken = {here: a, there: b}
            texts.append("".join(p[taken.get(i, 0)] for i, p in enumerate(pieces)))
    return list(dict.fromkeys(texts))
