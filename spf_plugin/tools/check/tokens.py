"""The text encoder's tokenizer, if it lies on this machine; else an estimate. Nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans, strip_weights

_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")
_LETTERS_PER_TOKEN = 7  # long words are several tokens
_HUB_MODELS = ("openai/clip-vit-large-patch14",)


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens.

    Attributes:
        tokenize: text -> token ids without BOS and EOS.
        source: the folder it came from; empty for an estimate.
        begin: position of a caption's first token.
    """

    tokenize: Callable[[str], Sequence[int]]
    source: str = ""
    begin: int = 1

    @property
    def estimated(self) -> bool:
        return not self.source

    def spans(self, prompt: Prompt, limit: int, *, full: bool) -> Spans:
        """Where the phrases of a prompt lie in the text encoder's sequence, of which `limit` tokens are text."""
        return prompts.spans(prompt, self.tokenize, limit, lambda token: token + self.begin, full=full)


def estimate(text: str) -> list[int]:
    """Roughly as many tokens as CLIP would make: one a word, more for long words, one a letter for other scripts."""
    ids: list[int] = []
    for piece in _PIECES.findall(text):
        count = -(-len(piece) // _LETTERS_PER_TOKEN) if piece.isascii() else 2 * len(piece)
        ids += [0] * count
    return ids


def hub_snapshots(name: str) -> list[Path]:
    """Where the hub's cache holds a model of this name."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return _within(hub / f"models--{name.replace('/', '--')}" / "snapshots")


def _within(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing where there is none, or no folder can be called so."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError):
        return []


def folders(model: str | None = None, cache: str | None = None) -> Iterator[Path]:
    """Where a CLIP tokenizer may lie: beside the model, in the host's cache, in the hub's, in this repository.

    Args:
        model: `pretrained_model_name_or_path`.
        cache: `tokenizer_cache_dir`.
    """
    if model and os.path.isdir(model):
        yield from (Path(model) / "tokenizer", Path(model))
    if cache:
        yield from _within(Path(cache))
    for name in [*([model] if model and "/" in model and not os.path.exists(model) else []), *_HUB_MODELS]:
        for snapshot in hub_snapshots(name):
            yield from (snapshot / "tokenizer", snapshot)
    yield Path(__file__).parents[3] / "portraitlab" / "model" / "tokenizer"


@cache
def _load(folder: Path, *, clip: bool) -> Callable[[str], Sequence[int]]:
    from transformers import AutoTokenizer, CLIPTokenizer

    loaded = (CLIPTokenizer if clip else AutoTokenizer).from_pretrained(folder, local_files_only=True)

    def tokenize(text: str) -> Sequence[int]:
        return loaded(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    return tokenize


def find(candidates: Iterable[Path], *, weighted: bool, clip: bool = True) -> Tokenizer:
    """The first tokenizer of these folders, or an estimate.

    Args:
        candidates: see `folders`.
        weighted: the host reads attention weights, `(hair:1.2)`, so their signs are no tokens.
        clip: it is CLIP's, which puts a token before the caption; else any, and a caption begins at 0, behind whatever
            the trainer puts before it.
    """
    tokenize: Callable[[str], Sequence[int]] = estimate
    source = ""
    kinds = (("vocab.json", "merges.txt"),) if clip else (("tokenizer.json",), ("spiece.model",), ("tokenizer.model",))
    folder = next(
        (f for f in candidates if any(all(os.path.isfile(f / name) for name in names) for names in kinds)), None
    )
    if folder is not None:
        try:
            tokenize, source = _load(folder, clip=clip), str(folder)
        except Exception:  # a broken transformers must not keep the rest of the check from running
            tokenize, source = estimate, ""
    if not weighted:
        return Tokenizer(tokenize, source, int(clip))
    return Tokenizer(lambda text: tokenize(strip_weights(text)), source, int(clip))
