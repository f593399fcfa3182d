"""Anima: a Cosmos-Predict2 transformer, whose text is Qwen3's, put into T5's words by an adapter.

Image and text meet in a cross-attention of every block, without rotary positions, so its queries and keys are compared
as a UNet's are. The adapter is a part of the denoiser: it takes T5's token ids and attends from them to Qwen3's states,
and what the blocks see has one position for each T5 token. So phrases are counted in T5 tokens. It sets the positions
of padding to 0, which makes their keys exactly 0, and the blocks attend to them like to words: with the 512 positions
that the host pads to they take most of the attention, and say nothing. The comparison leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.seam import Call

# Where, of the depth of the stack, the layers of `last` lie: 14, 17 and 21 of 28. In diffusion transformers it is the
# middle that decides what is where, and the end that paints: its queries hold texture, its maps little of the words.
# Three keep 51 MB of queries a sample at 1024 px in bf16, all 28 would keep 470. Not measured on Anima's own weights.
DEPTHS = (0.5, 0.625, 0.75)
_NOISY, _TIMESTEPS, _HIDDEN = ("x",), ("timesteps",), ("context",)
_NAMES = {"ids": "target_input_ids", "ids_mask": "target_attention_mask", "hidden_mask": "source_attention_mask"}


class Anima:
    """`spf_plugin.families.base.Family`.

    Its text: `hidden` `[B, S, E]` and `hidden_mask` `[B, S]` of Qwen3; `ids` and `ids_mask` `[B, T]` of T5's tokenizer.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = None  # no published matrix from its VAE's latents to colours is known here: pictures are grey
    cross_attention = r"(?<!llm_adapter)_blocks_\d+_cross_attn_"  # the adapter's own blocks have one too

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and the adapter that makes T5 tokens of its text."""
        return hasattr(denoiser, "llm_adapter") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return query.flatten(-2), key.flatten(-2)  # [B, N, heads, d]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        patch = int(getattr(self.denoiser, "patch_spatial", 2))
        return size[0] // patch, size[1] // patch

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY).squeeze(2)  # [B, C, 1, h, w]: a video of one image

    def timesteps(self, call: Call) -> Tensor:
        return call.part(1, *_TIMESTEPS)

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()  # timesteps are in [0, 1]

    def text(self, call: Call) -> Text:
        return {"hidden": call.part(2, *_HIDDEN), **{name: call.kwargs[theirs] for name, theirs in _NAMES.items()}}

    def with_text(self, call: Call, text: Text) -> Call:
        like = self.text(call)
        cast = {name: text[name].to(part.device, part.dtype) for name, part in like.items()}
        call = call.with_part(cast["hidden"], 2, *_HIDDEN)
        return Call(call.args, {**call.kwargs, **{theirs: cast[name] for name, theirs in _NAMES.items()}})

    def length(self, text: Text) -> int:
        return text["ids"].shape[1]

    def text_mask(self, call: Call) -> Tensor:
        return call.kwargs[_NAMES["ids_mask"]].bool()

    def dropped(self, text: Text) -> Sequence[bool]:
        """Of the empty caption there is `</s>` alone, and the host makes the same of a caption that it drops."""
        return (text["ids_mask"].sum(dim=1) <= 1).tolist()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return output.squeeze(2)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return prediction.unsqueeze(2)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """T5's tokens from position 0 on, `</s>` behind them (also where the rest is cut off), and padding."""
        return prompts.spans(prompt, tokenize, length - 1, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model, and where the host's adapter is."""
        return linear_layers_of(self.denoiser.blocks)  # type: ignore[arg-type]


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The cross-attention of every block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "blocks", ())):
        module = getattr(block, "cross_attn", None)
        query, key = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        heads = int(getattr(module, "n_heads", 0))
        if query is not None and key is not None and heads > 0:
            yield Layer(f"blocks.{i}.cross_attn", heads, query, key)
