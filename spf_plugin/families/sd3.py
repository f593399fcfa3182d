"""Stable Diffusion 3 and 3.5: an MMDiT, in whose blocks the text and the image attend to one sequence of both.

The text is 77 positions of two CLIPs side by side, then T5's; so every phrase lies in it twice, and its attention is
that of both places. Positions are added to the image before the first block, nothing is rotated, and the queries and
keys that the norms give are those that the attention multiplies (SD3-Medium has no norms: identities stand in their
places). No mask reaches the attention, so padding is attended to as words are, here too. What the host drops of a text
is all 0: the comparison leaves it out, and the base prompt misses it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families import clip_tokens, latents
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.seam import Call

# Where, of the depth of the stack, the layers of `last` lie: 9, 12 and 15 of 24 (Medium), 14, 19 and 23 of 38 (Large).
# The blocks that tell the words apart lie before the last third (Seg4Diff, arXiv 2509.18096, looked at SD3's), and the
# very last one's text is not even read any more. In bf16 at 1024 px three keep 38 MB of queries a sample of 3.5-Medium
# (all 24: 302) and 60 of 3.5-Large; without norms, in SD3-Medium, three times as much, for a query is a part of what
# one layer gave for queries, keys and values. Not measured on the models' own weights.
DEPTHS = (0.375, 0.5, 0.625)
CLIP = clip_tokens.CHUNK + 2  # positions of the two CLIPs; T5's follow
SCALE = 1000.0  # the timestep that is pure noise
_NOISY, _TIMESTEPS, _POOLED, _CONTEXT = ("x",), ("t",), ("y",), ("context",)


class SD3:
    """`spf_plugin.families.base.Family`.

    Its text: `hidden` `[B, 77, E]` of CLIP-L and CLIP-G, channel by channel the same parts as `pooled` `[B, E]`, and
    `t5` `[B, S, E2]`. A part may be missing in a text that is put into a call: the call's own stays.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.SD3
    cross_attention = r"_joint_blocks_\d+_(x|context)_block_attn_"  # `attn2` of 3.5-Medium is the image's own

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has blocks of two streams that attend to each other."""
        return next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return query.flatten(-2), key.flatten(-2)  # [B, N, heads, d] of the image, [B, T, heads, d] of the text

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        patch = int(getattr(self.denoiser, "patch_size", 2))
        return size[0] // patch, size[1] // patch

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)

    def timesteps(self, call: Call) -> Tensor:
        return call.part(1, *_TIMESTEPS)

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow(SCALE)

    def text(self, call: Call) -> Text:
        context, pooled = call.part(3, *_CONTEXT), call.part(2, *_POOLED)
        return {"hidden": context[:, :CLIP, : pooled.shape[1]], "pooled": pooled, "t5": context[:, CLIP:]}

    def with_text(self, call: Call, text: Text) -> Call:
        """The host drops each encoder's part of a sample by itself: what the present text misses, the other misses."""
        like = self.text(call)
        new = {name: text[name].to(part.device, part.dtype) if name in text else part for name, part in like.items()}
        no_clip = ~like["hidden"].ne(0).any(1)  # [B, E]: CLIP-L's channels, CLIP-G's channels
        no_t5 = ~like["t5"].ne(0).flatten(1).any(1)
        hidden = F.pad(new["hidden"].masked_fill(no_clip[:, None], 0), (0, new["t5"].shape[2] - no_clip.shape[1]))
        context = torch.cat([hidden, new["t5"].masked_fill(no_t5[:, None, None], 0)], dim=1)
        call = call.with_part(context, 3, *_CONTEXT)
        return call.with_part(new["pooled"].masked_fill(no_clip, 0), 2, *_POOLED)

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1] + text["t5"].shape[1]

    def text_mask(self, call: Call) -> Tensor:
        return call.part(3, *_CONTEXT).ne(0).any(-1)

    def dropped(self, text: Text) -> Sequence[bool]:
        """Of a sample of which the host dropped every part, nothing is left."""
        return [not (clip or t5) for clip, t5 in zip(*(_said(text[name]) for name in ("hidden", "t5")), strict=True)]

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return output

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return prediction

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[..., Sequence[int]], length: int, *, full: bool) -> Spans:
        """CLIP's begin, tokens, end and padding, then T5's tokens, `</s>` and padding. What CLIP's positions have no
        room for may still be in T5's."""
        clip = clip_tokens.spans(prompt, tokenize, CLIP, full=full)
        t5 = prompts.spans(prompt, partial(tokenize, which=1), length - CLIP - 1, CLIP.__add__, full=full)
        return joined(clip, t5)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(self.denoiser.joint_blocks)  # type: ignore[arg-type]


def joined(clip: Spans, t5: Spans) -> Spans:
    """The spans of one prompt among CLIP's positions and among T5's behind them."""
    phrases = tuple(first + second for first, second in zip(clip.phrases, t5.phrases, strict=True))
    return Spans(phrases, clip.target + t5.target, t5.end, gap=tuple(range(clip.end, CLIP)))


def _said(part: Tensor) -> list[bool]:
    """Per sample, whether anything is left of a part of its text."""
    return part.ne(0).flatten(1).any(1).tolist()


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The joint attention of every block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "joint_blocks", ())):
        image = getattr(getattr(block, "x_block", None), "attn", None)
        text = getattr(getattr(block, "context_block", None), "attn", None)
        query, key, heads = getattr(image, "ln_q", None), getattr(text, "ln_k", None), getattr(image, "num_heads", 0)
        if query is not None and key is not None and heads > 0:
            yield Layer(f"joint_blocks.{i}", heads, query, key)
