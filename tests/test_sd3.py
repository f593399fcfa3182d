"""The family of SD3 on made-up calls: what its text is made of, and what the host drops of it. The real models are in
`tests/hosts`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Target, split
from spf_plugin.enhancement.decoders import LinearDecoder
from spf_plugin.families import latents
from spf_plugin.families.sd3 import CLIP, SD3
from spf_plugin.hosts.kohya.trainers import DITS
from spf_plugin.seam import Call
from spf_plugin.text import TextSide

CLIP_L, CLIP_G, WIDTH, T5 = 3, 5, 16, 10  # widths, and T5's positions


def parts(seed: int) -> dict[str, Tensor]:
    """Of two prompts, as the host's encoders give them: nothing is exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "l": (2, CLIP, CLIP_L), "g": (2, CLIP, CLIP_G), "t5": (2, T5, WIDTH), "l_pooled": (2, CLIP_L),
        "g_pooled": (2, CLIP_G),
    }  # fmt: skip
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def call_of(of: dict[str, Tensor]) -> Call:
    """As the host calls the model: CLIP's states side by side, filled up with zeros, then T5's."""
    context = torch.zeros(2, CLIP + T5, WIDTH)
    context[:, :CLIP, :CLIP_L] = of["l"]
    context[:, :CLIP, CLIP_L : CLIP_L + CLIP_G] = of["g"]
    context[:, CLIP:] = of["t5"]
    pooled = torch.cat([of["l_pooled"], of["g_pooled"]], dim=1)
    return Call((torch.randn(2, 16, 4, 6), torch.tensor([500.0, 250.0])), {"context": context, "y": pooled})


def text_of(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `encode` of the host's names gives it."""
    hidden, pooled = torch.cat([of["l"], of["g"]], dim=2), torch.cat([of["l_pooled"], of["g_pooled"]], dim=1)
    return {"hidden": hidden, "t5": of["t5"], "pooled": pooled}


def same(a: Call, b: Call) -> bool:
    return all(torch.equal(a.kwargs[name], b.kwargs[name]) for name in ("context", "y")) and a.args is b.args


def test_a_call_with_another_text_is_the_hosts_own_with_it() -> None:
    family, one, other = SD3(nn.Module()), parts(1), parts(2)
    call, wanted = call_of(one), call_of(other)
    wanted = Call(call.args, wanted.kwargs)
    assert same(family.with_text(call, text_of(other)), wanted)
    assert family.text(call).keys() == text_of(one).keys()
    assert all(torch.equal(part, text_of(one)[name]) for name, part in family.text(call).items())
    assert family.length(text_of(one)) == CLIP + T5
    assert bool(family.text_mask(call).all())
    # In a step with trained CLIPs and a cached T5 there is nothing new of T5.
    without = {name: part for name, part in text_of(other).items() if name != "t5"}
    assert same(family.with_text(call, without), Call(call.args, call_of({**other, "t5": one["t5"]}).kwargs))
    halves = {name: part.to(torch.bfloat16) for name, part in text_of(other).items()}
    assert {part.dtype for part in family.text(family.with_text(call, halves)).values()} == {torch.float32}


def test_what_the_host_drops_of_a_text_the_reference_misses_as_well() -> None:
    """Of the first sample CLIP-G and T5; of the second CLIP-L, or everything."""
    family, one, other = SD3(nn.Module()), parts(1), parts(2)
    gone = {0: ("g", "g_pooled", "t5"), 1: ("l", "l_pooled")}
    for sample, names in gone.items():
        for name in names:
            one[name][sample] = other[name][sample] = 0
    call = call_of(one)
    assert same(family.with_text(call, text_of(parts(2))), Call(call.args, call_of(other).kwargs))
    assert family.dropped(family.text(call)) == [False, False]
    mask = family.text_mask(call)
    assert mask[0, :CLIP].all()
    assert not mask[0, CLIP:].any()  # no words are there to compare
    assert mask[1].all()
    for name in one:
        one[name][1] = 0
    assert family.dropped(family.text(call_of(one))) == [False, True]


class Words:
    """CLIP has a token a word, T5 one a letter."""

    prefix = ""

    def tokenize(self, text: str, which: int = 0) -> list[int]:
        return [1] * (len(text.split()) if which == 0 else sum(map(str.isalpha, text)))


def test_a_phrase_has_the_positions_of_both_encoders() -> None:
    family, caption = SD3(nn.Module()), "red hat, blonde hair"
    text = {"hidden": torch.zeros(1, CLIP, 8), "t5": torch.zeros(1, 40, 16)}
    side = TextSide(Words(), family, [Target("blonde hair")], lambda: None)  # type: ignore[arg-type]
    batch = side.for_batch([caption], {**text, "hidden": text["hidden"] + 1})
    assert split(caption, [Target("blonde hair")]).phrases == ["red hat"]

    def positions(group: Tensor) -> list[int]:
        return group.nonzero().flatten().tolist()

    phrase, end, target = batch.full_groups[0].unbind(1)
    assert positions(phrase) == [1, 2, *range(CLIP, CLIP + 6)]
    assert positions(target) == [3, 4, *range(CLIP + 6, CLIP + 16)]
    assert positions(end) == [*range(5, CLIP), *range(CLIP + 16, CLIP + 40)]
    assert positions(batch.base_groups[0, :, 1]) == [*range(3, CLIP), *range(CLIP + 6, CLIP + 40)]


def test_pictures_have_colours_where_the_vae_is_sd3s() -> None:
    def vae(*widths: int) -> SimpleNamespace:
        """As sd-scripts' own class has it: no config, and the widths in its stages' blocks."""
        stages = [SimpleNamespace(block=[None, SimpleNamespace(out_channels=width)]) for width in widths]
        return SimpleNamespace(encoder=SimpleNamespace(down=stages))

    assert latents.SD3.is_of(vae(128, 256, 512, 512))
    assert not latents.SD3.is_of(vae(32, 64, 128, 128))
    assert not latents.SD3.is_of(None)
    assert LinearDecoder.of(latents.SD3)(torch.randn(1, 16, 4, 6)).shape == (1, 3, 4, 6)


def test_prompts_are_encoded_as_the_host_encodes_its_own() -> None:
    """What it caches with its masks, a step without them, whatever they are; and SPF's prompts are never dropped."""

    def options(*, cached: bool, clip_trained: bool) -> tuple[bool, bool, bool]:
        args = SimpleNamespace(
            cache_text_encoder_outputs=cached,
            network_train_unet_only=not clip_trained,
            apply_lg_attn_mask=True,
            apply_t5_attn_mask=True,
        )
        found = DITS["Sd3NetworkTrainer"].encoding(args)
        return found["apply_lg_attn_mask"], found["apply_t5_attn_mask"], found["enable_dropout"]

    assert options(cached=True, clip_trained=False) == (True, True, False)
    assert options(cached=True, clip_trained=True) == (False, True, False)
    assert options(cached=False, clip_trained=False) == (False, False, False)
