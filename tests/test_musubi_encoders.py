"""What `spf cache-prompts` makes of musubi-tuner's text encoders, without a checkout: a language model whose states are
its token ids, behind functions as the host has them. `tests/hosts/musubi` has the host's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.errors import SPFError
from spf_plugin.hosts.musubi import encoders
from spf_plugin.hosts.musubi.encoders import Encoder

PREFIX, BEHIND, PADDING = "<system> draw <user>", "<end> <assistant>", 0
LENGTH = 16  # of all texts, where the host pads
PROMPT = "a woman, blonde hair"
CPU = torch.device("cpu")
Other = Callable[[list[int]], list[int]]
"""What a host makes of the ids that SPF counts in."""


def ids(text: str) -> list[int]:
    return [1 + sum(word.encode()) for word in text.split()]


class Tokenizer:
    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=ids(text))

    def apply_chat_template(self, chat: Sequence[Any], **_: Any) -> str:
        return f"{PREFIX} {chat[0]['content']} {BEHIND}"


class Language(nn.Module):
    """`[1, S]` ids -> `[1, S, 1]` states."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids[..., None].float()


def read(language: nn.Module, row: list[int]) -> Tensor:
    return language(input_ids=torch.tensor([row]))


def qwen_image(other: Other) -> dict[str, Any]:
    def embeds(_tokenizer: Any, model: Language, prompt: str) -> tuple[Tensor, Tensor]:
        states = read(model, ids(PREFIX) + other(ids(prompt)) + ids(BEHIND))[:, len(ids(PREFIX)) :]
        return states, torch.ones(states.shape[:2])

    return {
        "load_qwen2_5_vl": lambda *_, **__: (Tokenizer(), Language()),
        "get_qwen_prompt_embeds": embeds,
    }


def krea2(other: Other) -> dict[str, Any]:
    """Padding stands between the prompt and what the template has behind it."""
    dropped, behind = len(ids(PREFIX)), len(ids(BEHIND))

    def embeds(encoder: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        words = other(ids(prompts[0]))[: LENGTH - behind]
        padding = LENGTH - behind - len(words)
        states = read(encoder.qwen, ids(PREFIX) + words + [PADDING] * padding + ids(BEHIND))[:, dropped:]
        mask = torch.tensor([[True] * len(words) + [False] * padding + [True] * behind])
        return states[..., None].expand(-1, -1, 2, 3), mask  # of two layers

    made = SimpleNamespace(
        tokenizer=Tokenizer(), qwen=Language(), max_length=LENGTH,
        prompt_template_encode_start_idx=dropped, prompt_template_encode_suffix_start_idx=behind,
    )  # fmt: skip
    return {"load_krea2_text_encoder": lambda *_, **__: made, "get_krea2_prompt_embeds": embeds}


class Embedder:
    """Mistral's mark behind the prompt is one token, and its padding stands before all."""

    dtype = torch.float32

    def __init__(self, other: Other, mistral: bool):
        self.other, self.mistral = other, mistral
        self.model = self.mistral3 = Language()
        self.tokenizer: Any = SimpleNamespace(tokenizer=Tokenizer(), apply_chat_template=self.framed)
        if not mistral:
            self.tokenizer = Tokenizer()

    def format_input(self, prompts: list[str]) -> list[str]:
        return prompts

    def framed(self, prompt: str, **_: Any) -> str:
        return f"{PREFIX} {prompt} </end>" if self.mistral else f"{PREFIX} {prompt} {BEHIND}"

    def __call__(self, prompts: list[str]) -> Tensor:
        before = len(ids(PREFIX))
        row = ids(self.framed(prompts[0]))
        row = (row[:before] + self.other(row[before:]))[:LENGTH]
        padding = [PADDING] * (LENGTH - len(row))
        return read(self.model, padding + row if self.mistral else row + padding)


def flux_2(other: Other, mistral: bool) -> dict[str, Any]:
    info = SimpleNamespace(qwen_variant=None if mistral else "4b")
    return {
        "FLUX2_MODEL_INFO": {"any": info},
        "load_text_embedder": lambda *_, **__: Embedder(other, mistral),
    }


HOSTS: dict[str, tuple[Callable[[Other], dict[str, Any]], str, str, Callable[..., Encoder]]] = {
    "qwen_image": (qwen_image, "qwen_image.qwen_image_utils", "vl_embed", encoders.qwen_image),
    "krea2": (krea2, "krea2.krea2_utils", "krea2_vl_embed", encoders.krea2),
    "klein": (lambda other: flux_2(other, False), "flux_2.flux2_utils", "ctx_vec", encoders.flux_2),
    "dev": (lambda other: flux_2(other, True), "flux_2.flux2_utils", "ctx_vec", encoders.flux_2),
}


def loaded(name: str, monkeypatch: pytest.MonkeyPatch, other: Other = lambda row: row) -> Encoder:
    functions, where, _, load = HOSTS[name]
    types = {"str_to_dtype": lambda *_: torch.float32}
    for path, members in ((where, functions(other)), ("utils.model_utils", types)):
        package, _, module = path.partition(".")
        made = ModuleType(f"musubi_tuner.{path}")
        vars(made).update(members)
        for part, value in (("musubi_tuner", ModuleType("musubi_tuner")), (f"musubi_tuner.{package}", None)):
            if value is not None or part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, value or ModuleType(part))
        monkeypatch.setattr(sys.modules[f"musubi_tuner.{package}"], module, made, raising=False)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    options = {"text_encoder": "x", "text_encoder_dtype": None, "model_version": "any"}
    return load(SimpleNamespace(**options, fp8_vl=False, fp8_text_encoder=False), CPU)


@pytest.mark.parametrize("name", HOSTS)
def test_the_vector_of_a_phrase_is_of_its_words_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one: of Qwen-Image the states of the words come first, and those are few behind them."""
    encoder, key = loaded(name, monkeypatch), HOSTS[name][2]
    for prompt in (PROMPT, "hair", "very " * 40):
        tensors = encoder.encode(prompt)
        room = {"krea2": LENGTH - len(ids(BEHIND))}.get(name, LENGTH - len(ids(PREFIX)))
        assert ("pooled" in tensors) == (name != "qwen_image")
        if "pooled" in tensors:
            read = ids(prompt)[:room]
            assert tensors["pooled"].unique().tolist() == pytest.approx([sum(read) / len(read)])
            assert len(tensors["pooled"]) == tensors[key][0].numel()


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(
    "other", [lambda row: [row[0] + 1, *row[1:]], lambda row: [PADDING, *row]], ids=["other tokens", "another place"]
)
def test_a_host_that_reads_other_tokens_is_refused(name: str, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SPFError, match="reads 'a woman, blonde hair' in other tokens than SPF counts"):
        loaded(name, monkeypatch, other).encode(PROMPT)
