"""What SPF needs to know of a kind of denoiser. `families/` has the kinds that it knows, one module each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.core.schedule import Discrete, Schedule
from spf_plugin.errors import SPFError, nearest
from spf_plugin.families.latents import LatentSpace
from spf_plugin.seam import Call

Text = Mapping[str, Tensor]
"""The conditioning of prompts by name, each tensor with the batch first: `hidden` `[B, S, E]`, the text encoder's
states, and whatever else the family takes: `pooled` `[B, E2]`; `hidden_mask` `[B, S]`, which of the states are no
padding; ids of a second tokenizer. The names are the contract: hosts make it, families put it into calls."""


@dataclass(frozen=True)
class Layer:
    """An attention layer between image and text.

    Attributes:
        name: in the denoiser.
        heads: number of heads; the channels are split into so many parts.
        query: the module whose output holds the image's queries.
        key: the module whose output holds the text's keys.
    """

    name: str
    heads: int
    query: nn.Module
    key: nn.Module


def chosen(layers: Sequence[Layer], which: str, last: Sequence[Layer]) -> list[Layer]:
    """What `Family.layers` gives.

    Args:
        layers: all of the model's.
        which: `all`, `last`, or a regular expression that is searched in their names.
        last: what the family means by `last`.

    Raises:
        SPFError: none matches (with the nearest names).
    """
    if which in ("all", "last"):
        return list(layers if which == "all" else last)
    found = [layer for layer in layers if re.search(which, layer.name)]
    if not found:
        names = [layer.name for layer in layers]
        hint = nearest(which, names, n=3) or f"; the first is {names[0]}"
        raise SPFError(f"spf_layers={which!r} matches none of the {len(names)} attention layers{hint}")
    return found


def at_depths(layers: Sequence[Layer], depths: Sequence[float]) -> list[Layer]:
    """Those that lie at these parts of the depth of a stack, each once."""
    return [layers[i] for i in sorted({int(depth * len(layers)) for depth in depths})]


def linear_layers_of(*stacks: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of stacks of blocks, and nothing that is made from `nn.Linear`."""
    for stack in stacks:
        yield from (module for module in stack.modules() if type(module) is nn.Linear)


def put_blocks_back(denoiser: nn.Module) -> None:
    """For passes that the loop does not make itself: with block swap a forward leaves the first blocks on the CPU, for
    the backward pass to fetch. Nothing where the host cannot swap this model's blocks."""
    prepare = getattr(denoiser, "prepare_block_swap_before_forward", None)  # sd-scripts' and musubi-tuner's name
    if prepare is not None:
        prepare()


def unwrapped(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, a tuple, or diffusers' output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def wrapped(like: Any, prediction: Tensor) -> Any:
    """What a denoiser would return with this prediction, in the shape of `like`."""
    if isinstance(like, Tensor):
        return prediction
    if isinstance(like, tuple):
        return (prediction, *like[1:])
    return type(like)(sample=prediction)


class Family(Protocol):
    """A kind of denoiser, and this one of it. A new family is one new class with these members; it keeps nothing of a
    call, and knows no host."""

    denoiser: nn.Module

    def __init__(self, denoiser: nn.Module): ...

    @classmethod
    def fits(cls, denoiser: nn.Module) -> bool:
        """Whether a model is of this kind."""
        ...

    @property
    def latents(self) -> LatentSpace | None:
        """Whose latents it predicts, for pictures and the response term; None where no colours are known."""
        ...

    @property
    def cross_attention(self) -> str:
        """Regular expression for the LoRA names of the modules between image and text: `spf_train=cross_attention`."""
        ...

    def layers(self, which: str) -> list[Layer]:
        """The layers to compare.

        Args:
            which: `all`; `last`, a few that cost little (the last block of each stack; of one long stack, the ones
                that tell the words apart); or a regular expression that is searched in the names.

        Raises:
            SPFError: none matches (with the nearest names).
        """
        ...

    def tokens(self, layer: Layer, query: Any, key: Any, call: Call) -> tuple[Tensor, Tensor]:
        """Image queries `[B, N, C]` and text keys `[B, T, C]` from what the layer's two modules gave in a call. There
        may be fewer keys, where the rest is padding in every sample (`text_mask`)."""
        ...

    def grid(self, positions: int, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of a layer with `positions` image positions, for predictions of `size`."""
        ...

    def frames(self, call: Call) -> int:
        """How many frames lie one above the other in `[B, C, h, w]`: 1, but for a clip, whose frames are one picture to
        all that does not look across their borders."""
        ...

    def noisy_latents(self, call: Call) -> Tensor:
        """`z_t` of a call, as `prediction` has it, `[B, C, h, w]`."""
        ...

    def timesteps(self, call: Call) -> Tensor:
        """`[B]`, in the schedule's own units."""
        ...

    def schedule(self, of_loop: Discrete | None) -> Schedule:
        """The noise schedule; `of_loop` is the training loop's, where there is one to choose."""
        ...

    def text(self, call: Call) -> Text:
        """The text part of a call, with its graph."""
        ...

    def with_text(self, call: Call, text: Text) -> Call:
        """The same call with another text, cast to the type and device of the present one."""
        ...

    def length(self, text: Text) -> int:
        """T, the length of the sequence that the layers' keys are of and `spans` counts in."""
        ...

    def text_mask(self, call: Call) -> Tensor | None:
        """`[B, T]` bool, the keys that are no padding; None where the model treats padding as it treats words."""
        ...

    def dropped(self, text: Text) -> Sequence[bool]:
        """Per sample, whether this is an empty caption's text, whatever the loop says of its captions: some drop text
        that is encoded already. Empty where the loop's word counts."""
        ...

    def prediction(self, output: Any, call: Call) -> Tensor:
        """`[B, C, h, w]` from what the denoiser returned for a call, with its graph."""
        ...

    def output(self, like: Any, prediction: Tensor, call: Call) -> Any:
        """What the denoiser would return for a call with this prediction `[B, C, h, w]`, of the kind of `like`: what it
        did return, maybe for a call of other sizes."""
        ...

    def spans(self, prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
        """Where each phrase lies in a text sequence of `length` positions; see `spf_plugin.core.prompt.spans`. A family
        of two tokenizers calls `tokenize(text, which=1)` for the second."""
        ...

    def linear_layers(self) -> Iterator[nn.Linear]:
        """The layers that `spf_base` may quantise."""
        ...
