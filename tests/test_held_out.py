"""Held-out prompts: what the bank leaves out, and that their numbers are those of slow computations."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from spf_plugin.core.prompt import parse_targets
from spf_plugin.errors import SPFError
from spf_plugin.tools.cli.report import report
from spf_plugin.tools.report import held_out, measures
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.results import Variant

BANK = {"people": ["a man in a hat", "two women", "a child, blond hair"], "things": ["a red-haired doll", "a chair"]}


def left(target: str, trained: tuple[str, ...] = ()) -> set[str]:
    return {text for text, _ in held_out.choose(5, parse_targets(target), trained, BANK).noted}


def test_the_bank() -> None:
    bank = held_out.bank()
    texts = [text for group in bank.values() for text in group]
    assert len(texts) == len(set(texts))
    assert all(len(group) == len(next(iter(bank.values()))) for group in bank.values())
    assert 2 * len(bank) == held_out.PROMPTS
    assert inspect.signature(report).parameters["held_out"].default == str(held_out.PROMPTS)
    chosen = held_out.choose(held_out.PROMPTS, (), ())
    assert {len(members) for members in chosen.members.values()} == {2}
    assert list(chosen.members) == list(bank)  # a group's prompts stand together
    assert len(held_out.choose(len(texts), (), ()).texts) == len(texts)


@pytest.mark.parametrize(
    ("target", "out"),
    [
        ("hat", {"a man in a hat"}),
        ("hats", {"a man in a hat"}),
        ("a hat", {"a man in a hat"}),  # not the article
        ("blonde_hair", {"a child, blond hair", "a red-haired doll"}),
        ("ohwx woman", {"two women"}),
        ("dress->a chair", {"a chair"}),  # what stands in its place is trained, too
        ("chairman", set()),
        ("hat|doll", {"a man in a hat", "a red-haired doll"}),
        ("sunglasses", set()),
        ("金发", set()),
    ],
)
def test_words_of_the_target_are_left_out(target: str, out: set[str]) -> None:
    assert left(target) == out


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("puppy", "puppies", True),
        ("blond", "blonde", True),
        ("hair", "haired", True),
        ("glass", "glasses", True),
        ("curl", "curling", True),
        ("car", "carpet", False),
        ("party", "partisan", False),
    ],
)
def test_words_are_the_same_but_for_an_ending(one: str, other: str, same: bool) -> None:
    assert held_out.same_word(one, other) is held_out.same_word(other, one) is same


def test_letters_are_no_words_but_where_they_are() -> None:
    assert held_out.own_words(parse_targets("t-shirt|猫")) == {"shirt", "猫"}


def test_what_was_trained_is_left_out() -> None:
    assert left("beard", ("Two  women", "a chair with a beard")) == {"two women"}


def test_every_group_in_turn() -> None:
    found = held_out.choose(3, parse_targets("hat"), (), BANK)
    assert found.texts == ("two women", "a child, blond hair", "a red-haired doll")
    assert found.members == {"people": [0, 1], "things": [2]}
    assert held_out.choose(0, parse_targets("hat"), (), BANK) == HeldOut(source="0 of the 5 in the plugin's own bank")
    with pytest.raises(SPFError, match="the bank has 5 prompts"):
        held_out.choose(6, (), (), BANK)


def test_a_users_own_are_all_asked() -> None:
    found = held_out.given(["a photo of cat", "a horse"], parse_targets("sks cat->cat"))
    assert found.texts == ("a photo of cat", "a horse")
    assert found.noted == (("a photo of cat", "says “cat”"),)
    assert found.is_given


def test_the_groups_add_up() -> None:
    """Against loops over pixels and prompts."""
    random = np.random.default_rng(0)
    base, other = random.integers(0, 255, (2, 3, 4, 4, 3), dtype=np.uint8)
    none = np.zeros((0, 4, 4, 3), np.uint8)
    variants = [
        Variant("base", "base model", "m", "", none, none, (), base),
        Variant("spf", "LoRA", "l", "", none, none, (), other, [0.1, 0.2, 0.6]),
    ]
    held = HeldOut(("a", "b", "c"), ("one", "one", "two"))
    pixels, drift = measures.held_rows(variants, held, 10)
    assert drift.values == [None, pytest.approx(0.3)]
    assert drift.groups == {"one": [None, pytest.approx(0.15)], "two": [None, pytest.approx(0.6)]}
    assert drift.n == "30 predictions"

    def slow(i: int) -> float:
        pairs = zip(base[i].ravel().tolist(), other[i].ravel().tolist(), strict=True)
        return sum(abs(a - b) for a, b in pairs) / base[i].size / 255

    assert pixels.values[1] == pytest.approx((slow(0) + slow(1) + slow(2)) / 3, rel=1e-5)
    assert pixels.groups["one"][1] == pytest.approx((slow(0) + slow(1)) / 2, rel=1e-5)
    assert pixels.groups["two"] == [None, pytest.approx(slow(2), rel=1e-5)]
