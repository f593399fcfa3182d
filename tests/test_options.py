"""The commands' options that are numbers: what is no number at all is refused, by every one of them."""

from __future__ import annotations

from importlib import import_module
from typing import get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from spf_plugin.tools import cli

MODULES = ("check", "doctor", "lora", "report")  # the commands that are imported when they run


def options() -> list[tuple[typer.Typer, tuple[str, ...], str]]:
    """Every option that takes a number with a fraction: app, words that name the command, option."""
    found = []
    for app in (cli.app, *(import_module(f"spf_plugin.tools.cli.{name}").app for name in MODULES)):
        commands = app.registered_commands
        for command in commands:
            words = (command.name or command.callback.__name__,) if len(commands) > 1 else ()
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                kinds = get_args(hint)[:1]
                if kinds and float in (*kinds, *get_args(kinds[0])):
                    found.append((app, words, "--" + name.replace("_", "-")))
    return found


OPTIONS = options()


def test_they_are_found() -> None:
    assert {option for _, _, option in OPTIONS} >= {"--vram", "--lr", "--alpha", "--weight", "--guidance"}


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
@pytest.mark.parametrize(("app", "words", "option"), OPTIONS, ids=[" ".join((*w, o)) for _, w, o in OPTIONS])
def test_no_number_is_refused(app: typer.Typer, words: tuple[str, ...], option: str, value: str) -> None:
    required = {"train": ["--model", "m", "--data", "d", "--out", "o.safetensors"]}.get("".join(words), ["anything"])
    result = CliRunner().invoke(app, [*words, option, value, *required])
    assert result.exit_code == 2, result.output
    assert f"Invalid value for '{option}'" in result.output, result.output


def test_a_card_larger_than_any_is_refused() -> None:
    result = CliRunner().invoke(cli.app, ["plan", "any.toml", "--vram", "1e300"])
    assert result.exit_code == 2, result.output
    assert "Invalid value for '--vram'" in result.output
