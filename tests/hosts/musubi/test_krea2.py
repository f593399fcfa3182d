"""The family of Krea 2 on the host's own model, in small."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Target, split
from spf_plugin.families.known import find
from spf_plugin.families.krea2 import WORDS, Krea2
from spf_plugin.seam import Call
from tests.hosts.dits.common import CAPTIONS, qwen_vl_tokenizer, shifted
from tests.hosts.dits.hunyuan_image import TEMPLATE
from tests.hosts.dits.joint import Joint, off
from tests.hosts.dits.kinds import Planted
from tests.hosts.dits.places import PROMPTS, by_offsets
from tests.hosts.dits.planted import spread
from tests.hosts.musubi import classes

LAYERS, WIDTH, CHANNELS, SIZE = 3, 24, 16, (8, 12)  # of the text, of it, of the latents, of them
PATCHES, SHARED = 24, 2  # heads of queries that have the same key


@pytest.fixture(scope="module")
def sampling() -> Any:
    return classes.module("krea2.krea2_sampling")


def model(*, split_attention: bool = False, layers: int = 4) -> nn.Module:
    module = classes.module("krea2.krea2_mmdit")
    config = module.SingleMMDiTConfig(
        features=128,
        tdim=32,
        txtdim=WIDTH,
        heads=4,
        kvheads=4 // SHARED,
        multiplier=1,
        layers=layers,
        patch=2,
        channels=CHANNELS,
        txtheads=2,
        txtkvheads=2,
        txtlayers=LAYERS,
    )
    made = classes.filled(module.SingleStreamDiT(config, split_attn=split_attention), 3)
    for part in made.modules():
        if isinstance(part, module.RMSNorm):
            part.scale.data -= 1  # the norm adds it
    return made


def call_of(sampling: Any, words: list[Tensor], noisy: Tensor) -> Call:
    """As `Krea2NetworkTrainer.call_dit` makes it of what lies in its caches: `[L, layers, E]` of each sample."""
    context = nn.utils.rnn.pad_sequence(words, batch_first=True)
    text_mask = torch.arange(context.shape[1]) < torch.tensor([[len(each)] for each in words])
    image, ids, mask = sampling.prepare(noisy, context.shape[1], 2, text_mask)
    times = torch.linspace(0.2, 0.7, len(words))
    return Call((), {"img": image, "context": context, "t": times, "pos": ids, "mask": mask})


def words(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, LAYERS, WIDTH, generator=generator) for length in lengths]


@pytest.mark.parametrize("lengths", [(9,), (9, 17)], ids=["one", "two"])
def test_a_call_with_another_text_is_the_hosts_own_with_it(sampling: Any, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    made, noisy = model(), torch.randn(len(lengths), CHANNELS, *SIZE)
    family = find(made)
    assert isinstance(family, Krea2)
    call = call_of(sampling, words(*lengths), noisy)
    text = family.text(call)
    assert text["hidden_mask"].sum(dim=1).tolist() == list(lengths)
    assert classes.same(family.with_text(call, text), call)
    for others in ((5,) * len(lengths), tuple(range(25, 25 + len(lengths))), lengths[::-1]):
        wanted = call_of(sampling, words(*others, seed=2), noisy)
        new = family.text(wanted)
        assert classes.same(family.with_text(call, new), wanted)
        assert classes.same(family.with_text(call, {name: part.double() for name, part in new.items()}), wanted)
        with torch.no_grad():
            assert torch.equal(family.with_text(call, new).on(made), wanted.on(made))
        assert family.text_mask(wanted).sum(dim=1).tolist() == list(others)
        assert family.text_mask(wanted).shape == (len(others), family.length(text)) == (len(others), WORDS)


def test_latents_are_packed_as_the_host_does_it(sampling: Any) -> None:
    torch.manual_seed(0)
    made, noisy = model(), torch.randn(2, CHANNELS, *SIZE)
    family, call = find(made), call_of(sampling, words(9, 17), noisy)
    assert torch.equal(family.noisy_latents(call), noisy)
    with torch.no_grad():
        output = call.on(made)
    prediction = family.prediction(output, call)
    assert prediction.shape == noisy.shape
    assert torch.equal(family.output(output, prediction, call), output)
    assert torch.equal(sampling.prepare(prediction, 1, 2, torch.ones(2, 1).bool())[0], output)
    assert family.grid(PATCHES, SIZE) == (4, 6)
    assert family.frames(call) == 1
    assert family.timesteps(call) is call.kwargs["t"]


@pytest.mark.parametrize("split_attention", [False, True], ids=["masked", "split"])
def test_queries_and_keys_are_those_of_the_models_own_attention(sampling: Any, split_attention: bool) -> None:
    """With different numbers of words."""
    torch.manual_seed(0)
    call = call_of(sampling, words(9, 17), torch.randn(2, CHANNELS, *SIZE))
    made = Joint(model(split_attention=split_attention), call, [0, 0], [PATCHES] * 2, [9, 17])
    assert off(made) < 1e-5


def test_a_planted_key_is_where_it_was_planted(sampling: Any) -> None:
    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:
        """One for the heads that share it. The words are behind the patches, and the blocks do not turn their keys."""
        output = output.clone()
        output[:, :, PATCHES + position] = key[::SHARED]
        return output

    torch.manual_seed(0)
    call = call_of(sampling, words(9), shifted(1, CHANNELS, *SIZE))
    found = spread(Planted(model(), call, ["all"], 4, range(9, WORDS), WORDS, SIZE, plant, shared=SHARED), "all")
    assert found["grid"] == (4, 6)
    assert found["left"] > 0.6
    assert found["right"] < 0.1
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)
    assert found["padding"] == 0


def test_the_layers() -> None:
    made = model(layers=8)
    family = find(made)
    assert len(family.layers("all")) == 8
    assert [layer.name for layer in family.layers("last")] == [f"blocks.{i}.attn" for i in (4, 5, 6)]
    assert all(type(layer) is nn.Linear for layer in family.linear_layers())
    assert len(list(family.linear_layers())) == 8 * 8  # queries, keys, values, gate, out; three of the MLP
    assert classes.crossing(made, family) == [
        f"blocks.{i}.attn.{name}" for i in range(8) for name in ("wq", "wk", "wv", "gate", "wo")
    ]
    del made.txtfusion
    assert not Krea2.fits(made)


class Echo(nn.Module):
    """Gives back the token ids for states."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids[..., None].float()] * 36)


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_are_those_of_the_tokenizer(tmp_path: Path, full: bool) -> None:
    """In what the host's own encoder keeps of its template, with an encoder that gives back the token ids."""
    import transformers

    absent = [name for name in ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration") if not hasattr(transformers, name)]
    with mock.patch.multiple(transformers, create=True, **dict.fromkeys(absent)) if absent else nullcontext():
        encoder = classes.module("krea2.krea2_encoder")
    qwen_vl_tokenizer([*[TEMPLATE, "assistant"] * 8, *CAPTIONS * 3], tmp_path / "qwen")
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(tmp_path / "qwen")
    made = encoder.Qwen3VLConditioner(Echo(), tokenizer, tokenizer)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for name, caption in {**PROMPTS, "too long": "a red hat, blonde hair, " * 200}.items():
        prompt = split(caption, [Target("blonde hair")])
        text = prompt.full if full else prompt.base
        states, mask = made([text])
        row = states[0][mask[0]][:, 0, 0].long().tolist()  # what the host caches
        whole = tokenizer(made.prompt_template_encode_prefix + text, return_offsets_mapping=True)
        begin, dropped = len(made.prompt_template_encode_prefix), made.prompt_template_encode_start_idx
        assert len(row) <= WORDS
        words = len(row) - made.prompt_template_encode_suffix_start_idx
        assert row[:words] == whole.input_ids[dropped : dropped + words], name  # so these are the places
        places = [(start - begin, stop - begin) for start, stop in whole.offset_mapping[dropped : dropped + words]]
        spans = Krea2(nn.Module()).spans(prompt, tokenize, WORDS, full=full)
        assert (list(spans.phrases), spans.target) == by_offsets(prompt, places, full=full), name
        assert not "".join(text[start:stop] for start, stop in places[spans.end :]).strip(), name
        assert spans.target or not full
