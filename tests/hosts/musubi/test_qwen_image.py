"""The family of Qwen-Image on the host's own model, in small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Target, split
from spf_plugin.families.known import find
from spf_plugin.families.qwen_image import WORDS, QwenImage
from spf_plugin.seam import Call
from tests.hosts.dits.common import CAPTIONS, qwen_vl_tokenizer, shifted
from tests.hosts.dits.joint import Joint, off
from tests.hosts.dits.kinds import Planted
from tests.hosts.dits.places import PROMPTS, by_offsets
from tests.hosts.dits.planted import spread
from tests.hosts.musubi import classes

WIDTH, CHANNELS = 24, 16  # of the text, of the latents


@pytest.fixture(scope="module")
def utils() -> Any:
    return classes.module("qwen_image.qwen_image_utils")


def model(*, split_attention: bool = False, layers: int = 4) -> nn.Module:
    made = classes.module("qwen_image.qwen_image_model").QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
        attn_mode="torch",
        split_attn=split_attention,
    )
    return classes.filled(made, 3)


def call_of(utils: Any, words: list[Tensor], noisy: Tensor, *, split_attention: bool = False) -> Call:
    """As `QwenImageNetworkTrainer.call_dit` makes it of what lies in its caches: `[L, E]` of each sample."""
    lengths = [len(each) for each in words]
    hidden = nn.utils.rnn.pad_sequence(words, batch_first=True)
    mask = None
    if not split_attention and len(words) > 1:
        mask = torch.zeros(len(words), max(lengths), dtype=torch.bool)
        for i, length in enumerate(lengths):
            mask[i, :length] = True
    return Call(
        (),
        {
            "hidden_states": utils.pack_latents(noisy),
            "timestep": torch.linspace(0.2, 0.7, len(words)),
            "guidance": None,
            "encoder_hidden_states_mask": mask,
            "encoder_hidden_states": hidden,
            "img_shapes": [[(1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)]],
            "txt_seq_lens": lengths,
            "additional_t_cond": None,
        },
    )


def words(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


@pytest.mark.parametrize("split_attention", [False, True], ids=["masked", "split"])
@pytest.mark.parametrize("lengths", [(9,), (9, 17)], ids=["one", "two"])
def test_a_call_with_another_text_is_the_hosts_own_with_it(
    utils: Any, lengths: tuple[int, ...], split_attention: bool
) -> None:
    torch.manual_seed(0)
    made, noisy = model(split_attention=split_attention), torch.randn(len(lengths), CHANNELS, 1, 8, 12)
    family = find(made)
    assert isinstance(family, QwenImage)
    call = call_of(utils, words(*lengths), noisy, split_attention=split_attention)
    text = family.text(call)
    assert text["hidden_mask"].sum(dim=1).tolist() == list(lengths)
    assert classes.same(family.with_text(call, text), call)
    for others in ((5,) * len(lengths), tuple(range(25, 25 + len(lengths))), lengths[::-1]):
        wanted = call_of(utils, words(*others, seed=2), noisy, split_attention=split_attention)
        longer = {name: nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, 3)) for name, part in
                  family.text(wanted).items()}  # as a host pads to the longest of a larger batch  # fmt: skip
        for new in (family.text(wanted), longer, {name: part.double() for name, part in longer.items()}):
            assert classes.same(family.with_text(call, new), wanted)
        with torch.no_grad():
            assert torch.equal(family.with_text(call, longer).on(made), wanted.on(made))
        assert family.text_mask(wanted).sum(dim=1).tolist() == list(others)
        assert family.text_mask(wanted).shape == (len(others), family.length(text)) == (len(others), WORDS)


def test_packed_latents_are_unpacked_as_the_host_does_it(utils: Any) -> None:
    torch.manual_seed(0)
    made, noisy = model(layers=1), torch.randn(2, CHANNELS, 1, 8, 12)
    family, call = QwenImage(made), call_of(utils, words(9, 17), noisy)
    assert torch.equal(family.noisy_latents(call), noisy[:, :, 0])
    with torch.no_grad():
        output = call.on(made)
    prediction = family.prediction(output, call)
    assert torch.equal(prediction, utils.unpack_latents(output, 8 * 8, 12 * 8, 8, is_layered=False)[:, :, 0])
    assert torch.equal(family.output(output, prediction, call), output)
    assert family.frames(call) == 1
    assert family.timesteps(call) is call.kwargs["timestep"]


@pytest.mark.parametrize("split_attention", [False, True], ids=["masked", "split"])
def test_queries_and_keys_are_those_of_the_models_own_attention(utils: Any, split_attention: bool) -> None:
    torch.manual_seed(0)
    call = call_of(utils, words(9, 17), torch.randn(2, CHANNELS, 1, 8, 12), split_attention=split_attention)
    made = Joint(model(split_attention=split_attention), call, [0, 0], [24, 24], [9, 17])
    assert off(made) < 1e-5


def test_a_planted_key_is_where_it_was_planted(utils: Any) -> None:
    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:
        """The blocks turn the key once more: what is planted is turned back."""
        output = output.clone()
        turn = made.pos_embed(call.kwargs["img_shapes"], call.kwargs["txt_seq_lens"], device=output.device)[1]
        turned = torch.view_as_complex(key.unflatten(-1, (-1, 2)).contiguous()) * turn[position].conj()
        output[:, position] = torch.view_as_real(turned).flatten(-2)
        return output

    torch.manual_seed(0)
    made, size = model(), (8, 12)
    call = call_of(utils, words(9), shifted(1, CHANNELS, 1, *size))
    found = spread(Planted(made, call, ["all"], 4, range(9, WORDS), WORDS, size, plant), "all")
    assert found["grid"] == (4, 6)
    assert found["left"] > 0.6
    assert found["right"] < 0.1
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)
    assert found["padding"] == 0


def test_the_layers() -> None:
    made = model(layers=8)
    family = QwenImage(made)
    assert len(family.layers("all")) == 8
    assert [layer.name for layer in family.layers("last")] == [f"transformer_blocks.{i}.attn" for i in (4, 5, 6)]
    assert all(type(layer) is nn.Linear for layer in family.linear_layers())
    assert len(list(family.linear_layers())) == 8 * (8 + 2 + 4)  # attention, modulation, two MLPs
    inner = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out")
    assert classes.crossing(made, family) == [f"transformer_blocks.{i}.attn.{name}" for i in range(8) for name in inner]
    del made.pos_embed
    assert not QwenImage.fits(made)


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_spans_are_those_of_the_tokenizer(utils: Any, tmp_path: Path, full: bool) -> None:
    """In what the host's own encoder keeps of its template, with an encoder that gives back the token ids."""
    from transformers import Qwen2TokenizerFast

    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    )
    qwen_vl_tokenizer([*[template] * 8, *CAPTIONS * 3], tmp_path / "qwen")
    tokenizer = Qwen2TokenizerFast.from_pretrained(tmp_path / "qwen")

    class Echo:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(hidden_states=[input_ids[..., None].float()])

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for name, caption in {**PROMPTS, "too long": "a red hat, blonde hair, " * 200}.items():
        prompt = split(caption, [Target("blonde hair")])
        text = prompt.full if full else prompt.base
        kept, mask = utils.get_qwen_prompt_embeds(tokenizer, Echo(), text)
        ids = kept[0, : int(mask.sum()), 0].long().tolist()
        whole = tokenizer(template + text, return_offsets_mapping=True)
        dropped = len(tokenizer(template).input_ids)
        count = min(len(whole.input_ids) - dropped, WORDS)
        assert ids[:count] == whole.input_ids[dropped : dropped + count], name  # so these are the places
        begin = len(template)
        places = [(start - begin, stop - begin) for start, stop in whole.offset_mapping[dropped : dropped + count]]
        spans = QwenImage(nn.Module()).spans(prompt, tokenize, WORDS, full=full)
        assert (list(spans.phrases), spans.target) == by_offsets(prompt, places, full=full), name
        assert not "".join(text[start:stop] for start, stop in places[spans.end :]).strip(), name
        assert spans.target or not full
