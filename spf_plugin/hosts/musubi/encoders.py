"""Tokenizers and text encoders of musubi-tuner, loaded and asked by its own functions. Only the command that encodes
prompts needs them: torch and musubi-tuner are imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """What encodes the prompts of an architecture.

    Attributes:
        tokenize: text -> its token ids, without begin, end and padding.
        encode: a prompt -> the tensors that the host's script would write for it (`Architecture.tensors`), on the CPU.
        prefix: what it puts before every prompt, as text; as far as its tokens are in what it writes.
    """

    tokenize: Callable[[str], Sequence[int]]
    encode: Callable[[str], dict[str, Tensor]]
    prefix: str = ""


def _plain(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Of a tokenizer of transformers."""

    def tokenize(text: str) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    return tokenize


def zimage(args: Any, device: torch.device) -> Encoder:
    """Qwen3, whose states the host cuts behind the last token."""
    import torch
    from musubi_tuner.zimage import zimage_utils

    dtype = torch.float8_e4m3fn if args.fp8_llm else torch.bfloat16
    tokenizer, model = zimage_utils.load_qwen3(args.text_encoder, dtype=dtype, device=device, disable_mmap=True)
    model.eval()

    def encode(prompt: str) -> dict[str, Tensor]:
        states, mask = zimage_utils.get_text_embeds(tokenizer, model, [prompt])
        return {"llm_embed": states[0, : int(mask[0].sum())].cpu()}

    mark = "SPF"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return Encoder(_plain(tokenizer), encode, chat.partition(mark)[0])
