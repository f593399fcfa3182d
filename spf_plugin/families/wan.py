"""Wan 2.1 and 2.2, text to video: pictures and clips, the words read by UMT5.

Image and text meet in a cross-attention of every block, without rotary positions; its queries and keys are normed over
all heads at once, and compared as a UNet's are. Behind a prompt's words are zeros, 512 positions in all, of which a
projection makes the same key, and the blocks attend to them like to words. They say nothing: the comparison leaves them
out.

A clip `[B, C, F, h, w]` is compared as its frames one above the other, `[B, C, F h, w]`: one picture to everything that
looks at a place by itself, so the losses, the pictures of a run and the scale of the map need not know of time. The map
is that of each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families import latents
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.seam import Call

# Where, of the depth of the stack, the layers of `last` lie: 20, 25 and 30 of 40 (14B), 15, 18 and 22 of 30 (1.3B). In
# diffusion transformers it is the middle that decides what is where, and the end that paints: its queries hold texture,
# its maps little of the words. In bf16 three of 14B keep 48 MB of queries for a picture of 480 x 832, and a clip of 81
# such frames, which are 21 to the model, 1 GB. Not measured on Wan's own weights.
DEPTHS = (0.5, 0.625, 0.75)
WORDS = 512  # what the model fills its text up to
SCALE = 1000.0  # the timestep that is pure noise
_NOISY, _TIMESTEPS, _CONTEXT = ("x",), ("t",), ("context",)


class Wan:
    """`spf_plugin.families.base.Family`.

    Its text: UMT5's `hidden` `[B, S, E]` and `hidden_mask` `[B, S]`, padded behind; the call has a list of the words
    alone. T is what the model fills up to.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.WAN
    cross_attention = r"_blocks_\d+_cross_attn_"

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and fills its text up."""
        return hasattr(denoiser, "text_len") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return query, key[:, : max(map(len, call.part(2, *_CONTEXT)))]  # [B, F N, C], [B, 512, C]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        _, rows, columns = self.denoiser.patch_size  # type: ignore[misc]
        return size[0] // int(rows), size[1] // int(columns)

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return call.part(0, *_NOISY).shape[2]

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY).flatten(2, 3)

    def timesteps(self, call: Call) -> Tensor:
        return call.part(1, *_TIMESTEPS)

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow(SCALE)

    def text(self, call: Call) -> Text:
        context: list[Tensor] = call.part(2, *_CONTEXT)
        hidden = pad_sequence(context, batch_first=True)
        lengths = torch.tensor([len(words) for words in context], device=hidden.device)
        return {
            "hidden": hidden,
            "hidden_mask": torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None],
        }

    def with_text(self, call: Call, text: Text) -> Call:
        like = call.part(2, *_CONTEXT)[0]
        lengths = text["hidden_mask"].sum(dim=1).tolist()
        words = [
            hidden[: int(length)].to(like.device, like.dtype)
            for hidden, length in zip(text["hidden"], lengths, strict=True)
        ]
        return call.with_part(words, 2, *_CONTEXT)

    def length(self, text: Text) -> int:
        return WORDS

    def text_mask(self, call: Call) -> Tensor:
        context = call.part(2, *_CONTEXT)
        lengths = torch.tensor([len(words) for words in context], device=context[0].device)
        return torch.arange(WORDS, device=lengths.device) < lengths[:, None]

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Sequence[Tensor], call: Call) -> Tensor:
        return torch.stack(list(output)).flatten(2, 3)  # of each sample [C, F, h, w]

    def output(self, like: Any, prediction: Tensor, call: Call) -> list[Tensor]:
        return list(prediction.unflatten(2, (self.frames(call), -1)))

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """UMT5's tokens from position 0 on, `</s>` behind them (also where the rest is cut off), and zeros."""
        return prompts.spans(prompt, tokenize, length - 1, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(self.denoiser.blocks)  # type: ignore[arg-type]


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The cross-attention of every block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "blocks", None) or ()):
        module = getattr(block, "cross_attn", None)
        query, key = getattr(module, "norm_q", None), getattr(module, "norm_k", None)
        heads = int(getattr(module, "num_heads", 0))
        if query is not None and key is not None and heads > 0:
            yield Layer(f"blocks.{i}.cross_attn", heads, query, key)
