"""Lumina Image 2.0 (NextDiT): words and patches in one sequence, read by Gemma 2.

Each sample's words stand before its patches, without a gap: where the patches begin depends on how many words its
caption has, and what is behind the patches of a shorter sample is masked. Queries and keys both get rotary positions,
words by their place and patches by place, row and column, and three heads of queries share one of keys. The map is made
of what the block multiplies: rotated, the keys repeated. The refiners before the joint blocks see words or patches
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.families.rotary import rotated
from spf_plugin.seam import Call

# Where, of the depth of the stack, the layers of `last` lie: 13, 16 and 19 of 26. In diffusion transformers it is the
# middle that decides what is where, and the end that paints: its queries hold texture, its maps little of the words.
# A layer keeps 46 MB a sample at 1024 px in bf16 (the queries and keys of the whole sequence, the patches' once more
# with their positions): three keep 137, all 26 would keep 1190. Not measured on Lumina's own weights.
DEPTHS = (0.5, 0.625, 0.75)
_NOISY, _TIME, _HIDDEN, _MASK = ("x",), ("t",), ("cap_feats",), ("cap_mask",)


class Lumina:
    """`spf_plugin.families.base.Family`.

    Its text: Gemma's `hidden` `[B, T, E]` and `hidden_mask` `[B, T]`, padded behind.

    Its time runs from noise (0) to image (1), and it predicts `x0 - noise`. Here both are turned round, to what `Flow`
    has.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = None  # no published matrix from its VAE's latents to colours is known here: pictures are grey
    cross_attention = r"_layers_\d+_attention_"  # one projection makes the queries, keys and values of both

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and refines its words before them."""
        return hasattr(denoiser, "context_refiner") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        noisy, mask = call.part(0, *_NOISY), call.part(3, *_MASK)
        h, w = self.grid(0, (noisy.shape[-2], noisy.shape[-1]))
        lengths = mask.sum(dim=1).tolist()
        longest = max(lengths)
        patches = torch.stack([query[i, words : words + h * w] for i, words in enumerate(lengths)])
        patches = rotated(patches, self._turns(_patches(lengths, h, w, query.device)))
        words = rotated(key[:, :longest], self._turns(_words(len(lengths), longest, key.device)))
        words = words.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        words = F.pad(words, (0, 0, 0, 0, 0, mask.shape[1] - longest))  # masked: `text_mask`
        return patches.flatten(2), words.flatten(2)

    def _turns(self, ids: Tensor) -> Tensor:
        """Of positions `[B, N, 3]`, `[B, N, d / 2]`."""
        return self.denoiser.rope_embedder(ids)  # type: ignore[operator]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        patch = int(getattr(self.denoiser, "patch_size", 2))
        return size[0] // patch, size[1] // patch

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)

    def timesteps(self, call: Call) -> Tensor:
        return 1 - call.part(1, *_TIME).float()

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()

    def text(self, call: Call) -> Text:
        return {"hidden": call.part(2, *_HIDDEN), "hidden_mask": call.part(3, *_MASK)}

    def with_text(self, call: Call, text: Text) -> Call:
        cast = {name: text[name].to(part.device, part.dtype) for name, part in self.text(call).items()}
        return call.with_part(cast["hidden"], 2, *_HIDDEN).with_part(cast["hidden_mask"], 3, *_MASK)

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> Tensor:
        """The model leaves padding out of its sequence."""
        return call.part(3, *_MASK).bool()

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return -output

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return -prediction

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """Gemma's tokens behind `<bos>`; padding behind them, no end token."""
        return prompts.spans(prompt, tokenize, length - 1, lambda token: 1 + token, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the joint blocks: nearly all of the model."""
        return linear_layers_of(self.denoiser.layers)  # type: ignore[arg-type]


def _words(batch: int, count: int, device: torch.device) -> Tensor:
    """Where the words lie, `[B, count, 3]`."""
    ids = torch.zeros(batch, count, 3, dtype=torch.int32, device=device)
    ids[..., 0] = torch.arange(count, device=device)
    return ids


def _patches(lengths: Sequence[int], h: int, w: int, device: torch.device) -> Tensor:
    """Where the patches lie behind so many words: the place behind these, row, column; `[B, h w, 3]`."""
    ids = torch.zeros(len(lengths), h, w, 3, dtype=torch.int32, device=device)
    ids[..., 0] = torch.tensor(lengths, device=device)[:, None, None]
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return ids.flatten(1, 2)


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The attention of every joint block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "layers", ())):
        module = getattr(block, "attention", None)
        query, key = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        heads = int(getattr(module, "n_local_heads", 0))
        if query is not None and key is not None and heads > 0:
            yield Layer(f"layers.{i}.attention", heads, query, key)
