"""The renderer: seeded, exact masks, exact counterfactuals."""

from __future__ import annotations

import numpy as np
import pytest

from portraitlab.captions import TARGETS
from portraitlab.portraits import (
    BALANCED_RATES,
    BASE_RATES,
    CLOTHES_COLOURS,
    HAIR_COLOURS,
    PARTS,
    Person,
    counterfactual,
    part_mask,
    render,
    render_batch,
    sample_person,
)


def people(count: int, seed: int = 0, rates=BALANCED_RATES) -> list[Person]:
    rng = np.random.default_rng(seed)
    return [sample_person(rng, rates) for _ in range(count)]


def test_the_same_seed_draws_the_same_pixels_and_another_seed_others():
    first, parts = render_batch(people(6, 3))
    again, parts_again = render_batch(people(6, 3))
    assert np.array_equal(first, again)
    assert np.array_equal(parts, parts_again)
    assert not np.array_equal(first, render_batch(people(6, 4))[0])


def test_sampling_uses_a_fixed_number_of_draws_whatever_comes_out():
    a, b = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(20):
        sample_person(a, BASE_RATES)
        sample_person(b, BALANCED_RATES)
    assert a.random() == b.random()


@pytest.mark.parametrize("size", [64, 96, 128])
def test_shapes_types_and_sizes(size):
    image, parts = render(people(1)[0], size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert parts.shape == (size, size)
    assert parts.max() < len(PARTS)


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match="at least 64"):
        render(people(1)[0], 32)


def test_masks_partition_the_image():
    _, parts = render_batch(people(20))
    total = sum(part_mask(parts, name).astype(int) for name in PARTS)
    assert (total == 1).all()


def test_flagged_parts_are_in_the_mask_exactly_when_the_flag_is_set():
    for person in people(150):
        _, parts = render(person)
        for flag in ("glasses", "sunglasses", "freckles", "hat", "scarf", "earrings", "beard"):
            assert part_mask(parts, flag).any() == getattr(person, flag), flag
        for part in ("background", "hair", "skin", "clothes"):
            assert part_mask(parts, part).sum() > 60, part


def test_masks_mark_the_colour_they_claim():
    """The median colour under a part is nearest to the palette entry that the label names."""
    for person in people(60, 8, BASE_RATES):
        image, parts = render(person)
        for part, palette, label in (
            ("clothes", CLOTHES_COLOURS, person.clothes_colour),
            ("hair", HAIR_COLOURS, person.hair_colour),
        ):
            seen = np.median(image[part_mask(parts, part)] / 255.0, axis=0)
            nearest = min(palette, key=lambda name: np.abs(np.array(palette[name]) - seen).sum())
            assert nearest == label, (part, person)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_counterfactual_changes_its_region_and_nothing_else(name):
    rng = np.random.default_rng(12)
    target = TARGETS[name]
    for _ in range(4):
        person = sample_person(rng, BASE_RATES).with_(hat=False, sunglasses=False, beard=False, hair_colour="brown")
        person = person.with_(freckles=False)
        pair = counterfactual(person, 128, **target.changes)
        before, after = render(person)[0], render(person.with_(**target.changes))[0]
        assert np.array_equal(pair.without, before)
        assert np.array_equal(pair.with_, after)
        slow = np.zeros((128, 128), bool)
        for y in range(128):
            for x in range(128):
                slow[y, x] = tuple(before[y, x]) != tuple(after[y, x])
        assert np.array_equal(pair.region, slow)
        assert 20 < pair.region.sum() < 0.5 * pair.region.size
        unchanged = np.where(pair.region[..., None], before, after)
        assert np.array_equal(unchanged, before)


def test_targets_are_as_rare_in_the_base_data_as_promised():
    persons = people(20_000, 1, BASE_RATES)
    for target in TARGETS.values():
        share = np.mean([target.present(p) for p in persons])
        if target.kind == "weak":
            assert 0.01 <= share <= 0.02, target.name
        else:
            assert share == 0, target.name


def test_glasses_and_sunglasses_exclude_each_other():
    person = people(1)[0].with_(glasses=True)
    assert not person.with_(sunglasses=True).glasses
    assert not any(p.glasses and p.sunglasses for p in people(500))
