"""Stable Diffusion 3 and 3.5 as diffusers has them: the model of `sd3.py` under other names, and a T5 that may be
missing, in whose place diffusers puts as many zeros as CLIP has positions.

Positions are added to the image before the first block, nothing is rotated: what the norms give is what the attention
multiplies. Without norms (SD3 Medium) that is what the projections give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.families import clip_tokens, latents, sd3
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of, unwrapped, wrapped
from spf_plugin.families.latents import LatentSpace
from spf_plugin.seam import Call

_NOISY, _TIMESTEPS = ("hidden_states",), ("timestep",)
_HIDDEN, _POOLED = ("encoder_hidden_states",), ("pooled_projections",)


class DiffusersSD3:
    """`spf_plugin.families.base.Family`.

    Its text: `hidden` `[B, S, E]`, the two CLIPs' positions and behind them T5's, and `pooled` `[B, E2]`.

    Args:
        denoiser: diffusers' `SD3Transformer2DModel`, unwrapped.
    """

    cross_attention = r"_transformer_blocks_\d+_attn_"  # `attn2` of 3.5-Medium is the image's own

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model embeds patches and has blocks in which the image attends to text, too."""
        patches = getattr(getattr(denoiser, "pos_embed", None), "proj", None)
        return patches is not None and next(_attention(denoiser), None) is not None

    @property
    def latents(self) -> LatentSpace | None:
        """SD3's, if the model has as many channels."""
        channels = getattr(getattr(self.denoiser, "config", None), "in_channels", 0)
        return latents.SD3 if channels == latents.SD3.channels else None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, sd3.DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The norms give `[B, heads, N, d]`, the projections `[B, N, C]`."""
        if query.dim() == 3:
            return query, key
        return query.transpose(1, 2).flatten(-2), key.transpose(1, 2).flatten(-2)

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        patch = int(self.denoiser.config.patch_size)  # type: ignore[union-attr, arg-type]
        return size[0] // patch, size[1] // patch

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)

    def timesteps(self, call: Call) -> Tensor:
        return call.part(3, *_TIMESTEPS)

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow(sd3.SCALE)

    def text(self, call: Call) -> Text:
        return {"hidden": call.part(1, *_HIDDEN), "pooled": call.part(2, *_POOLED)}

    def with_text(self, call: Call, text: Text) -> Call:
        hidden, pooled = call.part(1, *_HIDDEN), call.part(2, *_POOLED)
        call = call.with_part(text["hidden"].to(hidden.device, hidden.dtype), 1, *_HIDDEN)
        return call.with_part(text["pooled"].to(pooled.device, pooled.dtype), 2, *_POOLED)

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> Tensor:
        """All but the zeros in the place of a missing T5."""
        return call.part(1, *_HIDDEN).ne(0).any(-1)

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()  # the loop says it of its captions

    def prediction(self, output: Any, call: Call) -> Tensor:
        return unwrapped(output)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Any:
        return wrapped(like, prediction)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[..., Sequence[int]], length: int, *, full: bool) -> Spans:
        """As in sd-scripts' SD3 (`sd3.py`); without T5, whose tokenizer then gives nothing, among CLIP's alone."""
        second = partial(tokenize, which=1)
        if not second("a"):
            return clip_tokens.spans(prompt, tokenize, length // 2, full=full)
        clip = clip_tokens.spans(prompt, tokenize, sd3.CLIP, full=full)
        t5 = prompts.spans(prompt, second, length - sd3.CLIP - 1, sd3.CLIP.__add__, full=full)
        return sd3.joined(clip, t5)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the blocks: nearly all of the model."""
        return linear_layers_of(self.denoiser.transformer_blocks)  # type: ignore[arg-type]


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The joint attention of every block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "transformer_blocks", ())):
        attention = getattr(block, "attn", None)
        query = getattr(attention, "norm_q", None) or getattr(attention, "to_q", None)
        key = getattr(attention, "norm_added_k", None) or getattr(attention, "add_k_proj", None)
        if query is not None and key is not None:
            yield Layer(f"transformer_blocks.{i}.attn", int(attention.heads), query, key)  # type: ignore[union-attr]
