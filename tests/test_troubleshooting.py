"""docs/troubleshooting.md: every message that it quotes is in the code, and every message of the code is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.network_args import check_words
from tests.messages import GAP, Message, all_messages

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = all_messages()


def quotes() -> list[str]:
    """What stands in backticks in the first column of the tables."""
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


QUOTES = quotes()


@pytest.mark.parametrize("quote", QUOTES)
def test_the_code_says_what_the_page_quotes(quote: str) -> None:
    assert any(message.holds(quote) for message in MESSAGES), quote


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.place)
def test_the_page_lists_what_the_code_says(message: Message) -> None:
    # A quote must be more than a word or two that happen to be there.
    enough = [q for q in QUOTES if message.holds(q) and len(q.replace("...", "").split()) > 1]
    assert enough, f"add to docs/troubleshooting.md: {message.text.replace(GAP, '...')}"


def test_the_messages_are_found_in_the_source() -> None:
    """The reading of the source, held against messages that are raised here."""
    raised = []
    for settings in ({"spf_mapp": "x"}, {"spf_log_every": "x"}, {"spf_every": "2"}):
        with pytest.raises(SPFError) as caught:
            parse(settings)
        raised += caught.value.problems
    raised += check_words(["spf_target=a", "b"]) + check_words(["spf_target=a=b"])
    for text in raised:
        assert any(message.made(text) for message in MESSAGES), text


def test_the_commands_exist() -> None:
    from spf_plugin.tools.cli import app

    names = {command.name for command in app.registered_commands}
    assert set(re.findall(r"`spf ([\w-]+)", PAGE)) <= names


def test_links() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
