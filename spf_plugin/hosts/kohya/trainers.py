"""What sd-scripts' trainers of diffusion transformers do otherwise than those of UNets: facts of the host, by trainer.

What such a model is inside is its family's (`spf_plugin.families`). No torch: `spf check` and `spf doctor` read it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dit:
    """A trainer whose model is a diffusion transformer that SPF knows.

    Attributes:
        network: the host's own network module for it.
        text: the family's names (`spf_plugin.families.base.Text`) for what its `encode_tokens` gives, in that order;
            None for what the model does not see.
        tokenizer: the attribute of its tokenize strategy whose tokens the family counts.
        text_cache: what follows an image's name in the name of its caption's cached encoding.
        second: the attribute of the second tokenizer, where the family counts the tokens of two.
        drops_out: a text encoder has dropout, which --gradient_checkpointing leaves on.
        encoding: the host's arguments -> options of `encode_tokens`, for prompts that are to be encoded as its own are.
        prefix: the attribute of its tokenize strategy with the words that it puts before every caption, if any.
        rebuilt: with cached text it has thrown its text encoders away before the network is made, and what it gives in
            their place encodes nothing. It also keeps cached text on the disk only.
    """

    network: str
    text: tuple[str | None, ...]
    tokenizer: str
    text_cache: str
    second: str | None = None
    drops_out: bool = False
    encoding: Callable[[Any], dict[str, Any]] = lambda args: {}
    prefix: str | None = None
    rebuilt: bool = False


def _of_sd3(args: Any) -> dict[str, Any]:
    """No text is dropped. It looks at its own masks in what it caches, and never in a step, whatever it was told."""
    cached = bool(args.cache_text_encoder_outputs)
    return {
        "apply_lg_attn_mask": cached and args.network_train_unet_only and args.apply_lg_attn_mask,
        "apply_t5_attn_mask": cached and args.apply_t5_attn_mask,
        "enable_dropout": False,
    }


DITS = {
    "AnimaNetworkTrainer": Dit(
        "networks.lora_anima", ("hidden", "hidden_mask", "ids", "ids_mask"), "t5_tokenizer", "_anima_te.npz"
    ),
    "Sd3NetworkTrainer": Dit(
        "networks.lora_sd3",
        ("hidden", "t5", "pooled", None, None, None),
        "clip_l",
        "_sd3_te.npz",
        second="t5xxl",
        drops_out=True,
        encoding=_of_sd3,
    ),
    "FluxNetworkTrainer": Dit(
        "networks.lora_flux", ("pooled", "hidden", "ids", "hidden_mask"), "t5xxl", "_flux_te.npz", drops_out=True
    ),
    # Where FLUX has CLIP's vector, Chroma has zeros, which stand for no prompt.
    "FluxNetworkTrainer chroma": Dit(
        "networks.lora_flux", ("stand_in", "hidden", "ids", "hidden_mask"), "t5xxl", "_flux_te.npz", drops_out=True
    ),
    "HunyuanImageNetworkTrainer": Dit(
        "networks.lora_hunyuan_image",
        ("hidden", "hidden_mask", "glyphs", "glyphs_mask", None),
        "vlm_tokenizer",
        "_hi_te.npz",
        rebuilt=True,
    ),
    "LuminaNetworkTrainer": Dit(
        "networks.lora_lumina", ("hidden", None, "hidden_mask"), "tokenizer", "_lumina_te.npz", prefix="system_prompt"
    ),
}
"""By the trainer's class, and its `--model_type` where that makes a difference."""


def dit_of(trainer: Any) -> Dit | None:
    """What is special about a trainer, or one that is made from it; None where its model is a UNet."""
    names = [cls.__name__ for cls in type(trainer).__mro__]
    kind = getattr(trainer, "model_type", None)  # set before the network is made
    return next((DITS[name] for name in (*(f"{name} {kind}" for name in names), *names) if name in DITS), None)
