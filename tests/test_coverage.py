"""Which captions say a target: the one rule of both trainers."""

from __future__ import annotations

from spf_plugin.core.coverage import coverage
from spf_plugin.core.prompt import parse_targets

TARGETS = parse_targets("hat|scarf")


def test_captions_without_a_target_and_targets_without_a_caption() -> None:
    found = coverage([("a man, hat", None), ("a man, tree", None), ("a dog, tree", None)], TARGETS)
    assert (found.captions, found.without, found.nothing) == (3, ("a man, tree", "a dog, tree"), False)
    assert [str(target) for target in found.unused] == ["scarf"]
    assert found.said == "'tree', 'a man', 'a dog'"


def test_targets_of_a_caption_replace_the_runs() -> None:
    own = parse_targets("tree")
    found = coverage([("a man, hat", own), ("a man, tree", own), ("a man, scarf", None)], TARGETS)
    assert found.without == ("a man, hat",)
    assert [str(target) for target in found.unused] == ["hat"]


def test_nothing_is_said() -> None:
    assert coverage([("", None), (" , ", None)], TARGETS).said == ""
    assert coverage([("a man", None)], TARGETS).nothing
    assert coverage([("a man", None)], ()).nothing
