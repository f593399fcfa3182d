"""What the families of FLUX.2 and Krea 2 say of text; `tests/hosts/musubi` has their models."""

from __future__ import annotations

import pytest
from torch import nn

from spf_plugin.core.prompt import Spans, Target, split
from spf_plugin.families import latents
from spf_plugin.families.flux2 import Flux2
from spf_plugin.families.krea2 import Krea2

PREFIX = "<begin> draw this: "  # four words
CAPTION = "a woman, blonde hair, red dress"  # a token a word


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def flux2(*, dev: bool, length: int, full: bool) -> Spans:
    model = nn.Module()
    model.use_guidance_embed = dev  # type: ignore[assignment]
    prompt = split(CAPTION, [Target("blonde hair")]).behind(PREFIX)
    return Flux2(model).spans(prompt, words, length, full=full)


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_qwens_padding_stands_behind_the_template(full: bool) -> None:
    found = flux2(dev=False, length=20, full=full)
    dress = (7, 8) if full else (5, 6)
    assert found == Spans(((3, 4), dress), (5, 6) if full else (), dress[-1] + 1, range(0))


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
def test_mistrals_padding_stands_before_the_template(full: bool) -> None:
    """Behind the prompt is one mark."""
    found = flux2(dev=True, length=20, full=full)
    before = 20 - 1 - (9 if full else 7)
    target = tuple(before + place for place in (5, 6)) if full else ()
    phrases = tuple(tuple(before + place for place in part) for part in ((3, 4), (7, 8) if full else (5, 6)))
    assert found == Spans(phrases, target, 19, range(before))


@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize("length", [8, 9])
def test_what_is_too_long_is_cut_off_behind(dev: bool, length: int) -> None:
    found = flux2(dev=dev, length=length, full=True)
    assert found == Spans(((3, 4), (7, 8)[: length - 7]), (5, 6), length, range(0))


def test_krea_2_has_room_for_the_rest_of_its_template() -> None:
    prompt = split(CAPTION, [Target("blonde hair")])
    krea2 = Krea2(nn.Module())
    assert krea2.spans(prompt, words, 20, full=True) == Spans(((0, 1), (4, 5)), (2, 3), 6)
    assert krea2.spans(prompt, words, 10, full=True) == Spans(((0, 1), (4,)), (2, 3), 5)
    assert krea2.length({}) == 512


def test_a_patch_of_flux_2_has_the_mean_colour_of_its_latents() -> None:
    space = latents.FLUX2
    assert len(space.weight) == space.channels == 128
    assert [sum(space.weight[i][0] for i in range(4 * c, 4 * c + 4)) for c in (0, 31)] == pytest.approx(
        [0.0058, -0.0111]
    )
