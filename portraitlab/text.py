"""The tokenizer (CLIP's real byte-pair vocabulary) and the small CLIP text encoder of the embedded model."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from portraitlab import environment  # noqa: F401  (before transformers)

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77


def byte_symbols() -> list[str]:
    """The 256 printable symbols that stand for bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def bpe_path() -> Path:
    """The byte-pair file inside the installed open_clip package.

    Raises:
        FileNotFoundError: if open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / BPE_FILE).exists():
            return Path(folder) / BPE_FILE
    raise FileNotFoundError(f"{BPE_FILE} comes with the package open_clip_torch: pip install open_clip_torch")


def clip_merges(source: Path | None = None) -> list[str]:
    """The merge rules of CLIP's tokenizer, `"left right"`, in their order.

    Args:
        source: CLIP's byte-pair file; the one inside open_clip by default.
    """
    lines = gzip.decompress((source or bpe_path()).read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 49152 - 256 - 2 + 1]


def merges_for(words: Iterable[str], merges: Sequence[str]) -> list[str]:
    """Those of CLIP's merge rules that these words need: with them alone, they are cut up just as with all.

    Args:
        words: lower-case words without spaces.
        merges: every rule, in order.
    """
    rank = {tuple(rule.split()): i for i, rule in enumerate(merges)}
    needed: set[int] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [pair for pair in pairwise(parts) if pair in rank]
            if not pairs:
                break
            best = min(pairs, key=rank.__getitem__)
            needed.add(rank[best])
            joined: list[str] = []
            for part in parts:  # every occurrence, from the left
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
    return [merges[i] for i in sorted(needed)]


def save_tokenizer(folder: Path, merges: Sequence[str] | None = None) -> Any:
    """Write CLIP's tokenizer to `folder` in transformers' format and return it loaded.

    Args:
        folder: receives vocab.json, merges.txt and the configuration.
        merges: its merge rules; all of CLIP's by default.
    """
    from transformers import CLIPTokenizer

    merges = clip_merges() if merges is None else merges
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=END, model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")  # save_pretrained writes it indented, 0.2 MB longer
    return tokenizer


def build_text_encoder(width: int = 64, layers: int = 2) -> Any:
    """A fresh `CLIPTextModel` over CLIP's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token ids int64 `[N, 77]`, padded with the end token as Stable Diffusion 1 does."""
    ids: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
