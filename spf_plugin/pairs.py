"""Pairs in time: what the second step of a pair needs of the first.

The first step shows noisy latents with the full prompts, beside the reference for the base prompts. The second shows
the *same* noisy latents at the same timesteps with the base prompts, and asks for that reference. Together they are the
contrast of DOP, without its third pass and at any batch size: only what the target's words add lowers both losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from spf_plugin.text import Conds

_CONDS = "conds."


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
        noisy_latents: `z_t`, `[B, C, h, w]`.
        timesteps: `[B]`.
        eps_ref: the reference path's prediction for the base prompts, `[B, C, h, w]`.
        which: `[B]` bool, the samples with a target; the others have shown their base prompt already.
        sizes: what else the host's call reads of its batch (SDXL's size conditioning), each `[B, ...]`.
        conds: conditioning of the base prompts; None where the text encoder is trained and encodes them anew.
        base: the base prompts,
        full: and the full prompts, beside which the host pads them.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    eps_ref: Tensor
    which: Tensor
    sizes: Mapping[str, Tensor]
    conds: Conds | None
    base: tuple[str, ...]
    full: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the prompts, on the CPU, as a safetensors file takes it."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        found |= {f"sizes.{name}": value for name, value in self.sizes.items()}
        if isinstance(self.conds, Tensor):
            found["conds"] = self.conds
        else:
            found |= {f"{_CONDS}{i}": part for i, part in enumerate(self.conds or ())}
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}

    def prompts(self) -> dict[str, list[str]]:
        """The prompts, as JSON takes them."""
        return {"base": list(self.base), "full": list(self.full)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prompts: Mapping[str, Any]) -> Partner:
        """What `tensors` and `prompts` gave, read back.

        Raises:
            KeyError: something is missing.
        """
        parts = sorted((name for name in tensors if name.startswith(_CONDS)), key=lambda n: int(n[len(_CONDS) :]))
        conds: Conds | None = tensors.get("conds")
        if parts:
            conds = [tensors[name] for name in parts]
        return cls(
            **{name: tensors[name] for name in ("noisy_latents", "timesteps", "eps_ref", "which")},
            sizes={name[6:]: value for name, value in tensors.items() if name.startswith("sizes.")},
            conds=conds,
            base=tuple(prompts["base"]),
            full=tuple(prompts["full"]),
        )


def linked(conds: Conds) -> Tensor | None:
    """A zero that depends on every tensor of a conditioning with a graph; None where none has one.

    A step that shows other prompts does not use the host's conditioning. Several processes would wait for each other
    for ever where one has no gradient for a text encoder that the others have one for.
    """
    parts = [conds] if isinstance(conds, Tensor) else list(conds)
    zeros = [torch.zeros_like(part).mul(part).sum() for part in parts if part is not None and part.requires_grad]
    return torch.stack([zero.float() for zero in zeros]).sum() if zeros else None
