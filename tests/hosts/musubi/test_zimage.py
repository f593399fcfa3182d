"""The family of Z-Image on the host's own model, in small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Target, split
from spf_plugin.families.known import find
from spf_plugin.families.zimage import LENGTH, WORDS, ZImage
from spf_plugin.seam import Call
from tests.hosts.dits.common import CAPTIONS, qwen_vl_tokenizer, shifted
from tests.hosts.dits.joint import Joint, off
from tests.hosts.dits.kinds import Planted
from tests.hosts.dits.places import PROMPTS, by_offsets
from tests.hosts.dits.planted import spread
from tests.hosts.musubi import classes
from tests.hosts.musubi.zimage import CHAT

WIDTH = 64  # of the text
SIZE = (16, 24)


def model(layers: int = 4, *, keys: int = 4) -> nn.Module:
    """Of four heads of queries, and so many of keys; as published they are as many."""
    made = classes.module("zimage.zimage_model").ZImageTransformer2DModel(
        dim=96, n_layers=layers, n_refiner_layers=1, n_heads=4, n_kv_heads=keys, cap_feat_dim=WIDTH, axes_dims=[8, 8, 8]
    )
    return classes.filled(made, 3)


def call_of(words: list[Tensor], noisy: Tensor) -> Call:
    """As `ZImageNetworkTrainer.call_dit` makes it of what lies in its caches: `[L, E]` of each sample."""
    lengths, patches = [len(each) for each in words], (noisy.shape[-2] // 2) * (noisy.shape[-1] // 2)
    longest, mask = max(lengths), None
    if len(words) > 1:
        longest = -(-(longest + patches) // 32) * 32 - patches
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    hidden = torch.stack([nn.functional.pad(each, (0, 0, 0, longest - len(each))) for each in words])
    time = torch.linspace(0.2, 0.7, len(words))
    return Call((), {"x": noisy[:, :, None], "t": time, "cap_feats": hidden, "cap_mask": mask})


def words(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def test_a_call_with_another_text_is_the_model_with_it() -> None:
    """One sample has no padding. Of several the padding is what it was, so that the patches stay where they are."""
    torch.manual_seed(0)
    made = model()
    family = find(made)
    assert isinstance(family, ZImage)
    one = call_of(words(9), torch.randn(1, 16, *SIZE))
    other = call_of(words(5, seed=2), one.kwargs["x"][:, :, 0])
    text = {**family.text(other), "hidden_mask": torch.ones(1, 5, dtype=torch.bool)}
    changed = family.with_text(one, text)
    assert changed.kwargs["cap_mask"] is None
    with torch.no_grad():
        assert torch.equal(changed.on(made), other.on(made))
    assert family.text_mask(changed).sum(dim=1).tolist() == [5]

    two = call_of(words(9, 17), torch.randn(2, 16, *SIZE))
    length = two.kwargs["cap_feats"].shape[1]
    shorter = {"hidden": torch.stack(words(6, 6, seed=2)), "hidden_mask": torch.arange(6) < torch.tensor([[6], [4]])}
    changed = family.with_text(two, shorter)
    assert changed.kwargs["cap_feats"].shape[1] == changed.kwargs["cap_mask"].shape[1] == length
    assert family.text_mask(changed).sum(dim=1).tolist() == [6, 4]
    assert family.text_mask(changed).shape == (2, family.length(shorter)) == (2, LENGTH)
    longer = {"hidden": torch.stack(words(50, 50)), "hidden_mask": torch.ones(2, 50, dtype=torch.bool)}
    assert family.with_text(two, longer).kwargs["cap_feats"].shape[1] == 50
    most = call_of(words(WORDS, 3), torch.randn(2, 16, 2, 66))  # 33 patches: nothing needs more padding
    assert most.kwargs["cap_feats"].shape[1] == WORDS + 31
    assert family.text_mask(most).shape == (2, LENGTH)
    counted = family.text_mask(most.with_part(most.kwargs["cap_mask"].long(), 3, "cap_mask"))
    assert counted.dtype == torch.bool
    assert torch.equal(counted, family.text_mask(most))


def test_its_latents_and_its_time() -> None:
    torch.manual_seed(0)
    made, noisy = model(layers=1), torch.randn(2, 16, *SIZE)
    family, call = ZImage(made), call_of(words(9, 17), noisy)
    assert torch.equal(family.noisy_latents(call), noisy)
    assert torch.allclose(family.timesteps(call), torch.tensor([0.8, 0.3]))  # of noise
    with torch.no_grad():
        output = call.on(made)
    prediction = family.prediction(output, call)
    assert torch.equal(prediction, -output[:, :, 0])  # noise - image, as `Flow` has it
    assert torch.equal(family.output(output, prediction, call), output)
    assert family.frames(call) == 1


@pytest.mark.parametrize(("lengths", "keys"), [((9,), 4), ((9, 17), 4), ((9, 17), 2)], ids=["one", "two", "shared"])
def test_queries_and_keys_are_those_of_the_models_own_attention(lengths: tuple[int, ...], keys: int) -> None:
    torch.manual_seed(0)
    call = call_of(words(*lengths), torch.randn(len(lengths), 16, *SIZE))
    patches = SIZE[0] * SIZE[1] // 4
    assert off(Joint(model(keys=keys), call, [0] * len(lengths), [patches] * len(lengths), lengths)) < 1e-5


def test_a_planted_key_is_where_it_was_planted() -> None:
    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:
        """The blocks turn the key once more: what is planted is turned back."""
        output = output.clone()
        turn = made.rope_embedder(torch.tensor([[position + 1, 0, 0]]))[0].conj()
        turned = torch.view_as_complex(key.unflatten(-1, (-1, 2)).contiguous()) * turn
        output[:, SIZE[0] * SIZE[1] // 4 + position] = torch.view_as_real(turned).flatten(-2)
        return output

    torch.manual_seed(0)
    made, call = model(), call_of(words(9), shifted(1, 16, *SIZE))
    found = spread(Planted(made, call, ["all"], 5, range(9, LENGTH), LENGTH, SIZE, plant), "all")
    assert found["grid"] == (8, 12)
    assert found["left"] > 0.6
    assert found["right"] < 0.1
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)
    assert found["padding"] == 0


def test_the_layers() -> None:
    made = model(layers=8)
    family = ZImage(made)
    assert len(family.layers("all")) == 8
    assert [layer.name for layer in family.layers("last")] == [f"layers.{i}.attention" for i in (4, 5, 6)]
    assert len(list(family.linear_layers())) == 8 * (4 + 3 + 1)  # attention, MLP, modulation
    assert classes.crossing(made, family) == [
        f"layers.{i}.attention.{name}" for i in range(8) for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    del made.context_refiner
    assert not ZImage.fits(made)


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_are_those_of_the_tokenizer(tmp_path: Path, full: bool) -> None:
    """In what the host's own encoder gives, with a model that gives back the token ids."""
    from transformers import Qwen2TokenizerFast

    utils = classes.module("zimage.zimage_utils")
    qwen_vl_tokenizer([*CAPTIONS * 3, "user", "assistant"], tmp_path / "qwen")
    tokenizer = Qwen2TokenizerFast.from_pretrained(tmp_path / "qwen")
    tokenizer.chat_template = CHAT
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

    class Echo(nn.Linear):
        device = torch.device("cpu")

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(hidden_states=[input_ids[..., None].float(), None])

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for name, caption in {**PROMPTS, "too long": "a red hat, blonde hair, " * 200}.items():
        prompt = split(caption, [Target("blonde hair")])
        text = prompt.full if full else prompt.base
        kept, mask = utils.get_text_embeds(tokenizer, Echo(1, 1), text)
        whole = tokenizer(begin + text + end, return_offsets_mapping=True)
        count = min(len(whole.input_ids), WORDS)
        assert kept[0, : int(mask.sum()), 0].long().tolist() == whole.input_ids[:count], name  # so these are the places
        first, last = len(begin), len(begin) + len(text)
        places = [
            (start - first, stop - first) if first <= start < last else None
            for start, stop in whole.offset_mapping[:count]
        ]
        spans = ZImage(nn.Module()).spans(prompt.behind(begin), tokenize, LENGTH, full=full)
        assert (list(spans.phrases), spans.target) == by_offsets(prompt, places, full=full), name
        assert spans.target or not full
