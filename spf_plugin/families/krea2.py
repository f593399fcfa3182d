"""Krea 2: patches and words in one sequence, the words read by Qwen3-VL.

The patches come first, then the words, then padding, which the blocks mask. Of each word the model gets the states of
twelve layers of the language model, and makes one of them itself. Four heads of queries share one of keys. Words all
stand at position 0, where the rotation is none: queries of patches alone are turned.

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
from spf_plugin.families.patches import packed, unpacked
from spf_plugin.families.rotary import turned
from spf_plugin.seam import Call

PATCH = 2
# Where, of the depth of the stack, the layers of `last` lie: 14, 17 and 21 of 28. In diffusion transformers it is the
# middle that decides what is where, and the end that paints: its queries hold texture, its maps little of the words. At
# 1024 px in bf16 a layer keeps 120 MB a sample (the queries of the whole sequence, the patches' once more with their
# positions, and the keys), three 360 MB; all 28 would keep 3.4 GB. Not measured on Krea 2's own weights.
DEPTHS = (0.5, 0.625, 0.75)
WORDS, BEHIND = 512, 5  # the most tokens of a prompt and what the template has behind it, and how many the latter are
_NOISY, _HIDDEN, _TIME, _IDS, _MASK = "img", "context", "t", "pos", "mask"


class Krea2:
    """`spf_plugin.families.base.Family`.

    Its text: Qwen3-VL's `hidden` `[B, S, layers, E]` and `hidden_mask` `[B, S]`, padded behind: the prompt, and what
    the template of a chat has behind it. S is that of the batch's longest prompt; T is the most that there may be.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.WAN
    cross_attention = r"(?<!layerwise)(?<!refiner)_blocks_\d+_attn_"  # what makes one state of twelve has blocks, too

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and fuses the layers of its text before them."""
        return hasattr(denoiser, "txtfusion") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        ids, mask = self._patch_ids(call), self._word_mask(call)
        patches, longest = ids.shape[1], int(mask.sum(dim=1).max())
        matrices = self.denoiser.posemb(ids).unsqueeze(1)  # type: ignore[operator]
        query, key = turned(query[:, :, :patches], matrices), key[:, :, patches : patches + longest]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)  # [B, heads, N, d]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // PATCH, size[1] // PATCH

    # -- calls ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _patch_ids(call: Call) -> Tensor:
        return call.kwargs[_IDS][:, : call.kwargs[_NOISY].shape[1]].detach()

    @staticmethod
    def _word_mask(call: Call) -> Tensor:
        return call.kwargs[_MASK][:, call.kwargs[_NOISY].shape[1] :]

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return unpacked(call.kwargs[_NOISY], self._patch_ids(call), PATCH)

    def timesteps(self, call: Call) -> Tensor:
        return call.kwargs[_TIME]

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()  # timesteps are in [0, 1]

    def text(self, call: Call) -> Text:
        return {"hidden": call.kwargs[_HIDDEN], "hidden_mask": self._word_mask(call)}

    def with_text(self, call: Call, text: Text) -> Call:
        """Also with a longer or shorter one: ids and mask are those of the patches, and the text's behind them."""
        hidden, mask = (text[name].to(part.device, part.dtype) for name, part in self.text(call).items())
        ids, patches = call.kwargs[_IDS], call.kwargs[_NOISY].shape[1]
        ids = F.pad(ids[:, :patches], (0, 0, 0, hidden.shape[1]))
        mask = torch.cat([call.kwargs[_MASK][:, :patches], mask], dim=1)
        return Call(call.args, {**call.kwargs, _HIDDEN: hidden, _IDS: ids, _MASK: mask})

    def length(self, text: Text) -> int:
        return WORDS

    def text_mask(self, call: Call) -> Tensor:
        """The model masks its padding, too."""
        counts = self._word_mask(call).sum(dim=1, keepdim=True)
        return torch.arange(WORDS, device=counts.device) < counts

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return unpacked(output, self._patch_ids(call), PATCH)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return packed(prediction, PATCH)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """Qwen's tokens from position 0 on, the rest of the template behind them (also where the prompt is cut off),
        and padding. What the template has before the prompt is no part of the sequence."""
        return prompts.spans(prompt, tokenize, length - BEHIND, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the joint blocks: nearly all of the model."""
        return linear_layers_of(self.denoiser.blocks)  # type: ignore[arg-type]


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The attention of every joint block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "blocks", ())):
        module = getattr(block, "attn", None)
        norm, heads = getattr(module, "qknorm", None), int(getattr(module, "heads", 0))
        query, key = getattr(norm, "qnorm", None), getattr(norm, "knorm", None)
        if query is not None and key is not None and heads > 0:
            yield Layer(f"blocks.{i}.attn", heads, query, key)
