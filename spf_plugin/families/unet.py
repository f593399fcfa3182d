"""The UNets of SD1.x, SD2.x and SDXL: sd-scripts' own and diffusers'.

Both call `attn2.to_q` and `attn2.to_k` as modules on every attention backend (plain, sdpa, xformers, memory-efficient),
so hooks on those see what the layer uses, an adapter's contribution included. Both are called with noisy latents,
timesteps and text; SDXL's pooled text is a part of `y` (sd-scripts) or `added_cond_kwargs` (diffusers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Schedule
from spf_plugin.errors import SPFError
from spf_plugin.families import clip_tokens, latents
from spf_plugin.families.base import Layer, Text, chosen, unwrapped, wrapped
from spf_plugin.families.latents import LatentSpace
from spf_plugin.seam import Call

TRANSFORMER = "Transformer2DModel"  # its name in sd-scripts' UNets and in diffusers'
SIZES = 6 * 256  # of sd-scripts' `y`: six numbers (sizes, crop), 256 features each, behind the pooled text
_NOISY, _TIMESTEPS = ("sample", "x"), ("timestep", "timesteps")
_HIDDEN, _VECTOR = ("encoder_hidden_states", "context"), ("y",)
_ADDED, _POOLED = "added_cond_kwargs", "text_embeds"


class UNet:
    """`spf_plugin.families.base.Family`.

    Args:
        denoiser: the unwrapped UNet.
    """

    cross_attention = r"_attn2_"

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has cross-attention as these UNets have it."""
        return next(_attention(denoiser), None) is not None

    @property
    def latents(self) -> LatentSpace:
        added = getattr(getattr(self.denoiser, "config", None), "addition_embed_type", None)
        return latents.SDXL if hasattr(self.denoiser, "label_emb") or added == "text_time" else latents.SD

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        # "...attentions.0.transformer_blocks.9.attn2": one a transformer, the last wins.
        last = {layer.name.split(".transformer_blocks.")[0]: layer for layer in layers}
        return chosen(layers, which, list(last.values()))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return query, key

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        """Each downsampling halves, rounding up (a stride-2 convolution with padding 1); buckets need not be square.

        Raises:
            ValueError: no number of halvings gives that many positions.
        """
        h, w = size
        while h * w > positions:
            h, w = (h + 1) // 2, (w + 1) // 2
        if h * w != positions:
            raise ValueError(f"a cross-attention layer has {positions} positions, which no halving of {size} gives")
        return h, w

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)

    def timesteps(self, call: Call) -> Tensor:
        return call.part(1, *_TIMESTEPS)

    def schedule(self, of_loop: Discrete | None) -> Schedule:
        if of_loop is None:
            raise SPFError("the training loop gives no noise schedule, and a UNet has none of its own")
        return of_loop

    def text(self, call: Call) -> Text:
        hidden, vector = call.part(2, *_HIDDEN), call.part(3, *_VECTOR)
        if isinstance(vector, Tensor):
            return {"hidden": hidden, "pooled": vector[:, :-SIZES]}
        added = call.kwargs.get(_ADDED) or {}
        return {"hidden": hidden, "pooled": added[_POOLED]} if _POOLED in added else {"hidden": hidden}

    def with_text(self, call: Call, text: Text) -> Call:
        hidden, vector = call.part(2, *_HIDDEN), call.part(3, *_VECTOR)
        call = call.with_part(text["hidden"].to(hidden.device, hidden.dtype), 2, *_HIDDEN)
        if "pooled" not in text:
            return call
        if isinstance(vector, Tensor):
            pooled = text["pooled"].to(vector.device, vector.dtype)
            return call.with_part(torch.cat([pooled, vector[:, pooled.shape[1] :]], dim=1), 3, *_VECTOR)
        added = call.kwargs[_ADDED]
        pooled = text["pooled"].to(added[_POOLED].device, added[_POOLED].dtype)
        return Call(call.args, {**call.kwargs, _ADDED: {**added, _POOLED: pooled}})

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> None:
        """None: CLIP's padding is attended to as its words are."""
        return None

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()  # the loops say it of their captions

    def prediction(self, output: Any, call: Call) -> Tensor:
        return unwrapped(output)

    def output(self, like: Any, prediction: Tensor, call: Call) -> Any:
        return wrapped(like, prediction)

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        return clip_tokens.spans(prompt, tokenize, length, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the transformers: the same that networks.lora adapts, and most of a large UNet."""
        for transformer in self.denoiser.modules():
            if type(transformer).__name__ == TRANSFORMER:
                yield from (module for module in transformer.modules() if type(module) is nn.Linear)


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """All cross-attention layers, in the model's order."""
    for name, module in denoiser.named_modules():
        query, key = getattr(module, "to_q", None), getattr(module, "to_k", None)
        heads = int(getattr(module, "heads", 0))
        if name.split(".")[-1] == "attn2" and query is not None and key is not None and heads > 0:
            yield Layer(name, heads, query, key)
