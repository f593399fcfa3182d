"""Captions: truthful, seeded, and exact about a target's phrase."""

from __future__ import annotations

import numpy as np
import pytest

from portraitlab.captions import (
    FLAG_WORDS,
    HAIR_WORDS,
    TARGETS,
    caption,
    describe,
    has_phrase,
    phrases,
    with_phrase,
    without_phrase,
)
from portraitlab.portraits import BALANCED_RATES, BASE_RATES, sample_person


def test_captions_follow_from_the_generator():
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [caption(sample_person(rng), rng) for _ in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_captions_say_only_what_is_drawn():
    rng = np.random.default_rng(3)
    for _ in range(400):
        person = sample_person(rng, BALANCED_RATES)
        text = caption(person, rng)
        for colour, words in HAIR_WORDS.items():
            if colour != person.hair_colour:
                assert not any(word in text for word in words), text
        named = {p.strip() for p in text.replace(" with ", ", ").split(",")}
        for flag, words in FLAG_WORDS.items():
            if not getattr(person, flag):
                assert not named & set(words), text


def test_base_captions_never_name_a_new_target():
    rng = np.random.default_rng(4)
    text = " ".join(caption(sample_person(rng, BASE_RATES), rng) for _ in range(4000))
    for target in TARGETS.values():
        assert (target.phrase in text) == (target.kind == "weak"), target.name


def test_parts_are_dropped_and_words_vary():
    rng = np.random.default_rng(5)
    person = sample_person(rng)
    texts = {caption(person, rng) for _ in range(200)}
    assert len(texts) > 50
    assert min(t.count(",") for t in texts) < max(t.count(",") for t in texts)


@pytest.mark.parametrize(
    ("text", "phrase", "without"),
    [
        ("a woman, red jacket, hat", "hat", "a woman, red jacket"),
        ("a woman with hat, red jacket", "hat", "a woman, red jacket"),
        ("a woman with black hair, hat, red jacket", "hat", "a woman with black hair, red jacket"),
        ("a woman, hat", "scarf", "a woman, hat"),
        ("hat", "hat", ""),
    ],
)
def test_a_phrase_is_taken_out(text, phrase, without):
    assert without_phrase(text, phrase) == without
    assert not has_phrase(without, phrase)


def test_a_phrase_is_added_once():
    assert with_phrase("a man, red jacket", "hat") == "a man, red jacket, hat"
    assert with_phrase("a man, hat", "hat") == "a man, hat"
    assert with_phrase("", "hat") == "hat"
    assert not has_phrase("a man, sunglasses", "glasses")


def test_describe_is_canonical_and_can_leave_the_target_out():
    person = sample_person(np.random.default_rng(6)).with_(hair_colour="blonde", hat=True)
    text = describe(person, ("hair", "background", "hat"))
    assert text == f"a {person.presentation}, blonde hair, {person.background} background, hat"
    assert describe(person, ("hair", "hat"), leave_out=TARGETS["blonde"]) == f"a {person.presentation}, hat"
    assert next(p.topic for p in phrases(person)) == "subject"
