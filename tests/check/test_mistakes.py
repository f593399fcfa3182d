"""A good run passes, every planted mistake is found, and every finding is planted and on the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spf_plugin.hosts.kohya import scripts
from spf_plugin.hosts.kohya.trainers import DITS
from spf_plugin.tools.cli.check import app
from tests.check.conftest import look
from tests.check_sets import MISTAKES, Run

REPOSITORY = Path(__file__).parents[2]


def test_nothing_is_wrong_with_a_good_run(run: Run) -> None:
    report = look(run)
    assert not report.findings
    assert (report.images, report.steps_per_epoch) == (6, 60)


@pytest.mark.parametrize(
    ("code", "level", "spoil"), MISTAKES, ids=[f"{i}-{code}" for i, (code, _, _) in enumerate(MISTAKES)]
)
def test_planted_mistake(run: Run, code: str, level: str, spoil: Callable[[Run], object]) -> None:
    spoil(run)
    report = look(run)
    found = [f for f in report.findings if f.code == code]
    assert [f.level for f in found][:1] == [level], report.findings
    assert report.failed == any(f.level == "error" for f in report.findings)
    if level != "error":
        assert not report.failed, report.findings
    result = CliRunner().invoke(app, [str(run.config), "--tokenizer", "none"], env={"COLUMNS": "80"})
    assert result.exit_code == int(report.failed), result.output
    said = re.sub(r"\W+", "", result.output)  # the terminal wraps
    assert re.sub(r"\W+", "", found[0].message) in said
    assert max(map(len, result.output.splitlines())) <= 80


def codes_of_the_source() -> set[str]:
    """The second argument of every `Finding(...)` and `data.add(...)`, and the codes that stand in tables."""
    found = set()
    for path in (REPOSITORY / "spf_plugin" / "tools" / "check").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(
            re.findall(r'(?:Finding|data\.add)\(\s*(?:"\w+"|"error" if [^,]+ else "\w+"),\s*"([a-z0-9-]+)"', text)
        )
        found |= set(re.findall(r'": \("([a-z0-9-]+)", "[A-Z]', text)) | set(
            re.findall(r'\((?:classes|nothing|missing|other_size), "([a-z-]+)"', text)
        )
    return found


def test_a_trainer_that_spf_has_not_been_taught(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that sd-scripts has today are known: one is forgotten here."""
    known = {name: dit for name, dit in DITS.items() if not name.startswith("Hunyuan")}
    monkeypatch.setattr(scripts, "DITS", known)
    run.set(text_encoder="t.safetensors", byt5="b.safetensors", vae="v.safetensors")
    found = [finding for finding in look(run).findings if finding.code == "other-model"]
    assert [finding.level for finding in found] == ["error"]
    assert "this is a run of hunyuan_image_train_network.py (HunyuanImage-2.1)" in found[0].message


def test_every_finding_is_planted_and_on_the_page() -> None:
    planted = {code for code, _, _ in MISTAKES}
    assert len(planted) >= 20
    others = {"images-not-read", "sd-scripts-stops", "overruled"}  # Pillow is here, and no sd-scripts is asked
    assert codes_of_the_source() - planted == others
    assert len(codes_of_the_source()) > 60
    page = (REPOSITORY / "docs" / "check.md").read_text(encoding="utf-8")
    own = page[page.index("## In musubi-tuner") : page.index("## Settings")]  # tests/test_musubi_check.py has them
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", page.replace(own, ""), re.MULTILINE)) == planted | others
