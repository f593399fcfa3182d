"""FLUX.2 (dev, klein 4B and 9B): words and patches in one sequence, the words read by a language model.

The blocks are FLUX.1's: double, then single, the text before the image. A patch is one latent, of 16 x 16 pixels. Here
words have rotary positions, too, so both queries and keys are turned as the blocks do it. The text is Mistral's (dev)
or Qwen3's (klein): a prompt in the template of a chat, padded to 512 positions, to all of which the blocks attend.
Mistral's padding stands before the template, Qwen3's behind it.

The denoiser takes and gives packed latents, `[B, N, C]`, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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

PATCH = 1
# Where, of the depth of the double blocks, the layers of `last` lie: 4, 6 and 7 of 8, or 2, 3 and 4 of klein 4B's 5. As
# FLUX.1's: there words still have keys of their own. At 1024 px in bf16 a layer keeps 107 MB a sample of dev (the
# patches' queries, once more with their positions, and the words' keys, twice too), three 320 MB; all 56 would keep
# 6.2 GB. Not measured on FLUX.2's own weights.
DEPTHS = (0.55, 0.75, 0.95)
BEHIND = 1  # tokens of Mistral's template behind the prompt: [/INST]
_NOISY, _IDS, _TIMESTEPS, _HIDDEN, _HIDDEN_IDS = "x", "x_ids", "timesteps", "ctx", "ctx_ids"


class Flux2:
    """`spf_plugin.families.base.Family`.

    Its text: `hidden` `[B, T, E]`, the states of three layers of Mistral or Qwen3 beside each other. The host's
    `prefix` is what the template has before the prompt, marks and system prompt included; to `tokenize` a mark is one
    token.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = latents.FLUX2
    cross_attention = streams.CROSS_ATTENTION

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        # Only dev was distilled with a guidance that it takes, and only dev is read by Mistral.
        self._padded_before = bool(getattr(denoiser, "use_guidance_embed", False))

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and one modulation for all of a kind, as FLUX.1 has not."""
        shared = hasattr(denoiser, "double_stream_modulation_img")
        return shared and next(streams.attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        return streams.layers(self.denoiser, which, DEPTHS)

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        patches, words = call.kwargs[_IDS].detach(), call.kwargs[_HIDDEN_IDS].detach()
        query, key = query[:, :, -patches.shape[1] :], key[:, :, : words.shape[1]]
        query = turned(query, self.denoiser.pe_embedder(patches))  # type: ignore[operator]
        key = turned(key, self.denoiser.pe_embedder(words))  # type: ignore[operator]
        return query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2)  # [B, heads, N, d]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size

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
        return {"hidden": call.kwargs[_HIDDEN]}

    def with_text(self, call: Call, text: Text) -> Call:
        """The text's position ids are those of any prompt: all are padded to one length."""
        like = call.kwargs[_HIDDEN]
        return Call(call.args, {**call.kwargs, _HIDDEN: text["hidden"].to(like.device, like.dtype)})

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> None:
        """The blocks attend to padding, which holds what the language model put there."""
        return None

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return unpacked(output, call.kwargs[_IDS], PATCH)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return packed(prediction, PATCH)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """The template's tokens and the prompt's from position 0 on (what is too long is cut off behind), then the rest
        of the template, then padding; Mistral's padding first, and all else behind it."""
        found = prompts.spans(prompt, tokenize, length, full=full)
        # Blanks at the end are counted, too. Asked of every model: prompts are cached before there is one.
        end = min(len(tokenize(prompt.full if full else prompt.base)), length)
        padding = max(length - end - BEHIND, 0) if self._padded_before else 0
        return Spans(
            tuple(tuple(padding + position for position in phrase) for phrase in found.phrases),
            tuple(padding + position for position in found.target),
            padding + end,
            range(padding),
        )

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(*(getattr(self.denoiser, stack) for stack in (DOUBLE, SINGLE)))
