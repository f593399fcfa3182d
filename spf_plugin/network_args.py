"""The words of `--network_args`: `spf_` settings and the inner network's arguments, before the host splits them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spf_plugin.config import NAMES, PREFIX, Read, SPFConfig, read


def split_network_args(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(spf settings, everything else)`: what does not start with `spf_` belongs to the inner network.

    kohya_ss quotes a word with special characters as a whole: `'spf_layers=.*up.*'` is a key `'spf_layers` here.
    """
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for key, value in kwargs.items():
        quote = key[:1]
        if quote and quote in "'\"" and key[1:].startswith(PREFIX) and str(value).endswith(quote):
            key, value = key[1:], str(value)[:-1]
        (ours if key.startswith(PREFIX) else theirs)[key] = value
    return ours, theirs


def split_words(words: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`split_network_args` of raw words; those without "=" are left out (`check_words` says them)."""
    return split_network_args(dict(str(word).split("=", 1) for word in words if "=" in str(word)))


def _faults(words: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with words: the name that it is about, and what to say."""
    found = []
    for i, word in enumerate(words):
        if "=" not in word:
            before = f" It follows {words[i - 1]!r}." if i else ""
            about = _name(words[i - 1]) if i else ""
            found.append(
                (
                    about,
                    f"--network_args has a stray word {word!r}: every item must be key=value.{before} Quote the whole "
                    'item ("spf_target=blonde hair"), or use _ for the space (spf_target=blonde_hair) where a GUI '
                    "drops quotes.",
                )
            )
        elif word.startswith(PREFIX) and word.count("=") > 1:
            found.append((_name(word), f"--network_args item {word!r} has more than one '='; no SPF value needs one."))
    # The inner network would drop without a word what nearly is a name of ours, and a dictionary all but one of two.
    seen: dict[str, str] = {}
    for word in words:
        key, meant = word.split("=", 1)[0].lstrip("'\""), _name(word)
        if not meant.startswith(PREFIX):
            continue
        if key != meant:
            found.append((meant, f"--network_args item {word!r}: the name is written {meant!r}"))
        elif meant in seen:
            found.append(
                (meant, f"--network_args has {meant} twice: {seen[meant]!r} and {word!r}. Leave one of them out.")
            )
        seen[meant] = word
    return found


def _name(word: str) -> str:
    """The name before the "=", as it should be written."""
    return re.sub(r"[\s-]+", "_", word.split("=", 1)[0].lstrip("'\"").strip()).lower()


def check_words(network_args: Sequence[str]) -> list[str]:
    """Problems in the raw words of `--network_args`, before the host splits them at `=` and fails without a reason."""
    if isinstance(network_args, str):  # from a configuration file
        return [f"network_args is a text, and must be a list: network_args = [{json.dumps(network_args)}]"]
    return [problem for _, problem in _faults(network_args)]


def read_words(network_args: Sequence[str], folders: Sequence[Path], **more: str) -> Read:
    """The settings in raw words, with every mistake of the words and of the settings.

    Args:
        network_args: the words.
        folders: where a relative `spf_config` is looked for.
        **more: settings that win, by their names without `spf_`.
    """
    problems = check_words(network_args)
    if isinstance(network_args, str):
        return Read(SPFConfig(), tuple(problems), NAMES)
    ours, _ = split_words(network_args)
    found = read({**ours, **{PREFIX + name: value for name, value in more.items()}}, folders)
    about = {name.removeprefix(PREFIX) for name, _ in _faults(network_args)} - more.keys()
    wrong = found.wrong | (NAMES if "config" in about else about)
    # A value that is cut off or one of two may not even be what was meant: nothing is said of it twice.
    return replace(found, problems=(*problems, *found.problems), wrong=frozenset(wrong))
