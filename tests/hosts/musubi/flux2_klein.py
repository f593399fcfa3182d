"""FLUX.2 klein 4B, not distilled: `flux2` with a Qwen3."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.hosts.dits.common import CAPTIONS, VOCABULARY, qwen_vl_tokenizer, reconfigured
from tests.hosts.musubi import flux2
from tests.hosts.musubi.flux2 import (  # noqa: F401  what a kind is asked for
    LAYERS,
    NETWORK,
    PRECISION,
    SCRIPT,
    SWAPPED,
    TENSORS,
    TEXT_SCRIPT,
    WIDTH,
)

ARCH, CODE, VERSION = "flux_2", "f2k4b", "klein-base-4b"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
options = partial(flux2.options, version=VERSION)
text_options = partial(flux2.text_options, version=VERSION)
latents = partial(flux2.latents, code=CODE, full="flux_2_klein_4b")


def shrink(models: Path) -> None:
    from musubi_tuner.flux_2 import flux2_utils
    from musubi_tuner.zimage import zimage_utils

    flux2.shrink()
    reconfigured(
        zimage_utils,
        "Qwen3Config",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_window_layers=LAYERS,
    )
    theirs = flux2_utils.load_qwen3

    def load(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **{**kwargs, "tokenizer_id": str(models / "tokenizer")})

    flux2_utils.load_qwen3 = load


def make(folder: Path) -> None:
    from musubi_tuner.zimage import zimage_utils

    shrink(folder)
    flux2.make(folder, VERSION)
    qwen = zimage_utils.Qwen3ForCausalLM._from_config(zimage_utils.Qwen3Config())
    flux2.save(folder / "text.safetensors", qwen, 3, lambda name: None if name == "lm_head.weight" else name)
    tokenizer(folder / "tokenizer")


def tokenizer(folder: Path) -> None:
    from transformers import Qwen2TokenizerFast

    qwen_vl_tokenizer([*CAPTIONS, "user", "assistant"] * 3, folder / "plain")
    made = Qwen2TokenizerFast.from_pretrained(folder / "plain")
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = CHAT
    made.save_pretrained(folder)
