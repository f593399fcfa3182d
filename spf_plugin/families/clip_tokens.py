"""Where phrases lie in the sequences of CLIP's text encoder as SD1.x, SD2.x and SDXL use it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spf_plugin.core import prompt as prompts
from spf_plugin.core.prompt import Prompt, Spans

CHUNK = 75  # tokens of text in one pass of the encoder


def spans(prompt: Prompt, tokenize: Callable[[str], Sequence[int]], length: int, *, full: bool) -> Spans:
    """Where each phrase lies among the tokens, counted from 0 = BOS.

    Args:
        prompt: a split caption.
        tokenize: text -> token ids without BOS, EOS and padding.
        length: T, the length of the sequence that the UNet sees. 77, or several 75-token chunks joined to
            BOS + 75 n + EOS, or (sd-scripts' weighted captions up to v0.9.1) n chunks of 77 with BOS and EOS each.
            What does not fit is cut off, as the host cuts it.
        full: positions in the full prompt, else in the base prompt.
    """
    separate = length > CHUNK + 2 and length % (CHUNK + 2) == 0
    limit = length // (CHUNK + 2) * CHUNK if separate else length - 2

    def position(token: int) -> int:
        return 1 + token + (2 * (token // CHUNK) if separate else 0)

    return prompts.spans(prompt, tokenize, limit, position, full=full)
