"""A caption, encoded once more as the host caches it: by the trainer's own strategy, beside what it reads of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from spf_plugin import patching
from spf_plugin.hosts.kohya.cached_text import Encoded, Read, read_sdxl
from spf_plugin.hosts.kohya.text import TextEncoding


def can_encode(text: TextEncoding) -> bool:
    """Whether all text encoders are there, with their weights: what is cached some trainers need no more."""
    encoders = text.text_encoders
    return bool(encoders) and not any(
        encoder is None or any(weight.is_meta for weight in encoder.parameters()) for encoder in encoders
    )


@contextmanager
def caching(text: TextEncoding) -> Iterator[tuple[Callable[[str], Encoded], Read]]:
    """What the host would cache of a caption, and what it has cached in a file. A transformer's strategy keeps both in
    one order."""
    dit = text.dit
    if dit is None:
        yield text.encode_for_cache, read_sdxl
        return
    from library.strategy_base import TextEncoderOutputsCachingStrategy, TextEncodingStrategy, TokenizeStrategy

    strategy = TextEncoderOutputsCachingStrategy.get_strategy()
    tokenizing, encoding = TokenizeStrategy.get_strategy(), TextEncodingStrategy.get_strategy()

    def encode(caption: str) -> Encoded:
        info = SimpleNamespace(caption=caption, caption_dropout_rate=0.0, image_key=caption, text_encoder_outputs=None)
        encoders = text.text_encoders
        # HunyuanImage's two encoders have two types, and the host caches them without autocast.
        casts = nullcontext() if dit.rebuilt else text.accelerator.autocast()
        with torch.no_grad(), text.undisturbed(encoders), casts:
            strategy.cache_batch_outputs(tokenizing, encoders, encoding, [info])
        return [np.asarray(part) for part in info.text_encoder_outputs or ()]

    with text.at_hand(), patching.patched(strategy, "_cache_to_disk", False):
        yield encode, strategy.load_outputs_npz
