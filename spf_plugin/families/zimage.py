"""Z-Image (S3-DiT): patches and words in one sequence, read by Qwen3, as musubi-tuner has it.

The patches stand before the words. Queries and keys both get rotary positions: words by their place from 1 on, patches
by the place behind all words, row and column. The map is made of what the block multiplies, rotated. The refiners
before the joint blocks see words or patches alone. Where the loop masks nothing, as for one sample, whatever stands in
the text is words.
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
from spf_plugin.families.base import Layer, Text, at_depths, chosen, linear_layers_of
from spf_plugin.families.latents import FLUX
from spf_plugin.families.rotary import rotated
from spf_plugin.seam import Call

# Where, of the depth of the stack, the layers of `last` lie: 15, 18 and 22 of 30; see Lumina, which is built alike. A
# layer keeps 95 MB a sample at 1024 px in bf16 (the queries and keys of the whole sequence, the patches' once more with
# their positions). Not measured on Z-Image's own weights.
DEPTHS = (0.5, 0.625, 0.75)
WORDS = 512  # the most tokens that Qwen3 reads, with those of the chat around the prompt
LENGTH = WORDS + 32  # and the padding behind them, which makes the whole sequence a multiple of 32
_NOISY, _TIME, _HIDDEN, _MASK = ("x",), ("t",), ("cap_feats",), ("cap_mask",)


class ZImage:
    """`spf_plugin.families.base.Family`.

    Its text: Qwen3's `hidden` `[B, S, E]`, and where the loop pads and masks `hidden_mask` `[B, S]`. T is the most that
    there may be.

    Its time runs from noise (0) to image (1), and it predicts `x0 - noise`. Here both are turned round, to what `Flow`
    has.

    Args:
        denoiser: the unwrapped transformer.
    """

    latents = FLUX
    cross_attention = r"_layers_\d+_attention_"  # words and patches share their projections

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model has such blocks, and refines its words before them, as Lumina does with other names."""
        return hasattr(denoiser, "context_refiner") and next(_attention(denoiser), None) is not None

    # -- attention ------------------------------------------------------------------------------------------------

    def layers(self, which: str) -> list[Layer]:
        layers = list(_attention(self.denoiser))
        return chosen(layers, which, at_depths(layers, DEPTHS))

    def tokens(self, layer: Layer, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        noisy, words = self.noisy_latents(call), call.part(2, *_HIDDEN).shape[1]
        h, w = self.grid(0, (noisy.shape[-2], noisy.shape[-1]))
        patches = rotated(query[:, : h * w], self._turns(_patches(words, h, w, query.device)))
        keys = rotated(key[:, h * w :], self._turns(_words(words, key.device)))
        return patches.flatten(2), keys.repeat_interleave(query.shape[2] // key.shape[2], dim=2).flatten(2)

    def _turns(self, ids: Tensor) -> Tensor:
        """Of positions `[N, 3]`, `[1, N, d / 2]`."""
        return self.denoiser.rope_embedder(ids)[None]  # type: ignore[operator]

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        patch = int(self.denoiser.all_patch_size[0])  # type: ignore[index]
        return size[0] // patch, size[1] // patch

    # -- calls ----------------------------------------------------------------------------------------------------

    def frames(self, call: Call) -> int:
        return 1

    def noisy_latents(self, call: Call) -> Tensor:
        return call.part(0, *_NOISY)[:, :, 0]

    def timesteps(self, call: Call) -> Tensor:
        return 1 - call.part(1, *_TIME).float()

    def schedule(self, of_loop: Discrete | None) -> Flow:
        return Flow()

    def text(self, call: Call) -> Text:
        hidden, mask = call.part(2, *_HIDDEN), call.part(3, *_MASK)
        return {"hidden": hidden} if mask is None else {"hidden": hidden, "hidden_mask": mask}

    def with_text(self, call: Call, text: Text) -> Call:
        """Where the call has padding, the other text is padded as far: the patches' positions begin behind it."""
        present = self.text(call)
        cast = {name: text[name].to(part.device, part.dtype) for name, part in present.items()}
        hidden, mask = cast["hidden"], cast.get("hidden_mask")
        if mask is None:
            return call.with_part(hidden, 2, *_HIDDEN)
        missing = max(0, present["hidden"].shape[1] - hidden.shape[1])
        call = call.with_part(F.pad(hidden, (0, 0, 0, missing)), 2, *_HIDDEN)
        return call.with_part(F.pad(mask, (0, missing)), 3, *_MASK)

    def length(self, text: Text) -> int:
        return LENGTH

    def text_mask(self, call: Call) -> Tensor:
        """The model masks its padding, too. Behind the call's own sequence there is nothing."""
        hidden, mask = call.part(2, *_HIDDEN), call.part(3, *_MASK)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return F.pad(mask.bool(), (0, max(0, LENGTH - mask.shape[1])))

    def dropped(self, text: Text) -> Sequence[bool]:
        return ()

    def prediction(self, output: Tensor, call: Call) -> Tensor:
        return -output[:, :, 0]

    def output(self, like: Any, prediction: Tensor, call: Call) -> Tensor:
        return -prediction[:, :, None]

    # -- the rest -------------------------------------------------------------------------------------------------

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """Qwen3's tokens, behind those of the chat, which a loop puts before the prompt; the end of the chat behind."""
        return prompts.spans(prompt, tokenize, WORDS, full=full)

    def linear_layers(self) -> Iterator[nn.Linear]:
        """Of the joint blocks: nearly all of the model."""
        return linear_layers_of(self.denoiser.layers)  # type: ignore[arg-type]


def _words(count: int, device: torch.device) -> Tensor:
    """Where the words lie, `[count, 3]`."""
    ids = torch.zeros(count, 3, dtype=torch.int32, device=device)
    ids[:, 0] = torch.arange(1, count + 1, device=device)
    return ids


def _patches(words: int, h: int, w: int, device: torch.device) -> Tensor:
    """Where the patches lie behind so many words: the second place behind these, row, column; `[h w, 3]`."""
    ids = torch.zeros(h, w, 3, dtype=torch.int32, device=device)
    ids[..., 0] = words + 1
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return ids.flatten(0, 1)


def _attention(denoiser: nn.Module) -> Iterator[Layer]:
    """The attention of every joint block, in the model's order."""
    for i, block in enumerate(getattr(denoiser, "layers", ())):
        module = getattr(block, "attention", None)
        query, key = getattr(module, "norm_q", None), getattr(module, "norm_k", None)
        heads = int(getattr(module, "n_heads", 0))
        if query is not None and key is not None and heads > 0:
            yield Layer(f"layers.{i}.attention", heads, query, key)
