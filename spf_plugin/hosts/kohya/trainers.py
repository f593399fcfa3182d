"""What sd-scripts' trainers of diffusion transformers do otherwise than those of UNets: facts of the host, by trainer.

What such a model is inside is its family's (`spf_plugin.families`). No torch: `spf check` and `spf doctor` read it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dit:
    """A trainer whose model is a diffusion transformer that SPF knows.

    Attributes:
        network: the host's own network module for it.
        text: the family's names (`spf_plugin.families.base.Text`) for what its `encode_tokens` gives, in that order.
        tokenizer: the attribute of its tokenize strategy whose tokens the family counts.
        text_cache: what follows an image's name in the name of its caption's cached encoding.
        drops: one of its text encoders has dropout, which the host leaves on with --gradient_checkpointing.
    """

    network: str
    text: tuple[str, ...]
    tokenizer: str
    text_cache: str
    drops: bool = False


_T5_IN_FLUX = ("t5xxl", "_flux_te.npz", True)
DITS = {
    "AnimaNetworkTrainer": Dit(
        "networks.lora_anima", ("hidden", "hidden_mask", "ids", "ids_mask"), "t5_tokenizer", "_anima_te.npz"
    ),
    "FluxNetworkTrainer": Dit("networks.lora_flux", ("pooled", "hidden", "ids", "hidden_mask"), *_T5_IN_FLUX),
    # Where FLUX has CLIP's vector, Chroma has zeros, which stand for no prompt.
    "FluxNetworkTrainer chroma": Dit("networks.lora_flux", ("stand_in", "hidden", "ids", "hidden_mask"), *_T5_IN_FLUX),
}
"""By the trainer's class, and its `--model_type` where that makes a difference."""


def dit_of(trainer: Any) -> Dit | None:
    """What is special about a trainer, or one that is made from it; None where its model is a UNet."""
    names = [cls.__name__ for cls in type(trainer).__mro__]
    kind = getattr(trainer, "model_type", None)  # set before the network is made
    return next((DITS[name] for name in (*(f"{name} {kind}" for name in names), *names) if name in DITS), None)
