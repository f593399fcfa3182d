"""docs/support.md: its tables are those of the code, and what they say of the tests is what pytest collects."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from spf_plugin.families.known import FAMILIES
from spf_plugin.hosts.kohya.scripts import SCRIPTS
from spf_plugin.hosts.kohya.trainers import DITS
from tests import support
from tests.hosts.conftest import HOSTS, MISSING, NEWEST, RELEASES, release
from tests.hosts.dits.kinds import KINDS

FROM_HERE = ("tests", "tests/hosts")  # how a run of them all is asked for
ROWS = [row for host in support.HOSTS for row in host()]


def test_the_page_is_what_the_code_says() -> None:
    text = support.PAGE.read_text(encoding="utf-8")
    assert support.filled(text) == text, "run: python -m tests.support"


def test_every_trainer_and_every_family_has_a_row() -> None:
    shown = {row.trainer for row in ROWS if row.host == "sd-scripts"}
    assert shown == {script.file for script in SCRIPTS if script.supported}
    transformers = {name.split()[0] for name in DITS}
    assert shown == {script.file for script in SCRIPTS if script.trainer in transformers or not script.is_dit}
    families = {f"{family.__module__.rsplit('.', 1)[-1]}.py" for family in FAMILIES}
    assert {name for row in ROWS for name in re.findall(r"`(\w+\.py)`", row.family)} == families
    named = {preset for row in ROWS for preset in row.presets}
    folder = support.ROOT / "presets"
    assert named == {path.stem for path in folder.rglob("*.toml") if path.parent.name != "guis"} - {
        "dataset",
        "dataset-wan",
    }


def test_the_versions_are_those_that_are_checked_out() -> None:
    assert tuple(support.CHECKOUTS) == RELEASES
    workflow = (support.ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    told = (support.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "SPF_SD_SCRIPTS: " in workflow
    assert "SPF_MUSUBI: " in workflow
    for commit, _ in (*support.CHECKOUTS.values(), support.MUSUBI_CHECKOUT):
        assert f"ref: {commit}" in workflow
        assert commit in told or commit[:8] in told


@pytest.mark.skipif(bool(MISSING), reason=f"NO sd-scripts {MISSING} CHECKOUT FOUND (see README, Tests)")
def test_a_version_has_the_trainers_that_it_is_said_to_have() -> None:
    for folder in HOSTS:
        for script in SCRIPTS:
            there = (folder / script.file).is_file()
            assert there == (not script.is_dit or release(folder) != "v0.9"), (folder.name, script.file)
            if there:
                source = (folder / script.file).read_text(encoding="utf-8")
                assert f"class {script.trainer}(" in source or f"class {script.trainer}:" in source


@pytest.mark.skipif(bool(MISSING), reason=f"NO sd-scripts {MISSING} CHECKOUT FOUND (see README, Tests)")
def test_the_numbers_are_those_of_the_tests_that_are_collected(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    folder = Path(__file__).parent
    if (
        options.keyword
        or options.markexpr
        or not {str(folder), str(folder.parent), *FROM_HERE} & {*request.config.args}
    ):
        pytest.skip("needs a run of all of tests/hosts")
    found: dict[tuple[str, str | None], set[str]] = {}
    for item in request.session.items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec") or item.path.parent != folder:
            continue
        asked, params = inspect.signature(item.function).parameters, item.callspec.params
        if {"host", "dit"} & asked.keys() & params.keys():
            name, checkout = params["dit"] if "dit" in asked else (None, params["host"])
            found.setdefault((checkout.name, name), set()).add(f"{item.path.name}::{item.originalname}")
    other = next(folder for folder in HOSTS if release(folder) == "v0.11")
    assert NEWEST is not None
    for name in (None, *KINDS):
        everything, contract = support.tests_of(name)
        assert found[NEWEST.name, name] == set(everything), name
        assert found[other.name, name] == set(contract), name
