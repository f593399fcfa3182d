"""The toy transformer as `spf_plugin.families.base.Family`: what `docs/families.md` walks through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Flow
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Layer, Text
from spf_plugin.seam import Call
from tests.toy.model import CHANNELS, HEADS, PATCH, Block, Denoiser


def unpack(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, C p^2]` -> `[B, C, h, w]`."""
    b, (h, w) = len(patches), grid
    image = patches.view(b, h, w, CHANNELS, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return image.reshape(b, CHANNELS, h * PATCH, w * PATCH)


def pack(latents: Tensor) -> Tensor:
    """The inverse of `unpack`."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, -1, c * PATCH**2)


class Toy:
    """One denoiser. `words` is the text's sequence, `style` its pooled vector."""

    latents = None
    cross_attention = "qkv"

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        return isinstance(denoiser, Denoiser)

    def layers(self, which: str) -> list[Layer]:
        found = [
            Layer(name, HEADS, block.norm_q, block.norm_k)
            for name, block in self.denoiser.named_modules()
            if isinstance(block, Block) and (which == "all" or re.search(which, name))
        ]
        if which == "last":
            return self.layers("all")[-1:]
        if not found:
            raise SPFError(f"spf_layers={which!r} matches no block")
        return found

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        length = call.kwargs["words"].shape[1]  # words stand before the patches
        return query[:, length:].flatten(2), key[:, :length].flatten(2)

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // PATCH, size[1] // PATCH

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return unpack(call.kwargs["patches"], call.kwargs["grid"])

    def timesteps(self, call: Call) -> Tensor:
        return call.kwargs["sigma"]

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()

    def text(self, call: Call) -> Text:
        return {"hidden": call.kwargs["words"], "pooled": call.kwargs["style"]}

    def with_text(self, call: Call, text: Text) -> Call:
        like = call.kwargs["words"]
        hidden, pooled = (text[name].to(like.device, like.dtype) for name in ("hidden", "pooled"))
        return Call((), {**call.kwargs, "words": hidden, "style": pooled})

    def length(self, text: Text) -> int:
        return text["hidden"].shape[1]

    def text_mask(self, call: Call) -> None:
        return None  # the model attends to padding

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return unpack(output, call.kwargs["grid"])

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return pack(prediction)

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        return prompts.spans(prompt, tokenize, length, full=full)  # no begin, padding at the end

    def linear_layers(self) -> Iterator[nn.Linear]:
        yield from (module for module in self.denoiser.blocks.modules() if isinstance(module, nn.Linear))  # type: ignore
