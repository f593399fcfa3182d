"""Qwen-Image: patches and words attending to each other in sixty blocks of two streams, the words read by Qwen2.5-VL.

In every block each of the two has weights of its own. The patches stand before the words, and both have rotary
positions: patches by row and column, counted from the picture's middle, words by their place behind the farthest patch.
The map is made of what the block multiplies: both turned. Padding behind a shorter sample's words is masked.

The denoiser takes and gives packed latents, `[B, N, 4 C]`: patches of 2 x 2, row by row.
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
from spf_plugin.families import latents
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.families.rotary import rotated
from spf_plugin.seam import Call

PATCH = 2
WORDS = 1024  # the most tokens of a prompt; the template before it is not among them, and is dropped
# Where, of the depth of the stack, the layers of `last` lie: 30, 37 and 45 of 60. In diffusion transformers it is the
# middle that decides what is where, and the end that paints: its queries hold texture, its maps little of the words.
# A layer keeps 25 MB of queries a sample at 1024 px in bf16, and as much once more with their positions: three keep 151
# MB, all 60 would keep 3 GB. Not measured on Qwen-Image's own weights.
DEPTHS = (0.5, 0.625, 0.75)
_NOISY, _HIDDEN, _MASK, _TIME = "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep"
_SHAPES, _LENGTHS = "img_shapes", "txt_seq_lens"


class QwenImage:
    """`spf_plugin.families.base.Family`.

    Its text: Qwen's `hidden` `[B, S, E]` and `hidden_mask` `[B, S]`, padded behind. S is that of the batch's longest
    prompt; T is the most that there may be.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.WAN  # its VAE is Wan's, with another decoder
    cross_attention = r"_transformer_blocks_\d+_attn_"

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and rotary positions from the picture's shape."""
        return hasattr(denoiser, "pos_embed") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        patches, words = self.denoiser.pos_embed(  # type: ignore[operator]
            call.kwargs[_SHAPES], call.kwargs[_LENGTHS], device=query.device
        )
        return rotated(query, patches[None]).flatten(2), rotated(key, words[None]).flatten(2)  # [B, N, heads, d]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // PATCH, size[1] // PATCH

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return _unpacked(call.kwargs[_NOISY], call)

    def timesteps(self, call: Call) -> Tensor:
        return call.kwargs[_TIME]

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()  # timesteps are in [0, 1]

    def text(self, call: Call) -> Text:
        hidden = call.kwargs[_HIDDEN]
        return {"hidden": hidden, "hidden_mask": _mask(call.kwargs[_LENGTHS], hidden.shape[1], hidden.device)}

    def with_text(self, call: Call, text: Text) -> Call:
        """Padded to the longest, as the model wants it; where the loop gives no mask, every sample attends to its own
        length, or there is one sample."""
        like, lengths = call.kwargs[_HIDDEN], _lengths(text["hidden_mask"])
        hidden = text["hidden"][:, : max(lengths)].to(like.device, like.dtype)
        new = {_HIDDEN: hidden, _LENGTHS: lengths}
        if (mask := call.kwargs.get(_MASK)) is not None:
            new[_MASK] = _mask(lengths, hidden.shape[1], mask.device).to(mask.dtype)
        return Call(call.args, {**call.kwargs, **new})

    def length(self, text: Text) -> int:
        return WORDS

    def text_mask(self, call: Call) -> Tensor:
        """The model masks its padding, too."""
        return _mask(call.kwargs[_LENGTHS], WORDS, call.kwargs[_HIDDEN].device)

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return _unpacked(output, call)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return F.pixel_unshuffle(prediction, PATCH).flatten(2).transpose(1, 2)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """Qwen's tokens from position 0 on, then the end of the template (where the prompt leaves it room)."""
        return prompts.spans(prompt, tokenize, length, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(self.denoiser.transformer_blocks)  # type: ignore[arg-type]


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The joint attention of every block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "transformer_blocks", None) or ()):
        module = getattr(block, "attn", None)
        query, key = getattr(module, "norm_q", None), getattr(module, "norm_added_k", None)
        heads = int(getattr(module, "heads", 0))
        if query is not None and key is not None and heads > 0:
            yield Layer(f"transformer_blocks.{i}.attn", heads, query, key)


def _lengths(mask: Tensor) -> list[int]:
    """Of each sample's words; never none, which the model's positions do not know."""
    return [max(int(length), 1) for length in mask.sum(dim=1).tolist()]


def _mask(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """`[B, longest]` bool."""
    return torch.arange(longest, device=device) < torch.tensor(list(lengths), device=device)[:, None]


def _unpacked(patches: Tensor, call: Call) -> Tensor:
    """`[B, N, 4 C]` -> `[B, C, h, w]`, on the grid of the call's picture."""
    _, h, w = call.kwargs[_SHAPES][0][0]
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (h, w)), PATCH)
