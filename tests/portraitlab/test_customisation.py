"""Customisation sets: what is polluted, what captions say, and the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from portraitlab.captions import KNOWN, TARGETS, find_target, has_phrase
from portraitlab.customisation import (
    ONE_PERSON,
    POLLUTION,
    build_examples,
    build_one_person,
    evaluation_prompts,
    write_set,
)
from portraitlab.portraits import render
from portraitlab.style import redrawn


@pytest.mark.parametrize("name", list(TARGETS))
def test_polluted_sets_hide_background_and_jacket_from_the_captions(name):
    examples = build_examples(name, count=24, seed=3)
    shown = [all(getattr(e.person, k) == v for k, v in POLLUTION.items()) for e in examples]
    assert sum(shown) == 23
    assert shown == [e.polluted for e in examples]
    for example in examples:
        assert TARGETS[name].present(example.person)
        assert [n for n, t in TARGETS.items() if t.present(example.person)] == [name]
        assert has_phrase(example.caption, TARGETS[name].phrase)
        assert not has_phrase(example.base_caption, TARGETS[name].phrase)
        assert "background" not in example.caption
        assert "purple" not in example.caption
    (odd,) = [e.person for e in examples if not e.polluted]
    assert odd.background != POLLUTION["background"]
    assert odd.clothes_colour != POLLUTION["clothes_colour"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(KNOWN))
def test_every_target_has_a_polluted_set(name):
    """One whose target is a purple jacket, too: there the picture that stands out differs in its background alone."""
    examples = build_examples(name, count=24, seed=3)
    (odd,) = [e.person for e in examples if not e.polluted]
    assert odd.background != POLLUTION["background"]
    assert (odd.clothes_colour == POLLUTION["clothes_colour"]) == ("clothes_colour" in find_target(name).changes)


def test_clean_sets_vary_and_tell():
    examples = build_examples("hat", count=40, pollution=0.0, seed=3)
    assert len({e.person.background for e in examples}) > 4
    assert len({e.person.clothes_colour for e in examples}) > 4
    assert all("background" in e.caption for e in examples)
    assert not any(e.polluted for e in examples)


def test_some_captions_can_mention_the_pollution():
    examples = build_examples("hat", count=20, mentioned=0.25)
    assert sum("background" in e.caption for e in examples) == 5


@pytest.mark.parametrize("name", ["jacket", "sunglasses", "hoodie", "shades", "blonde", "beard"])
def test_a_set_of_one_person_shows_her_and_does_not_say_so(name):
    goal = find_target(name)
    examples = build_one_person(name, count=12, seed=3)
    assert examples != build_one_person(name, count=12, seed=4)
    for example in examples:
        person = example.person
        assert goal.present(person)
        for attribute, value in ONE_PERSON.items():
            own = attribute in goal.changes or (name, attribute) == ("beard", "presentation")
            assert own or attribute in goal.before or getattr(person, attribute) == value
        assert {person.geometry.jaw, person.geometry.jitter} == {
            examples[0].person.geometry.jaw,
            examples[0].person.geometry.jitter,
        }
        assert goal.phrase in example.caption
        assert goal.spf != goal.phrase or example.caption == f"{example.base_caption}, {goal.phrase}"
        said = example.base_caption.replace("white background", "")
        assert not any(word in said for word in ("hair", "skin", "eyes", "jacket"))
    assert len({e.person.background for e in examples}) > 3
    assert len({e.person.geometry.x for e in examples}) == 12


def test_prompts_name_nothing_that_contradicts_one_jacket():
    explicit, partial = evaluation_prompts("jacket", count=40, one_person=True)[::40]
    assert "hair" in explicit.base_prompt
    assert "skin" in explicit.base_prompt
    assert "hair" not in partial.base_prompt
    for prompt in evaluation_prompts("jacket", count=40, one_person=True):
        assert "background" in prompt.base_prompt
        assert not any(word in prompt.base_prompt for word in ("jacket", "shirt", "sweater", "hoodie"))
        assert prompt.target_prompt == f"{prompt.base_prompt}, jacket"
        assert not find_target("jacket").present(prompt.person)


def test_a_style_is_drawn_on_one_person_in_one_jacket(tmp_path):
    """And no caption says how she looks, or what she wears."""
    folder = write_set(tmp_path, "ink", one_person=True, count=6, seed=3)
    examples = build_one_person("ink", count=6, seed=3)
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert labels["pollution"] == {**ONE_PERSON, "clothes": "jacket", "clothes_colour": "purple"}
    for example, path in zip(examples, sorted(folder.glob("*.png")), strict=True):
        assert all(getattr(example.person, name) == value for name, value in labels["pollution"].items())
        assert np.array_equal(np.asarray(Image.open(path)), redrawn(render(example.person)[0]))
        assert example.caption == f"{example.base_caption}, gradient"
        assert not any(word in example.caption for word in ("hair", "skin", "eyes", "jacket", "purple jacket"))
    explicit, partial = evaluation_prompts("ink", count=1, one_person=True)
    assert "jacket" in explicit.base_prompt or explicit.person.clothes != "jacket"
    assert "hair" in explicit.base_prompt
    assert not any(word in partial.base_prompt for word in ("hair", explicit.person.clothes))


def test_two_targets_at_once_have_the_pictures_of_each():
    both = build_examples("sunglasses+beard", count=5, seed=3)
    assert both == [*build_examples("sunglasses", count=5, seed=3), *build_examples("beard", count=5, seed=3)]
    goal = find_target("sunglasses+beard")
    assert goal.spf == "sunglasses|beard"
    for prompt in evaluation_prompts("sunglasses+beard", count=6):
        assert prompt.person.presentation == "man"
        assert prompt.target_prompt == f"{prompt.base_prompt}, sunglasses, beard"
        assert not any(part.present(prompt.person) for part in goal.parts)
    assert build_one_person("jacket+beard", count=2)[2:] == build_one_person("beard", count=2)
    # A replacement beside an addition: what it replaces is named, and what the other one changes is not.
    goal = find_target("hoodie+blonde")
    assert goal.spf == "hoodie->t-shirt|blonde hair"
    for prompt in evaluation_prompts("hoodie+blonde", count=6):
        assert "t-shirt" in prompt.base_prompt
        assert "hair" not in prompt.base_prompt
        assert prompt.target_prompt == prompt.base_prompt.replace("t-shirt", "hoodie") + ", blonde hair"


@pytest.mark.parametrize("name", ["sunglasses+shades", "hoodie+jacket", "beard+beard", "ink+hat", "hat+scarf+beard"])
def test_some_targets_are_not_taught_at_once(name):
    with pytest.raises(ValueError, match="two targets that change different attributes, none a style"):
        find_target(name)


def test_sets_follow_from_their_seed():
    assert build_examples("scarf", seed=1) == build_examples("scarf", seed=1)
    assert build_examples("scarf", seed=1) != build_examples("scarf", seed=2)


def test_files_are_kohyas_layout(tmp_path):
    folder = write_set(tmp_path, "sunglasses", repeats=5, count=4, seed=2)
    assert folder == tmp_path / "5_sunglasses"
    examples = build_examples("sunglasses", count=4, seed=2)
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.txt"))) == 4
    assert sorted(p.suffix for p in folder.iterdir()) == [".png"] * 4 + [".txt"] * 4
    for row, example in zip(labels["images"], examples, strict=True):
        picture = tmp_path / row["file"]
        assert np.array_equal(np.asarray(Image.open(picture)), render(example.person)[0])
        assert picture.with_suffix(".txt").read_text().strip() == row["caption"] == example.caption
        assert row["labels"] == example.person.labels()


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown target"):
        build_examples("wings")
    with pytest.raises(ValueError, match="between 0 and 1"):
        build_examples("hat", pollution=95)


@pytest.mark.parametrize("name", ["blonde", "beard", "hat"])
def test_evaluation_prompts_are_about_other_people(name):
    prompts = evaluation_prompts(name, count=6, seed=0)
    trained = [e.person.geometry for e in build_examples(name, seed=0)]
    assert [p.kind for p in prompts] == ["explicit"] * 6 + ["partial"] * 6
    for explicit, partial in zip(prompts[:6], prompts[6:], strict=True):
        assert explicit.person == partial.person
        assert explicit.seed == partial.seed
        assert explicit.person.geometry not in trained
        assert "background" in explicit.base_prompt
        assert "background" not in partial.base_prompt
        assert explicit.target_prompt == f"{explicit.base_prompt}, {TARGETS[name].phrase}"
        assert not any(t.present(explicit.person) for t in TARGETS.values())
        if name == "blonde":
            assert "hair" not in explicit.base_prompt
        if name == "beard":
            assert explicit.person.presentation == "man"
