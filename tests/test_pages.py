"""The order of the pages: README in three screens, and an index that has every page and says how long it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import ROOT, links, reading_words

SCREEN = 45  # lines of a terminal or a browser at the width of these files
A_MINUTE = 230  # words of prose
LONGEST = 10  # minutes
INDEX = ROOT / "docs" / "README.md"
PARTS = ["Start", "Train", "See", "Understand", "Extend"]
DOCS = sorted((ROOT / "docs").rglob("*.md"))


def minutes(page: Path) -> int:
    return -(-reading_words(page) // A_MINUTE)


def test_the_readme_is_three_screens_and_the_first_one_says_what_matters() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 3 * SCREEN
    first = "\n".join(lines[:SCREEN])
    for said in ("**What it does.**", "**What it costs.**", "**What it needs.**", "**Where it fails.**"):
        assert said in first
    for page in ("docs/cost.md", "docs/support.md", "docs/lab.md#where-it-fails"):
        assert f"]({page})" in first, "each claim has a page behind it"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_takes_longer_than_ten_minutes(page: Path) -> None:
    assert minutes(page) <= LONGEST, f"{reading_words(page)} words: split it"


def test_the_index_has_every_page_and_its_minutes() -> None:
    text = INDEX.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS
    assert set(DOCS) - {INDEX} <= set(links(INDEX))
    rows = re.findall(r"^\| \[(.+)\]\(([^)]+)\) \| (\d+) \|", text, re.MULTILINE)
    for title, name, said in rows:
        page = INDEX.parent / name
        assert f"# {title}" == page.read_text(encoding="utf-8").splitlines()[0]
        assert int(said) == minutes(page), f"{name}: write {minutes(page)}"
    # The guides of single GUIs stand in one row, behind what holds for all of them.
    assert {INDEX.parent / name for _, name, _ in rows} == {
        page for page in DOCS if page != INDEX and (page.parent.name != "guis" or page.stem == "README")
    }


def test_the_readme_names_the_parts_and_pages_in_the_order_of_the_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    read_on = readme[readme.index("## Read on") : readme.index("## Tests")]
    assert re.findall(r"^\d\. \*\*(\w+)\*\*", read_on, re.MULTILINE) == PARTS
    order = links(INDEX)
    named = [(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", read_on)]
    assert [page for page in named if page != INDEX] == sorted(
        (page for page in named if page != INDEX), key=order.index
    )


def test_files_are_as_long_as_the_pages_say() -> None:
    """Where a page tells newcomers to read a short file first."""
    said = [
        (page.name, file, int(count))
        for page in DOCS
        for file, count in re.findall(
            r"`((?:spf_plugin|tests)/[\w/]+\.py)`(?:,| is one in) (\d+) lines", page.read_text(encoding="utf-8")
        )
    ]
    assert len(said) >= 3
    for page, file, count in said:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert lines == count, f"{page}: {file} has {lines} lines"
