"""What sd-scripts makes of a caption file before it encodes it: `process_caption`, with every choice of a wildcard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

VARIANTS = 32  # wildcard choices looked at, per caption
_WILDCARD = re.compile(r"\{([^{}]+)\}")


def shuffled(subset: Any) -> bool:
    """Whether the host takes the captions of a subset apart."""
    return bool(
        getattr(subset, "shuffle_caption", False)
        or getattr(subset, "token_warmup_step", 0) > 0
        or getattr(subset, "caption_tag_dropout_rate", 0) > 0
    )


def prompts(caption: str, subset: Any) -> tuple[str, ...]:
    """`process_caption` of the host, with every choice of a wildcard in place of a random one.

    Args:
        caption: the content of a caption file.
        subset: the host's, or anything with (some of) its attributes.

    Returns:
        What the text encoder may be given, without shuffling and dropout; more than one only with wildcards.
    """

    def option(name: str) -> Any:
        return getattr(subset, name, None)

    if option("caption_prefix"):
        caption = subset.caption_prefix + " " + caption
    if option("caption_suffix"):
        caption = caption + " " + subset.caption_suffix
    if option("enable_wildcard"):
        variants = [text for line in caption.split("\n") for text in _choices(line)][:VARIANTS]
    else:
        variants = [caption.split("\n")[0]]
    separator = option("caption_separator") or ","
    if option("secondary_separator"):
        variants = [v.replace(subset.secondary_separator, separator) for v in variants]
    if option("keep_tokens_separator") and shuffled(subset):
        joined = f"{separator} "
        variants = [joined.join(p.strip() for p in v.split(subset.keep_tokens_separator, 2)) for v in variants]
    return tuple(dict.fromkeys(variants))


def _choices(line: str) -> Iterator[str]:
    parts = re.split(r"(\{\{|\}\}|\{[^{}]+\})", line)
    options = [
        [p[0]] if p in ("{{", "}}") else p[1:-1].split("|") if _WILDCARD.fullmatch(p) else [p] for p in parts if p
    ]
    for count, chosen in enumerate(product(*options)):
        if count == VARIANTS:
            return
        yield "".join(chosen)
