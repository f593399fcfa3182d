"""What a resumed run may not change, and what it is told that it changes."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from spf_plugin.config import SPFConfig, parse
from spf_plugin.core.prompt import parse_targets
from spf_plugin.hosts import resuming


def state(settings: dict[str, str], subsets: str = "") -> dict[str, Any]:
    """As it is read back from a file."""
    config = parse({f"spf_{name}": value for name, value in settings.items()})
    return json.loads(json.dumps(resuming.kept(config, parse_targets(subsets) if subsets else ())))


def refused(before: dict[str, Any], target: str, subsets: str = "") -> list[str]:
    config = parse({"spf_target": target} if target else {})
    return resuming.problems(before, config, parse_targets(subsets) if subsets else ())


@pytest.mark.parametrize(
    ("before", "now", "stops"),
    [
        (("blonde hair", ""), ("blonde hair", ""), False),
        (("blonde hair", ""), ("Blonde_hair", ""), False),
        (("a|b", ""), ("b|a", ""), False),
        (("a|b", ""), ("b", "a"), False),
        (("blonde hair", ""), ("red hair", ""), True),
        (("blonde hair", ""), ("blonde hair|hat", ""), True),
        (("dress->shirt", ""), ("dress", ""), True),
        (("dress->shirt", ""), ("dress->coat", ""), True),
        (("", "hat"), ("", "hat"), False),
        (("", "hat"), ("", "cap"), True),
        (("hair", "hat"), ("hair", ""), True),
    ],
)
def test_another_target_is_refused(before: tuple[str, str], now: tuple[str, str], stops: bool) -> None:
    saved = state({"target": before[0]} if before[0] else {}, before[1])
    found = refused(saved, *now)
    assert bool(found) == stops
    assert all("in place of --resume" in problem for problem in found)


def test_every_other_setting_is_named() -> None:
    """But for what is only shown; and so is one that comes later."""
    others = {"log_every": "7", "preview_every": "9", "target": "hat", "network": "networks.loha", "train": "cross.*",
              "base": "int8", "map": "paper", "diffusion_region": "all", "response": "anchor", "clip": "a:b",
              "decoder": "tiny", "layers": "all"}  # fmt: skip
    before = state({"target": "hair"})
    for field in dataclasses.fields(SPFConfig):
        now = parse({"spf_target": "hair", f"spf_{field.name}": others.get(field.name, "0.25")})
        named = [] if field.name in ("target", "log_every", "preview_every") else [f"spf_{field.name}="]
        found = resuming.changes(before, now)
        assert len(found) == len(named), field.name
        assert all(name in said for name, said in zip(named, found, strict=True))
        assert not resuming.changes(before, now, {field.name})
    both = resuming.changes(state({"map": "paper", "network": "a.b"}), parse({"spf_layers": "all"}))
    (said,) = both
    assert all(
        words in said for words in ("spf_map=soft (was paper)", "spf_layers=all (was last)", "spf_network= (was a.b)")
    )


def test_a_setting_that_came_later_is_no_change() -> None:
    before = state({"target": "hair"})
    del before["settings"]["spf_map"]
    assert resuming.changes(before, parse({"spf_target": "hair", "spf_map": "paper"})) == []
    (said,) = resuming.changes(before, parse({"spf_target": "hair", "spf_network": "networks.loha"}))
    assert said.endswith("spf_network=networks.loha (was not set)")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"step": 3},
        {"settings": []},
        {"settings": {"spf_target": "->"}},
        {"settings": {"a": 1}, "subset_targets": 3},
    ],
)
def test_what_says_nothing_stops_nothing(values: dict[str, Any]) -> None:
    """A state of an earlier version, or one that somebody wrote into."""
    assert refused(values, "hair") == []


def test_the_state_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "spf_state.json").write_text('{"step": 3}', encoding="utf-8")
    assert resuming.of_run(Namespace(resume=str(tmp_path))) == {"step": 3}
    assert resuming.of_run(Namespace(resume=str(tmp_path), resume_from_huggingface=True)) == {}
    assert resuming.of_run(Namespace(resume=None)) == resuming.of_run(Namespace()) == {}
    assert resuming.of_run(Namespace(resume=str(tmp_path / "nowhere"))) == {}
    for damaged in ("{", "3"):
        (tmp_path / "spf_state.json").write_text(damaged, encoding="utf-8")
        assert resuming.of_run(Namespace(resume=str(tmp_path))) == {}
