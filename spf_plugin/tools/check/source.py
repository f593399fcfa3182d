"""What the host would be told: its `--config_file`, with the words of the command line over it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spf_plugin.config import PREFIX
from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import SLASHES, read_toml, shown
from spf_plugin.hosts.kohya.scripts import Script
from spf_plugin.hosts.looking import repeated
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import (
    CHOICES,
    DATASET,
    LISTS,
    NUMBERS,
    OF_SCRIPT,
    OPTIONS,
    SWITCHES,
    TYPES,
)
from spf_plugin.tools.check.kinds import KINDS, fits, is_of

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
#: Where one value may stand for a list: `settings` looks at network_args, and the host takes a number for the other.
_SAID_ELSEWHERE = ("network_args", "text_encoder_lr")


#: Options that the host puts through the schema of its data sets, which takes no `1` for true.
_SCHEMA = {
    option: wanted
    for name, wanted in DATASET.items()
    if (option := {"num_repeats": "dataset_repeats", "batch_size": "train_batch_size"}.get(name, name)) in OPTIONS
    and name not in ("resolution", "skip_image_resolution", "face_crop_aug_range")
}


def _written(option: str) -> str:
    wanted = _SCHEMA.get(option)
    point = "a number with a point" if wanted is float else KINDS[option].name
    return f"Write {point}." if wanted is not bool else "Write true or false, without quotes."


class HostArgs:
    """The host's arguments as attributes; what is not given is the host's default, or None."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS):
        self.given, self.defaults = dict(values), defaults

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("given", "defaults"):
            raise AttributeError(name)
        return self.given.get(name, self.defaults.get(name))


def unfolded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The host's rule: section names are free, one level is unfolded."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(value) if isinstance(value, dict) else flat.update({key: value})
    return flat


class _HostParser(argparse.ArgumentParser):
    """The host's parser of the command line, made from what is known of it."""

    def __init__(self, problems: list[str], options: Collection[str]):
        super().__init__(add_help=False, argument_default=argparse.SUPPRESS)
        self.problems = problems
        for name in sorted(options):
            if name in SWITCHES:
                self.add_argument(f"--{name}", action="store_true")
            else:
                many = "*" if name in LISTS else None
                self.add_argument(f"--{name}", type=_reader(name, problems), nargs=many)

    def error(self, message: str) -> NoReturn:
        raise SPFError([*self.problems, f"sd-scripts would not take these options: {message}."])


def _reader(name: str, problems: list[str]) -> Callable[[str], Any]:
    """What makes a value of a word; it never fails, so that all mistakes are found."""

    def value_of(text: str) -> Any:
        try:
            value = TYPES[name](text)
        except ValueError:
            problems.append(f"--{name} takes {'a whole number' if TYPES[name] is int else 'a number'}, not {text!r}")
            return text
        if name in CHOICES and value not in CHOICES[name]:
            problems.append(f"--{name} takes one of {', '.join(map(str, CHOICES[name]))}, not {text!r}")
        return value

    return value_of


def parse_words(words: Sequence[str], script: Script | None = None) -> dict[str, Any]:
    """The options on a command line of the host, by the rules of its parser (argparse, as the host's is).

    Args:
        words: of the command line.
        script: the trainer. None: SDXL's, whose options all but SD's have, and where it has not got one, any.

    Raises:
        SPFError: a word that belongs to no option, an option that the host does not have, or a value that it refuses.
    """
    options = OF_SCRIPT[script.name if script else "sdxl_train_network"]
    if script is None and any(word.startswith("--") and _name(word) in OPTIONS - options for word in words):
        options = OPTIONS
    problems: list[str] = []
    values, others = _HostParser(problems, options).parse_known_args(words)
    problems += repeated(words, "sd-scripts")
    unknown = False
    for word in others:
        if word.startswith("-"):
            unknown = True  # what follows are its values
            known = nearest(_name(word).replace("-", "_"), [*options, *OWN_OPTIONS])
            of = script.file if script else "sd-scripts"
            problems.append(f"{word.partition('=')[0]} is no option of {of} or of spf check{known}")
        elif not unknown:
            problems.append(f"stray word {word!r}: no option takes it. Quote a text that has spaces")
    if problems:
        raise SPFError(problems)
    return vars(values)


def _name(word: str) -> str:
    return word.lstrip("-").partition("=")[0]


def read(
    config: Path | None, words: Mapping[str, Any], content: Mapping[str, Any] | None = None
) -> tuple[HostArgs, list[Finding]]:
    """The host's arguments, and what is wrong with how they are written.

    Args:
        config: the `--config_file`, or None.
        words: options of the command line (`parse_words`); they win.
        content: what the file says, where it is no `--config_file` but says the same; read from the file otherwise.

    Raises:
        SPFError: the file cannot be read.
    """
    from_file = {} if config is None else unfolded(read_toml(config)) if content is None else content
    findings = [*_written_wrongly(config, from_file)] if config else []
    values = {**{k: v for k, v in from_file.items() if not k.startswith(PREFIX)}, **words}
    # What the host cannot work with is said above, and left out of what is looked at.
    values = {k: v for k, v in values.items() if fits(k, v) or (k == "network_args" and isinstance(v, str))}
    if values.get("caption_extention") is not None:  # the host's own old misspelling
        values["caption_extension"] = values.pop("caption_extention")
    return HostArgs(values), findings


def _written_wrongly(path: Path, values: Mapping[str, Any]) -> list[Finding]:
    findings: list[Finding] = []
    for key, value in values.items():
        said = len(findings)
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
        elif key in NUMBERS and isinstance(value, str):
            findings.append(
                Finding(
                    "error",
                    "quoted-number",
                    f'{path.name}: {key} = "{value}" is a text, and sd-scripts does not make a number of it',
                    "Write the number without quotes.",
                )
            )
        elif key in LISTS and not isinstance(value, list) and value not in ("", 0) and key not in _SAID_ELSEWHERE:
            findings.append(
                Finding(
                    "error",
                    "no-list",
                    f"{path.name}: {key} = {shown(value)} is no list, and sd-scripts goes through it piece by piece",
                    f"Write {key} = [{json.dumps(value)}]" if isinstance(value, str | int | float) else "Write a list.",
                )
            )
        elif isinstance(value, str) and value.lower() in ("true", "false") and key not in _SCHEMA:
            findings.append(
                Finding(
                    "warning",
                    "quoted-boolean",
                    f'{path.name}: {key} = "{value}" is a text, and every text counts as true',
                    f"Write {key} = {value.lower()} without quotes.",
                )
            )
        refused = key in _SCHEMA and not isinstance(value, list) and not is_of(value, _SCHEMA[key])
        taken = fits(key, value) or (key == "network_args" and isinstance(value, str))
        if len(findings) == said and (refused or not taken):
            text = f"{path.name}: {key} = {shown(value)} is not what sd-scripts can work with"
            findings.append(Finding("error", "wrong-type", text, _written(key)))
        if isinstance(value, str) and re.search(r"[\x00-\x08\x0a-\x1f]", value):
            findings.append(
                Finding("error", "backslash", f"{path.name}: {key} holds a control character: {value!r}", SLASHES)
            )
    return findings
