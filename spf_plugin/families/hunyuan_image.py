"""HunyuanImage 2.1: patches and words in one sequence, the words read by Qwen2.5-VL, and by byT5 what is quoted.

The patches stand before the words. Of each sample these are byT5's bytes of whatever the prompt has in quotation marks,
then Qwen's tokens, without a gap, then padding; the sequence is cut behind the longest. Only patches have rotary
positions. Blocks of two streams have queries and keys of their own for either, those of one stream a module for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Kind, Piece, Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.families.rotary import rotated
from spf_plugin.seam import Call

# Where, of the depth of the blocks of two streams, the layers of `last` lie: 10, 12 and 15 of 20. In these blocks words
# have keys of their own; in the 40 of one stream, which paint, words and patches share every weight, and a block would
# keep the keys of the whole sequence too. Three keep 176 MB a sample at 2048 px in bf16 (the queries, once more with
# their positions), all 60 would keep 4.8 GB. Not measured on HunyuanImage's own weights.
DEPTHS = (0.5, 0.625, 0.75)
GLYPHS, WORDS = 128, 1024  # the most tokens of byT5 and of Qwen; the template before the prompt is not among them
_NOISY, _TIME = ("hidden_states",), ("timestep",)
_PARTS = {
    "hidden": (2, "text_states"),
    "hidden_mask": (3, "encoder_attention_mask"),
    "glyphs": (4, "byt5_text_states"),
    "glyphs_mask": (5, "byt5_text_mask"),
}
# What is read as glyphs, in this order, and what is written around it for byT5; `</s>` behind all.
_QUOTED = tuple(map(re.compile, (r'"(.*?)"', "\u2018(.*?)\u2019", "\u201c(.*?)\u201d")))
_BEFORE, _BEHIND = len('Text "'), len('". ')


class HunyuanImage:
    """`spf_plugin.families.base.Family`.

    Its text: Qwen's `hidden` `[B, S, E]` and `hidden_mask` `[B, S]`; byT5's `glyphs` `[B, 128, E2]` and `glyphs_mask`
    `[B, 128]`. S is that of the batch's longest prompt; T is the most that there may be of both.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = None  # no published matrix from its VAE's latents to colours is known here: pictures are grey
    # The projections of one stream are shared with the MLP, and cannot be told apart by name.
    cross_attention = r"_double_blocks_\d+_(?:img|txt)_attn_|_single_blocks_\d+_linear"

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and a way in for byT5."""
        return hasattr(denoiser, "byt5_in") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        double = [layer for layer in layers if layer.name.startswith("double")]
        return chosen(layers, which, at_depths(double, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        h, w = call.part(0, *_NOISY).shape[-2:]
        cos, sin = self.denoiser.get_rotary_pos_embed((h, w))  # type: ignore[operator]
        turns = torch.complex(cos[:, ::2], sin[:, ::2])[None].to(query.device)  # each stands there twice, [N, d]
        longest = int(self._counts(call).max())
        patches = rotated(query[:, : h * w], turns)
        return patches.flatten(2), key[:, key.shape[1] - longest :].flatten(2)

    def _counts(self, call: Call) -> Tensor:
        """Words and bytes of each sample, `[B]`."""
        text = self.text(call)
        return (text["hidden_mask"].sum(dim=1) + text["glyphs_mask"].sum(dim=1)).long()

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size  # a patch is one latent, of 32 x 32 pixels

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)

    def timesteps(self, call: Call) -> Tensor:
        return call.part(1, *_TIME)

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow(1000.0)

    def text(self, call: Call) -> Text:
        return {name: call.part(*place) for name, place in _PARTS.items()}

    def with_text(self, call: Call, text: Text) -> Call:
        for name, part in self.text(call).items():
            call = call.with_part(text[name].to(part.device, part.dtype), *_PARTS[name])
        return call

    def length(self, text: Text) -> int:
        return GLYPHS + WORDS

    def text_mask(self, call: Call) -> Tensor:
        """The model masks its padding, too."""
        counts = self._counts(call)
        return torch.arange(GLYPHS + WORDS, device=counts.device) < counts[:, None]

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return output

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return prediction

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """What is quoted, a position a byte, then Qwen's tokens, then the end of the template. A phrase that is quoted
        lies in both."""
        pieces = [piece for piece in prompt.pieces if (piece.in_full if full else piece.in_base)]
        bytes_, count = _glyphs(pieces)
        found = prompts.spans(prompt, tokenize, WORDS, lambda token: count + token, full=full)
        phrases, target = [list[int]() for _ in found.phrases], list[int]()
        for position, piece in bytes_:
            if piece.kind is Kind.TARGET:
                target.append(position)
            elif piece.phrase >= 0:
                phrases[piece.phrase].append(position)
        return Spans(
            tuple((*ours, *theirs) for ours, theirs in zip(phrases, found.phrases, strict=True)),
            (*target, *found.target),
            found.end,
        )

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model."""
        return linear_layers_of(self.denoiser.double_blocks, self.denoiser.single_blocks)  # type: ignore[arg-type]


def _glyphs(pieces: Sequence[Piece]) -> tuple[list[tuple[int, Piece]], int]:
    """Where each quoted byte lies among byT5's tokens, with the piece that it is of, and how many tokens there are."""
    owners = [piece for piece in pieces for _ in piece.text]
    text = "".join(piece.text for piece in pieces)
    found: list[tuple[int, Piece]] = []
    place = 0
    for quoted in (match for pattern in _QUOTED for match in pattern.finditer(text)):
        place += _BEFORE
        for char, piece in zip(quoted[1], owners[quoted.start(1) :], strict=False):
            size = len(char.encode())
            found += [(i, piece) for i in range(place, place + size) if i < GLYPHS - 1]
            place += size
        place += _BEHIND
    return found, min(place, GLYPHS - 1) + 1 if place else 0


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The attention of every block, in the model's order."""
    for stack, query_name, key_name in (
        ("double_blocks", "img_attn_q_norm", "txt_attn_k_norm"),
        ("single_blocks", "q_norm", "k_norm"),
    ):
        for i, block in enumerate(getattr(denoiser, stack, ())):
            query, key = getattr(block, query_name, None), getattr(block, key_name, None)
            if query is not None and key is not None:
                yield Layer(f"{stack}.{i}", int(block.heads_num), query, key)
