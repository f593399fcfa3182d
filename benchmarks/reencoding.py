"""How far an encoding in bf16 is from another of the same caption: `python -m benchmarks.reencoding`.

With cached text, sd-scripts' SDXL script trains on encodings that were made once, and SPF encodes the base prompts
itself and some of the captions anew. In bf16 the same caption comes out otherwise where the weights are rounded (bf16
weights) than where the products are (float32 weights under autocast).

The embedded model's text encoder, its last but one layer as SDXL reads it; each
difference as a share of what a caption changes (its distance to the empty prompt), at the worst of its tokens as
`cached_text.by_encoding` looks at them, and in the mean. Beside it what another caption is.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from portraitlab.captions import describe
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.portraits import BASE_RATES, sample_person
from spf_plugin.hosts.kohya.cached_text import ANOTHER_CAPTION

CAPTIONS, SEED = 32, 77
ANOTHER = "float32, the caption without the hair colour"


@torch.no_grad()
def encoded(encoder: nn.Module, ids: Tensor, *, batch: int, autocast: bool) -> Tensor:
    """Hidden states `[N, 77, E]`, float32, of the last but one layer."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = [encoder(part, output_hidden_states=True).hidden_states[-2].float() for part in ids.split(batch)]
    return torch.cat(parts)


def apart(one: Tensor, other: Tensor, empty: Tensor) -> tuple[float, float]:
    """The worst token and the mean one, as shares of a caption's distance to the empty prompt; over all captions."""
    difference = (one - other).norm(dim=-1)
    scale = (other - empty).norm(dim=-1).mean(dim=-1, keepdim=True)
    share = difference / scale
    return float(share.max()), float(share.mean())


def measured(count: int = CAPTIONS) -> dict[str, tuple[float, float]]:
    """Each way of encoding `count` captions, against bf16 weights and one caption at a time: worst token, and mean."""
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")
    plain = CLIPTextModel.from_pretrained(MODEL_FOLDER / "text_encoder").eval()
    small = copy.deepcopy(plain).to(torch.bfloat16)
    rng = np.random.default_rng(SEED)
    persons = [sample_person(rng, BASE_RATES) for _ in range(count)]
    topics = ("hair", "expression", "clothes", "background")
    texts = [[describe(p, topics) for p in persons], [describe(p, topics[1:]) for p in persons], [""]]
    full, fewer, nothing = (
        tokenizer(part, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for part in texts
    )
    cached = encoded(small, full, batch=1, autocast=False)
    empty = encoded(plain, nothing, batch=1, autocast=False)
    others = {
        "bf16 weights, in batches of 8": encoded(small, full, batch=8, autocast=False),
        "float32 weights under bf16 autocast": encoded(plain, full, batch=1, autocast=True),
        "float32": encoded(plain, full, batch=1, autocast=False),
        ANOTHER: encoded(plain, fewer, batch=1, autocast=False),
    }
    return {name: apart(other, cached, empty) for name, other in others.items()}


def main() -> None:
    table = Table(title="bf16 weights, one caption at a time, against")
    table.add_column("")
    table.add_column("worst token", justify="right")
    table.add_column("mean", justify="right")
    for name, (worst, mean) in measured().items():
        table.add_row(name, f"{worst:.3f}", f"{mean:.4f}")
    table.add_row("taken for another caption from", f"{ANOTHER_CAPTION:g}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
