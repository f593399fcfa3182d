"""Pairs in time: what the second step of a pair needs of the first.

The first step shows noisy latents with the full prompts, beside the reference for the base prompts. The second shows
the *same* noisy latents at the same timesteps with the base prompts, and asks for that reference. Together they are the
contrast of DOP, without its third pass and at any batch size: only what the target's words add lowers both losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spf_plugin.families.base import Text
from spf_plugin.seam import Call

_EPS_REF, _WHICH, _WEIGHTS = "eps_ref", "which", "sample_weights"


@dataclass(frozen=True)
class State:
    """What a resumed run needs to go on as an uninterrupted one.

    Attributes:
        values: JSON types.
        tensors: on the CPU; empty where no pair waits for its second step.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Partner:
    """The second half of a pair, while it waits for its step. Nothing here has a graph.

    Attributes:
        call: the first step's, with the base prompts' text: noisy latents, timesteps and sizes are in it.
        eps_ref: the reference path's prediction for it, `[B, C, h, w]`.
        which: `[B]` bool, the samples with a target; the others have shown their base prompt already.
        encoded: whether the text in `call` is final; else the text encoder is trained and encodes `base` anew.
        base: the base prompts,
        full: and the full prompts, beside which the host pads them.
        weights: `[B]`, of the samples' losses; None: 1.
    """

    call: Call
    eps_ref: Tensor
    which: Tensor
    encoded: bool
    base: tuple[str, ...]
    full: tuple[str, ...]
    weights: Tensor | None = None

    def weighted(self, error: Tensor) -> Tensor:
        """An error of each sample, `[B]`, as much as it weighs."""
        return error if self.weights is None else error * self.weights.to(error.device, error.dtype)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What JSON takes of it, and its tensors on the CPU, as a safetensors file takes them. None where the call has
        something in it that is neither."""
        structure, tensors = self.call.flatten()
        try:
            json.dumps(structure)
        except TypeError:
            return None
        tensors |= {_EPS_REF: self.eps_ref, _WHICH: self.which}
        tensors |= {} if self.weights is None else {_WEIGHTS: self.weights}
        kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        return {"call": structure, "encoded": self.encoded, "base": list(self.base), "full": list(self.full)}, kept

    @classmethod
    def of(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Partner:
        """What `state` gave, read back.

        Raises:
            KeyError: something is missing.
        """
        return cls(
            Call.unflatten(values["call"], tensors),
            tensors[_EPS_REF],
            tensors[_WHICH],
            bool(values["encoded"]),
            tuple(values["base"]),
            tuple(values["full"]),
            tensors.get(_WEIGHTS),
        )


def linked(text: Text) -> Tensor | None:
    """A zero that depends on every tensor of a conditioning with a graph; None where none has one.

    A step that shows other prompts does not use the host's conditioning. Several processes would wait for each other
    for ever where one has no gradient for a text encoder that the others have one for.
    """
    zeros = [torch.zeros_like(part).mul(part).sum() for part in text.values() if part.requires_grad]
    return torch.stack([zero.float() for zero in zeros]).sum() if zeros else None
