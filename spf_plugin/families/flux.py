"""FLUX.1 (dev and schnell) and Chroma: words and patches in one sequence, attending to each other.

First come blocks in which text and image have weights of their own (double), then blocks in which they share them
(single). Every block attends over the whole sequence; what is compared is the part of it that leads from patches to
words. Queries and keys are taken behind their norms, and the queries are turned by the rotary positions as the block
does it: words all stand at position 0, where the rotation is none. FLUX puts the text first, Chroma the image, and
Chroma cuts each sample's text behind its first padding token, where FLUX attends to padding unless the host masks it.

The denoiser takes and gives packed latents, `[B, N, 4 C]`: patches of 2 x 2, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families import latents, streams
from spf_plugin.families.base import Layer, Text, linear_layers_of
from spf_plugin.families.patches import packed, unpacked
from spf_plugin.families.rotary import turned
from spf_plugin.families.streams import DOUBLE, SINGLE
from spf_plugin.seam import Call

PATCH = 2
# Where, of the depth of the double blocks, the layers of `last` lie: 10, 14 and 18 of 19. There words still have keys
# of their own, which in the single blocks are mixed with the image; and of the double blocks the later half knows what
# is where (ConceptAttention, arXiv 2502.04320, takes 10 to 18). At 1024 px in bf16 a layer keeps 25 MB of queries a
# sample, these three 75 MB, all 57 would keep 1.4 GB. Not measured on FLUX's or Chroma's own weights.
DEPTHS = (0.55, 0.75, 0.95)
_NOISY, _IDS, _TIMESTEPS, _HIDDEN, _MASK = "img", "img_ids", "timesteps", "txt", "txt_attention_mask"


@dataclass(frozen=True)
class _Kind:
    """How the two models differ.

    Attributes:
        text: our names of what depends on the prompt, and the model's.
        image_first: in the sequence.
        padding: how many padding tokens each sample keeps; None where the mask is all that counts.
    """

    text: Mapping[str, str]
    image_first: bool
    padding: int | None


_FLUX = _Kind({"hidden": _HIDDEN, "pooled": "y", "hidden_mask": _MASK}, image_first=False, padding=None)
_CHROMA = _Kind({"hidden": _HIDDEN, "hidden_mask": _MASK}, image_first=True, padding=1)


class Flux:
    """`spf_plugin.families.base.Family`.

    Its text: `hidden` `[B, T, E]` of T5; `pooled` `[B, E2]` of CLIP-L, which Chroma has not; `hidden_mask` `[B, T]`,
    where the host masks padding, as it always does with Chroma.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.FLUX
    cross_attention = streams.CROSS_ATTENTION

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        # Chroma has a network that makes all modulation, of timestep and guidance alone, in place of CLIP's vector.
        self._kind = _CHROMA if hasattr(denoiser, "distilled_guidance_layer") else _FLUX

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such double blocks, and rotary positions from ids."""
        return hasattr(denoiser, "pe_embedder") and next(streams.attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        return streams.layers(self.denoiser, which, DEPTHS)

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        ids, length = call.kwargs[_IDS].detach(), call.kwargs[_HIDDEN].shape[1]
        patches = ids.shape[1]
        if self._kind.image_first:
            query = query[:, :, :patches]
            key = key[:, :, patches:] if layer.name.startswith(SINGLE) else key
            key = F.pad(key, (0, 0, 0, length - key.shape[2]))  # what the model has cut off is masked here
        else:
            query, key = query[:, :, -patches:], key[:, :, :length]
        query = turned(query, self.denoiser.pe_embedder(ids))  # type: ignore[operator]
        return query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)  # [B, heads, N, d]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // PATCH, size[1] // PATCH

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return unpacked(call.kwargs[_NOISY], call.kwargs[_IDS], PATCH)

    def timesteps(self, call: Call) -> Tensor:
        return call.kwargs[_TIMESTEPS]

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()  # timesteps are in [0, 1]

    def text(self, call: Call) -> Text:
        parts = {name: call.kwargs.get(theirs) for name, theirs in self._kind.text.items()}
        return {name: part for name, part in parts.items() if part is not None}

    def with_text(self, call: Call, text: Text) -> Call:
        """What `text` leaves out stays: of two text encoders one may be trained alone. The text's position ids are
        those of any prompt, and so is Chroma's modulation."""
        cast = {
            self._kind.text[name]: text[name].to(part.device, part.dtype)
            for name, part in self.text(call).items()
            if name in text
        }
        return Call(call.args, {**call.kwargs, **cast})

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> Tensor | None:
        """As the blocks mask it. Without a mask FLUX attends to T5's padding, which then holds what T5 put there."""
        mask = call.kwargs.get(_MASK)
        if mask is None:
            return None
        if self._kind.padding is None:
            return mask.bool()
        kept = mask.sum(dim=1, keepdim=True) + self._kind.padding
        return torch.arange(mask.shape[1], device=mask.device) < kept

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()  # the loop says it of its captions; it drops none from cached text

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return unpacked(output, call.kwargs[_IDS], PATCH)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return packed(prediction, PATCH)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """T5's tokens from position 0 on, `</s>` behind them (also where the rest is cut off), and padding."""
        return prompts.spans(prompt, tokenize, length - 1, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(*(getattr(self.denoiser, stack) for stack in (DOUBLE, SINGLE)))
