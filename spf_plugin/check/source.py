"""What the host would be told: its `--config_file`, with the words of the command line over it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toml

from spf_plugin.check.findings import Finding
from spf_plugin.check.host_options import OPTIONS
from spf_plugin.config import PREFIX
from spf_plugin.errors import SPFError, nearest

#: The host's own defaults of what is read here.
DEFAULTS: dict[str, Any] = {
    "caption_extension": ".caption",
    "caption_separator": ",",
    "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0,
    "dataset_repeats": 1,
    "keep_tokens": 0,
    "max_train_steps": 1600,
    "save_model_as": "safetensors",
    "train_batch_size": 1,
}
OWN_OPTIONS = ("target", "tokenizer", "images", "json")  # of the command line itself
_NUMBERS = {
    *("caption_dropout_rate", "caption_tag_dropout_rate", "dataset_repeats", "keep_tokens", "max_timestep"),
    *("max_token_length", "max_train_epochs", "max_train_steps", "min_timestep", "token_warmup_step"),
    *("train_batch_size", "caption_dropout_every_n_epochs", "token_warmup_min"),
}
_SLASHES = "Write paths with forward slashes, C:/data/photos: in TOML a backslash begins an escape."


class HostArgs:
    """The host's arguments as attributes; what is not given is the host's default, or None."""

    def __init__(self, values: Mapping[str, Any]):
        self.given = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "given":
            raise AttributeError(name)
        return self.given.get(name, DEFAULTS.get(name))


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file, as the host reads it.

    Raises:
        SPFError: it cannot be read, or is no TOML.
    """
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise SPFError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise SPFError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (toml.TomlDecodeError, IndexError, ValueError) as error:  # the toml library leaks a few of its own
        hint = f" {_SLASHES}" if "\\" in path.read_text(encoding="utf-8") else ""
        raise SPFError(f"{path} is not valid TOML: {error}.{hint}") from None


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The host's rule: section names are free, one level is unfolded."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(value) if isinstance(value, dict) else flat.update({key: value})
    return flat


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--flag`, and `--network_args` with any number of values.

    Raises:
        SPFError: a word that belongs to no option, or an option that the host does not have.
    """
    values: dict[str, Any] = {}
    problems = []
    name, collected = "", list[str]()

    def close() -> None:
        if name == "network_args":
            values[name] = list(collected)
        elif name and len(collected) > 1:
            problems.append(f"--{name} is followed by the stray word {collected[1]!r}")
        elif name:
            values[name] = _typed(name, collected[0]) if collected else True

    for word in words:
        if word.startswith("--"):
            close()
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            collected = [value] if equals else []
            if name not in OPTIONS:
                problems.append(
                    f"--{name} is no option of sd-scripts or of spf check{nearest(name, [*OPTIONS, *OWN_OPTIONS])}"
                )
        elif not name:
            problems.append(f"stray word {word!r}: after CONFIG only options may follow, as sd-scripts takes them")
        else:
            collected.append(word)
    close()
    if problems:
        raise SPFError(problems)
    return values


def _typed(name: str, text: str) -> Any:
    if name in _NUMBERS and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if name in _NUMBERS:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def read(config: Path | None, words: Mapping[str, Any]) -> tuple[HostArgs, list[Finding]]:
    """The host's arguments, and what is wrong with how they are written.

    Args:
        config: the `--config_file`, or None.
        words: options of the command line (`parse_words`); they win.

    Raises:
        SPFError: the file cannot be read.
    """
    from_file = _flat(load_toml(config)) if config else {}
    findings = [*_written_wrongly(config, from_file)] if config else []
    values = {**{k: v for k, v in from_file.items() if not k.startswith(PREFIX)}, **words}
    values = {k: v for k, v in values.items() if not (k in _NUMBERS and isinstance(v, str))}
    if values.get("caption_extention") is not None:  # the host's own old misspelling
        values["caption_extension"] = values.pop("caption_extention")
    return HostArgs(values), findings


def _written_wrongly(path: Path, values: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for key, value in values.items():
        if key.startswith(PREFIX):
            findings.append(
                Finding(
                    "error",
                    "spf-outside-network-args",
                    f"{path.name}: {key} stands by itself, where sd-scripts ignores it",
                    f'Write network_args = ["{key}=..."], or put it into a file that spf_config names.',
                )
            )
        elif key not in OPTIONS:
            findings.append(
                Finding(
                    "warning",
                    "unknown-option",
                    f"{path.name}: sd-scripts has no option {key!r} and ignores it silently{nearest(key, OPTIONS)}",
                )
            )
        elif key in _NUMBERS and isinstance(value, str):
            findings.append(
                Finding(
                    "error",
                    "quoted-number",
                    f'{path.name}: {key} = "{value}" is a text, and sd-scripts does not make a number of it',
                    "Write the number without quotes.",
                )
            )
        elif isinstance(value, str) and value.lower() in ("true", "false"):
            findings.append(
                Finding(
                    "warning",
                    "quoted-boolean",
                    f'{path.name}: {key} = "{value}" is a text, and every text counts as true',
                    f"Write {key} = {value.lower()} without quotes.",
                )
            )
        if isinstance(value, str) and re.search(r"[\x00-\x08\x0a-\x1f]", value):
            findings.append(
                Finding("error", "backslash", f"{path.name}: {key} holds a control character: {value!r}", _SLASHES)
            )
    return findings
