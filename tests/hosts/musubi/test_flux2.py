"""The family of FLUX.2 on the host's own model, in small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Target, split
from spf_plugin.families.flux2 import Flux2
from spf_plugin.families.known import find
from spf_plugin.families.rotary import turned
from spf_plugin.seam import Call
from tests.hosts.dits.common import shifted
from tests.hosts.dits.joint import Joint, off
from tests.hosts.dits.kinds import Planted
from tests.hosts.dits.places import PROMPTS, by_offsets
from tests.hosts.dits.planted import spread
from tests.hosts.musubi import classes, flux2_dev, flux2_klein

WIDTH, CHANNELS, LENGTH, SIZE = 48, 128, 20, (8, 12)  # of the text, of the latents, of all texts, of the latents


@pytest.fixture(scope="module")
def models() -> Any:
    return classes.module("flux_2.flux2_models")


def model(models: Any, *, dev: bool = False, double: int = 3, single: int = 4) -> nn.Module:
    params = models.Flux2Params(
        context_in_dim=WIDTH,
        hidden_size=64,
        num_heads=2,
        depth=double,
        depth_single_blocks=single,
        axes_dim=[8, 8, 8, 8],
        use_guidance_embed=dev,
    )
    return classes.filled(models.Flux2(params, attn_mode="torch"), 3)


def call_of(words: Tensor, noisy: Tensor) -> Call:
    """As `Flux2NetworkTrainer.call_dit` makes it of what lies in its caches: `[B, T, E]` and `[B, C, h, w]`."""
    batch, (h, w) = len(words), noisy.shape[-2:]
    one = torch.arange(1)

    def ids(*of: Tensor) -> Tensor:
        return torch.cartesian_prod(*of).expand(batch, -1, -1)

    return Call(
        (),
        {
            "x": noisy.flatten(2).transpose(1, 2),
            "x_ids": ids(one, torch.arange(h), torch.arange(w), one),
            "timesteps": torch.linspace(0.2, 0.7, batch),
            "ctx": words,
            "ctx_ids": ids(one, one, one, torch.arange(words.shape[1])),
            "guidance": torch.ones(batch),
        },
    )


def words(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dev", [True, False], ids=["dev", "klein"])
def test_a_call_with_another_text_is_the_hosts_own_with_it(models: Any, dev: bool) -> None:
    torch.manual_seed(0)
    made, noisy = model(models, dev=dev), torch.randn(2, CHANNELS, *SIZE)
    family = find(made)
    assert isinstance(family, Flux2)
    call, other = call_of(words(2), noisy), call_of(words(2, seed=2), noisy)
    assert classes.same(family.with_text(call, family.text(call)), call)
    assert classes.same(family.with_text(call, family.text(other)), other)
    assert classes.same(family.with_text(call, {"hidden": words(2, seed=2).double(), "pooled": noisy}), other)
    assert family.length(family.text(call)) == LENGTH
    assert family.text_mask(call) is None  # the blocks attend to padding
    with torch.no_grad():
        assert not torch.equal(call.on(made), other.on(made))


def test_latents_are_packed_as_the_host_does_it(models: Any) -> None:
    torch.manual_seed(0)
    made, noisy = model(models), torch.randn(2, CHANNELS, *SIZE)
    family, call = find(made), call_of(words(2), noisy)
    assert torch.equal(family.noisy_latents(call), noisy)
    with torch.no_grad():
        output = call.on(made)
    prediction = family.prediction(output, call)
    assert torch.equal(prediction, output.transpose(1, 2).unflatten(2, SIZE))
    assert torch.equal(family.output(output, prediction, call), output)
    assert family.grid(96, SIZE) == SIZE
    assert family.frames(call) == 1
    assert family.timesteps(call) is call.kwargs["timesteps"]


@pytest.mark.parametrize("dev", [True, False], ids=["dev", "klein"])
def test_queries_and_keys_are_those_of_the_models_own_attention(models: Any, dev: bool) -> None:
    torch.manual_seed(0)
    call = call_of(words(2), torch.randn(2, CHANNELS, *SIZE))
    assert off(Joint(model(models, dev=dev), call, [LENGTH] * 2, [0, 0], [LENGTH] * 2)) < 1e-5


@pytest.mark.parametrize("which", ["double_blocks", "single_blocks"])
def test_a_planted_key_is_where_it_was_planted(models: Any, which: str) -> None:
    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:
        """The blocks turn the key once more: what is planted is turned back."""
        output = output.clone()
        turn = made.pe_embedder(call.kwargs["ctx_ids"][:, position : position + 1]).mT  # type: ignore[operator]
        output[:, :, position] = turned(key[None, :, None], turn)[0, :, 0]
        return output

    torch.manual_seed(0)
    made, call = model(models), call_of(words(1), shifted(1, CHANNELS, *SIZE))
    found = spread(Planted(made, call, [which], 5, range(9, LENGTH), LENGTH, SIZE, plant), which)
    assert found["grid"] == SIZE
    assert found["left"] > 0.6
    assert found["right"] < 0.1
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)


def test_the_layers(models: Any) -> None:
    made = model(models, double=8, single=2)
    family = find(made)
    assert len(family.layers("all")) == 10
    assert [layer.name for layer in family.layers("last")] == [f"double_blocks.{i}" for i in (4, 6, 7)]
    assert [layer.name for layer in find(model(models, double=5)).layers("last")] == [
        f"double_blocks.{i}" for i in (2, 3, 4)
    ]
    assert all(type(layer) is nn.Linear for layer in family.linear_layers())
    assert len(list(family.linear_layers())) == 8 * 8 + 2 * 2
    attention = [f"{side}_attn.{name}" for side in ("img", "txt") for name in ("qkv", "proj")]
    assert classes.crossing(made, family) == [f"double_blocks.{i}.{name}" for i in range(8) for name in attention]
    del made.double_stream_modulation_img
    assert not Flux2.fits(made)


class Echo:
    """Gives back the token ids for states."""

    device, dtype = torch.device("cpu"), torch.float32

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids[..., None].float()] * 31)


def embedder(folder: Path, *, dev: bool) -> tuple[Any, Any, Any]:
    """The host's own with that for a language model, its tokenizer, and a prompt in its template."""
    utils = classes.module("flux_2.flux2_utils")
    from transformers import AutoProcessor, Qwen2TokenizerFast

    if dev:
        flux2_dev.processor(folder)
        made = utils.Mistral3Embedder.__new__(utils.Mistral3Embedder)
        nn.Module.__init__(made)
        made.mistral3, made.tokenizer = Echo(), AutoProcessor.from_pretrained(folder, use_fast=False)

        def framed(text: str) -> str:
            return made.tokenizer.apply_chat_template(made.format_input([text])[0], add_generation_prompt=False)

        return made, made.tokenizer.tokenizer, framed
    flux2_klein.tokenizer(folder)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)

    def chat(text: str) -> str:
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    return utils.Qwen3Embedder(tokenizer, Echo()), tokenizer, chat


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
@pytest.mark.parametrize("dev", [True, False], ids=["dev", "klein"])
def test_spans_are_those_of_the_tokenizer(tmp_path: Path, dev: bool, full: bool) -> None:
    """In what the host's own encoder gives its language model, padding and template and all."""
    made, tokenizer, framed = embedder(tmp_path, dev=dev)
    denoiser = nn.Module()
    denoiser.use_guidance_embed = dev  # type: ignore[assignment]

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    before, behind = framed("MARK").split("MARK")
    for name, caption in {**PROMPTS, "too long": "a red hat, blonde hair, " * 200}.items():
        prompt = split(caption, [Target("blonde hair")])
        text = prompt.full if full else prompt.base
        (row,) = made([text])[..., 0].long().tolist()
        whole = tokenizer(before + text + behind, add_special_tokens=False, return_offsets_mapping=True)
        count = min(len(whole.input_ids), len(row))
        first = len(row) - count if dev else 0
        assert row[first : first + count] == whole.input_ids[:count], name  # so these are the places
        places: list[tuple[int, int] | None] = [None] * len(row)
        for i, (start, stop) in enumerate(whole.offset_mapping[:count]):
            if len(before) < stop <= len(before) + len(text):
                places[first + i] = max(start - len(before), 0), stop - len(before)
        spans = Flux2(denoiser).spans(prompt.behind(before), tokenize, len(row), full=full)
        assert (list(spans.phrases), spans.target) == by_offsets(prompt, places, full=full), name
        assert spans.end == 1 + max(i for i, place in enumerate(places) if place), name
        assert list(spans.gap) == list(range(first)), name
        assert spans.target or not full
