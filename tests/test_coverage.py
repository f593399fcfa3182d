"""Which captions say a target: the one rule of both trainers."""

from __future__ import annotations

from spf_plugin.core.coverage import coverage
from spf_plugin.core.prompt import parse_targets

TARGETS = parse_targets("hat|scarf")


def test_captions_without_a_target_and_targets_without_a_caption() -> None:
    found = coverage([(("a man, hat",), None), (("a man, tree",), None), (("a dog, tree",), None)], TARGETS)
    assert (found.captions, found.without, found.nothing) == (3, ("a man, tree", "a dog, tree"), False)
    assert [str(target) for target in found.unused] == ["scarf"]
    assert found.said == "'tree', 'a man', 'a dog'"


def test_targets_of_a_caption_replace_the_runs() -> None:
    own = parse_targets("tree")
    found = coverage([(("a man, hat",), own), (("a man, tree",), own), (("a man, scarf",), None)], TARGETS)
    assert found.without == ("a man, hat",)
    assert [str(target) for target in found.unused] == ["hat"]


def test_nothing_is_said() -> None:
    assert coverage([(("",), None), ((" , ",), None)], TARGETS).said == ""
    assert coverage([(("a man",), None)], TARGETS).nothing
    assert coverage([(("a man",), None)], ()).nothing


def words(text: str) -> list[str]:
    return text.replace(",", " ,").split()


def test_targets_that_are_cut_off() -> None:
    long = "a man" + ", tree" * 5
    found = coverage([((f"{long}, hat",), None), ((f"hat, {long}",), None)], TARGETS, words, 10)
    assert (found.cut, found.with_target) == ((f"{long}, hat",), 2)
    assert coverage([((f"{long}, hat",), None)], TARGETS).cut == ()  # no tokenizer
    assert coverage([((f"{long}, hat",), None)], TARGETS, words, 20).cut == ()
    some = (f"{long}, hat", f"hat, {long}")  # a wildcard, one of whose choices shows the target
    assert coverage([(some, None)], TARGETS, words, 10).cut == ()


def test_captions_that_say_only_the_target() -> None:
    found = coverage([(("hat",), None), (("a man, hat",), None), (("hat, scarf",), None), (("a man",), None)], TARGETS)
    assert (found.bare, found.with_target) == (("hat", "hat, scarf"), 3)


def test_captions_are_counted_and_not_what_they_may_become() -> None:
    found = coverage([(("a man, tree", "a man, hat"), None), (("a dog", "a cat"), None)], TARGETS)
    assert (found.captions, found.without) == (2, ("a dog",))
