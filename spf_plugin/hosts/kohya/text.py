"""Tokens and conditioning as sd-scripts makes them, by the releases' own code."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spf_plugin.core.prompt import strip_weights
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.hosts.kohya.trainers import Dit, dit_of


class TextEncoding:
    """Tokenizers and text encoders of a running trainer.

    Args:
        trainer: the host's.
        args: its arguments.
        accelerator: accelerate's.
        text_encoders: as `create_network` was given them.
        tokenizers: the training function's variable of this name, where it has one.
        weight_dtype: of the loop's mixed precision.
    """

    def __init__(
        self,
        trainer: Any,
        args: Any,
        accelerator: Any,
        text_encoders: Sequence[Any],
        tokenizers: Any,
        weight_dtype: Any,
    ):
        self.trainer, self.args, self.accelerator = trainer, args, accelerator
        self._tokenizers, self.weight_dtype = tokenizers, weight_dtype
        self.dit = dit_of(trainer)
        # Also where it trains one encoder beside what it cached: the other waits on the CPU, where it takes seconds.
        self.cached = self.dit is not None and bool(getattr(args, "cache_text_encoder_outputs", False))
        self.freed = self.cached and bool(trainer.is_text_encoder_not_needed_for_training(args))
        # What the host frees, nobody may hold.
        self._held = [] if self.freed else list(text_encoders)
        dummies = self.dit is not None and self.dit.rebuilt
        self._seen = [weakref.ref(encoder) for encoder in text_encoders] if self.freed and not dummies else []

    @property
    def text_encoders(self) -> list[Any]:
        """Those that are still there."""
        return self._held or [encoder for seen in self._seen if (encoder := seen()) is not None]

    @property
    def is_new(self) -> bool:
        """Whether the loop has strategies for tokenizing and encoding."""
        return hasattr(self.trainer, "process_batch")

    @property
    def is_sdxl(self) -> bool:
        return bool(getattr(self.trainer, "is_sdxl", False))

    @property
    def tokenizers(self) -> list[Any]:
        if self.is_new:
            from library.strategy_base import TokenizeStrategy

            if self.dit is not None:
                names = [self.dit.tokenizer, *([self.dit.second] if self.dit.second else [])]
                return [getattr(TokenizeStrategy.get_strategy(), name) for name in names]
            return list(self.trainer.get_tokenizers(TokenizeStrategy.get_strategy()))
        tokenizers = self._tokenizers
        return list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]

    @property
    def can_tokenize(self) -> bool:
        return (self.is_new and bool(self.text_encoders)) or self._tokenizers is not None

    @property
    def prefix(self) -> str:
        if self.dit is None or self.dit.prefix is None:
            return ""
        from library.strategy_base import TokenizeStrategy

        return str(getattr(TokenizeStrategy.get_strategy(), self.dit.prefix))

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        if self.args.weighted_captions:
            text = strip_weights(text)
        return self.tokenizers[which](text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        if self.dit is not None:
            return self._encode_for(self.dit, list(prompts))
        with self._threads():
            conds = self._encode(prompts, beside)
        if not isinstance(conds, list | tuple):
            return {"hidden": conds}
        if len(conds) == 1:
            return {"hidden": conds[0]}
        return {"hidden": torch.cat(list(conds[:2]), dim=-1), "pooled": conds[2]}  # SDXL: two encoders, one pooled

    def _encode_for(self, dit: Dit, prompts: list[str]) -> Text:
        """As the trainer of a transformer does it: with its own list of conditions, under autocast. In a step with a
        graph only by the encoders that it runs there: what it caches of the others is not encoded again."""
        from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

        encoders = self.text_encoders
        if not encoders:
            raise SPFError(
                f"the host has freed its text encoders, and {prompts[0]!r} was not encoded before: no caption of the "
                "data set led to it. Run without --cache_text_encoder_outputs."
            )
        tokenizing, encoding = TokenizeStrategy.get_strategy(), TextEncodingStrategy.get_strategy()
        models = encoders
        if torch.is_grad_enabled():
            models = self.trainer.get_models_for_text_encoding(self.args, self.accelerator, encoders) or encoders
        with self.undisturbed(encoders), self.accelerator.autocast():
            tokens = tokenizing.tokenize(prompts)
            parts = encoding.encode_tokens(tokenizing, models, tokens, **dit.encoding(self.args))
        named = zip(dit.text, parts, strict=True)
        return {name: part for name, part in named if name is not None and part is not None}

    @contextmanager
    def undisturbed(self, encoders: Sequence[Any]) -> Iterator[None]:
        """No dropout, and the run's random state as it was: with --gradient_checkpointing the host keeps its encoders
        in training mode. A trained encoder's own step, which has a graph, is left as it is."""
        if torch.is_grad_enabled():
            yield
            return
        device = self.accelerator.device
        modes = [(module, module.training) for encoder in encoders for module in encoder.modules()]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                for encoder in encoders:
                    encoder.eval()
                yield
            finally:
                for module, mode in modes:
                    module.training = mode

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The text encoders where the run computes, as the host has them when it caches; afterwards where they were."""
        if self.dit is not None and self.dit.rebuilt:
            with self._rebuilt():
                yield
            return
        encoders = self.text_encoders
        places = [encoder.device for encoder in encoders]
        try:
            for encoder in encoders:
                encoder.to(self.accelerator.device)
            yield
        finally:
            for encoder, place in zip(encoders, places, strict=True):
                encoder.to(place)

    @contextmanager
    def _rebuilt(self) -> Iterator[None]:
        """Text encoders loaded once more, by the host's own code, which draws random numbers: none of the run's."""
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            encoders = self.trainer.load_target_model(self.args, self.weight_dtype, self.accelerator)[1]
        try:
            for encoder in encoders:
                encoder.to("cpu" if self.args.text_encoder_cpu else device)
            self._held = encoders
            yield
        finally:
            self._held = []

    @torch.no_grad()
    def encode_for_cache(self, caption: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the host would cache of a caption of SDXL: hidden states `[T, C]` and pooled ones `[E]`."""
        text = self.encode([caption])
        return text["hidden"][0].float().cpu().numpy(), text["pooled"][0].float().cpu().numpy()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Half of the machine's processors while text encoders compute on the CPU and everything else on a GPU.

        The host leaves them there when their outputs are cached, and accelerate launch gives a process one thread.
        """
        waiting = self.accelerator.device.type != "cpu" and self.text_encoders[0].device.type == "cpu"
        before = torch.get_num_threads()
        if waiting:
            torch.set_num_threads(max(before, (os.cpu_count() or 1) // (2 * self.accelerator.num_processes)))
        try:
            yield
        finally:
            if waiting:
                torch.set_num_threads(before)

    def _encode(self, prompts: Sequence[str], beside: Sequence[str]) -> Any:
        if self.is_new:
            return self._encode_new(list(prompts))
        if self.args.weighted_captions:
            from library.custom_train_functions import get_weighted_text_embeddings

            chunks = self.args.max_token_length // 75 if self.args.max_token_length else 1
            everything = get_weighted_text_embeddings(
                self.tokenizers[0],
                self.text_encoders[0],
                [*prompts, *beside],
                self.text_encoders[0].device,
                chunks,
                clip_skip=self.args.clip_skip,
            )
            return everything[: len(prompts)]
        return self._encode_old(list(prompts))

    def _encode_new(self, prompts: list[str]) -> Any:
        from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

        tokenizing, encoding = TokenizeStrategy.get_strategy(), TextEncodingStrategy.get_strategy()
        models = self.trainer.get_models_for_text_encoding(self.args, self.accelerator, self.text_encoders)
        if self.args.weighted_captions:
            ids, weights = tokenizing.tokenize_with_weights(prompts)
            return encoding.encode_tokens_with_weights(tokenizing, models, ids, weights)
        return encoding.encode_tokens(tokenizing, models, tokenizing.tokenize(prompts))

    def _encode_old(self, prompts: list[str]) -> Any:
        from library import train_util

        # The data set's own method, without a data set: it uses nothing of it but this length.
        length = self.args.max_token_length + 2 if self.args.max_token_length else self.tokenizers[0].model_max_length
        maker = SimpleNamespace(tokenizer_max_length=length)
        ids = [
            torch.stack([train_util.BaseDataset.get_input_ids(maker, prompt, tokenizer) for prompt in prompts]).to(
                encoder.device
            )
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        dtype = self.weight_dtype
        if not self.is_sdxl:
            return train_util.get_hidden_states(self.args, ids[0], self.tokenizers[0], self.text_encoders[0], dtype)
        return train_util.get_hidden_states_sdxl(
            self.args.max_token_length,
            *ids,
            *self.tokenizers,
            *self.text_encoders,
            dtype if self.args.full_fp16 else None,
            accelerator=self.accelerator,
        )
