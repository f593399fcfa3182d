"""The family of Wan on the host's own model, in small: pictures and clips, 2.1 and 2.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spf_plugin.core.prompt import Target, split
from spf_plugin.core.sfcm import mean_maps
from spf_plugin.families.known import find
from spf_plugin.families.wan import Wan
from spf_plugin.probe import capture, pass_of
from spf_plugin.seam import Call
from tests.hosts.dits.common import CAPTIONS, t5_tokenizer
from tests.hosts.dits.places import PROMPTS, by_offsets
from tests.hosts.dits.planted import STRENGTH
from tests.hosts.musubi import classes

WIDTH, CHANNELS, LENGTH = 24, 16, 512  # of the text, of the latents; positions that the text is filled up to
SIZE = (8, 12)


def model(version: str = "2.1", layers: int = 4) -> nn.Module:
    made = classes.module("wan.modules.model").WanModel(
        model_version=version,
        dim=64,
        ffn_dim=96,
        freq_dim=32,
        text_dim=WIDTH,
        num_heads=2,
        num_layers=layers,
        attn_mode="torch",
    )
    return classes.filled(made, 3)


def call_of(words: list[Tensor], noisy: Tensor) -> Call:
    """As `WanNetworkTrainer._call_dit` makes it."""
    times = torch.linspace(200.0, 700.0, len(words))
    length = noisy.shape[2] * noisy.shape[3] * noisy.shape[4] // 4
    named = {"t": times, "context": words, "clip_fea": None, "seq_len": length, "y": None}
    return Call((noisy,), named)


def words(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


class Attended(TorchFunctionMode):
    """Keeps the queries and keys `[B, heads, S, d]` of each call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("frames", [1, 3], ids=["picture", "clip"])
def test_a_call_with_another_text_is_the_hosts_own_with_it(version: str, frames: int) -> None:
    torch.manual_seed(0)
    made, noisy = model(version), torch.randn(2, CHANNELS, frames, *SIZE)
    family, call = find(made), call_of(words(9, 17), noisy)
    assert isinstance(family, Wan)
    text = family.text(call)
    assert text["hidden_mask"].sum(dim=1).tolist() == [9, 17]
    assert classes.same(family.with_text(call, text), call)
    for others in ((5, 5), (25, LENGTH), (17, 9)):
        wanted = call_of(words(*others, seed=2), noisy)
        longer = {
            name: nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, 3))
            for name, part in family.text(wanted).items()
        }
        for new in (family.text(wanted), longer, {name: part.double() for name, part in longer.items()}):
            assert classes.same(family.with_text(call, new), wanted)
        with torch.no_grad():
            ours, theirs = (each.on(made) for each in (family.with_text(call, longer), wanted))
        assert all(map(torch.equal, ours, theirs))
        mask = family.text_mask(wanted)
        assert mask.sum(dim=1).tolist() == list(others)
        assert mask.shape == (2, family.length(text)) == (2, LENGTH)


def test_frames_lie_one_above_the_other() -> None:
    torch.manual_seed(0)
    made, noisy = model(layers=1), torch.randn(2, CHANNELS, 3, *SIZE)
    family, call = Wan(made), call_of(words(9, 17), noisy)
    assert family.frames(call) == 3
    assert torch.equal(family.noisy_latents(call), torch.cat(noisy.unbind(2), dim=2))
    with torch.no_grad():
        output = call.on(made)
    prediction = family.prediction(output, call)
    assert torch.equal(prediction, torch.cat(torch.stack(output).unbind(2), dim=2))
    back = family.output(output, prediction, call)
    assert type(back) is type(output)
    assert all(map(torch.equal, back, output))
    assert family.timesteps(call) is call.kwargs["t"]
    assert float(family.schedule(None).level(torch.tensor([500.0]))) == 0.5


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_queries_and_keys_are_those_of_the_models_own_attention(version: str) -> None:
    """It computes in half precision; a block asks torch's attention twice, of itself and of the text."""
    torch.manual_seed(0)
    made, call = model(version), call_of(words(9, 17), torch.randn(2, CHANNELS, 3, *SIZE))
    family = Wan(made)
    layers = family.layers("all")
    with torch.no_grad(), capture(layers) as seen, Attended() as attention:
        call.on(made)
    assert len(attention.seen) == 2 * len(layers)
    for layer, (queries, keys) in zip(layers, attention.seen[1::2], strict=True):
        query, key = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], call)
        for ours, theirs in ((query, queries), (key, keys[:, :, :17])):
            assert torch.equal(ours.unflatten(-1, (layer.heads, -1)).transpose(1, 2).bfloat16(), theirs)
        assert all(torch.equal(keys[0, :, 9], keys[0, :, i]) for i in range(10, LENGTH))  # what is left out: zeros


def answering(query: Tensor, there: Tensor, heads: int) -> Tensor:
    """`[1, N, C]` -> the key `[C]` that answers 1 where it should, -1 elsewhere (least squares, of each head)."""
    wanted = torch.where(there, 1.0, -1.0)[:, None]
    by_head = query[0].unflatten(-1, (heads, -1)).transpose(0, 1)  # [heads, N, d]
    keys = [torch.linalg.lstsq(queries, wanted).solution[:, 0] for queries in by_head]
    return torch.cat(keys) * STRENGTH * by_head.shape[-1] ** 0.5


@pytest.mark.parametrize("where", ["one frame", "the left of every frame"])
@torch.no_grad()
def test_a_planted_key_is_where_it_was_planted(where: str) -> None:
    """Of a clip whose middle frame, or whose frames' left halves, differ from the rest."""
    torch.manual_seed(0)
    made, noisy = model(), torch.randn(1, CHANNELS, 3, *SIZE)
    there = torch.zeros(3, *SIZE, dtype=torch.bool)
    if where == "one frame":
        there[1] = True
    else:
        there[:, :, : SIZE[1] // 2] = True
    noisy[:, :, there] += 2
    family, call = Wan(made), call_of(words(9), noisy)
    layers = family.layers("all")
    groups = torch.zeros(1, LENGTH, 2)
    groups[0, 4, 0] = groups[0, 9:, 1] = 1
    patches = there[:, ::2, ::2].flatten()
    hooks = []
    for layer in layers:  # one after the other: each changes what the later ones see
        with capture(layers) as seen:
            call.on(made)
        key = answering(seen.queries[layer.name], patches, layer.heads)

        def plant(_module: nn.Module, _inputs: object, output: Tensor, key: Tensor = key) -> Tensor:
            output = output.clone()
            output[:, 4] = key
            return output

        hooks.append(layer.key.register_forward_hook(plant))
    with capture(layers) as seen:
        output = call.on(made)
    for hook in hooks:
        hook.remove()
    found = pass_of(family, layers, call, output, seen, groups)
    assert found.grids[0] == (3 * SIZE[0] // 2, SIZE[1] // 2)
    size = (3 * SIZE[0], SIZE[1])
    planted, padding = mean_maps(found.attention, found.grids, size, found.frames)[0].unflatten(1, (3, -1))
    assert float(planted[there].mean()) > 0.6
    assert float(planted[~there].mean()) < 0.12
    assert float(padding.abs().max()) == 0
    if where == "one frame":  # no row of the neighbours has a part of it
        assert float(planted[0, -1].mean()) == pytest.approx(float(planted[0, 0].mean()), abs=0.1)


def test_the_layers() -> None:
    made = model(layers=8)
    family = Wan(made)
    assert len(family.layers("all")) == 8
    assert [layer.name for layer in family.layers("last")] == [f"blocks.{i}.cross_attn" for i in (4, 5, 6)]
    assert len(list(family.linear_layers())) == 8 * (4 + 4 + 2)
    assert classes.crossing(made, family) == [f"blocks.{i}.cross_attn.{name}" for i in range(8) for name in "qkvo"]
    del made.text_len
    assert not Wan.fits(made)


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_are_those_of_the_tokenizer(tmp_path: Path, full: bool) -> None:
    """Of the host's own wrapper, which cuts, fills up, and ends with `</s>`."""
    t5_tokenizer(CAPTIONS * 3).save_pretrained(tmp_path / "umt5")
    for name, caption in PROMPTS.items():
        length = 24 if name == "cut off" else 64
        host = classes.module("wan.modules.tokenizers").HuggingfaceTokenizer(
            str(tmp_path / "umt5"), seq_len=length, clean="whitespace"
        )
        prompt = split(caption, [Target("blonde hair")])
        text = prompt.full if full else prompt.base
        ids, mask = host(text, return_mask=True, add_special_tokens=True)
        whole = host.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=length)
        count = int(mask.sum())
        assert ids[0, :count].tolist() == whole.input_ids, name
        places = [*whole.offset_mapping[:-1], None]

        def tokenize(part: str) -> list[int]:
            return host.tokenizer(part, add_special_tokens=False).input_ids  # noqa: B023

        spans = Wan(nn.Module()).spans(prompt, tokenize, length, full=full)
        assert (list(spans.phrases), spans.target) == by_offsets(prompt, places, full=full), name
        assert spans.end == count - 1
