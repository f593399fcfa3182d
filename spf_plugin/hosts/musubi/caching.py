"""The command that encodes the prompts of a musubi-tuner data set: `spf cache-prompts`.

It runs the text side of training (`spf_plugin.text`) with the host's tokenizer and text encoder, and writes down what
that asked for, an item a file (`prompts`).
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spf_plugin.core.prompt import Target, split
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Family, Text
from spf_plugin.hosts.musubi import items, prompts, rules
from spf_plugin.hosts.musubi.architectures import TEXT, Architecture
from spf_plugin.hosts.musubi.encoders import Encoder
from spf_plugin.hosts.musubi.prompts import Record, Stamp
from spf_plugin.hosts.musubi.replay import LONG, Fault, Tokens, fault, of_vector
from spf_plugin.text import TextSide

ENOUGH = 4  # encodings of another encoder, after which nothing else is looked at
Show = Callable[[int, int], None]
"""`(items done, items in all)`"""


@dataclass(frozen=True)
class Done:
    """What the command did: how many items were encoded, how many were current already, which files were removed."""

    encoded: int
    current: int
    removed: tuple[str, ...]


def parser(architecture: Architecture) -> argparse.ArgumentParser:
    """The options of the host's own caching script.

    Raises:
        ImportError: musubi-tuner is not there, or lacks something.
    """
    common = importlib.import_module("musubi_tuner.cache_text_encoder_outputs")
    module, function = architecture.caching
    made: argparse.ArgumentParser = getattr(importlib.import_module(module), function)(common.setup_parser_common())
    return made


def data_sets(args: Any, code: str) -> list[Any]:
    """The host's data sets of a `--dataset_config`, for caching.

    Raises:
        SPFError: the host refuses it.
    """
    from musubi_tuner.dataset import config_utils

    try:
        config = config_utils.load_user_config(args.dataset_config)
        generator = config_utils.BlueprintGenerator(config_utils.ConfigSanitizer())
        blueprint = generator.generate(config, args, architecture=code)
        return list(config_utils.generate_dataset_group_by_blueprint(blueprint.dataset_group).datasets)
    except Exception as error:  # voluptuous', toml's and the host's own
        raise SPFError(f"--dataset_config {args.dataset_config}: musubi-tuner refuses it: {error}") from error


class Live:
    """`spf_plugin.text.TextHost` with the host's encoder.

    Args:
        architecture: of the model.
        encoder: its tokenizer and text encoder.
    """

    def __init__(self, architecture: Architecture, encoder: Encoder):
        self._architecture, self._encoder, self.prefix = architecture, encoder, encoder.prefix

    def tokenize(self, text: str) -> Sequence[int]:
        return self._encoder.tokenize(text)

    def tensors(self, prompt: str) -> dict[str, Tensor]:
        """By the host's names."""
        return self._encoder.encode(prompt)

    def encode(self, prompts_: Sequence[str], beside: Sequence[str] = ()) -> Text:
        (prompt,) = prompts_
        return self._architecture.text(self.tensors(prompt))


class _Recorder:
    """`spf_plugin.text.TextHost` that notes what it is asked about one caption.

    Args:
        live: answers.
        phrases: has the vectors of phrases, which captions share.
        base: the base prompt.
    """

    def __init__(self, live: Live, phrases: TextSide, base: str):
        self._live, self._phrases, self._base = live, phrases, base
        self.prefix = live.prefix
        self.tokens: dict[str, list[int]] = {}
        self.tensors: dict[str, Tensor] = {}  # of the base prompt, if it was asked for

    def tokenize(self, text: str) -> Sequence[int]:
        if text not in self.tokens:
            self.tokens[text] = list(self._live.tokenize(text))
        return self.tokens[text]

    def encode(self, prompts_: Sequence[str], beside: Sequence[str] = ()) -> Text:
        (prompt,) = prompts_
        if prompt == self._base and not self.tensors and beside:
            self.tensors = self._live.tensors(prompt)
            return {"hidden": torch.zeros(1, 1, 1)}  # nobody looks at it
        return of_vector(self._phrases.vector(prompt))


def run(
    architecture: Architecture,
    family: Family,
    targets: Sequence[Target],
    args: Any,
    show: Show = lambda done, total: None,
) -> Done:
    """Encode what is not current yet.

    Args:
        architecture: of the model.
        family: of the model, without weights.
        targets: the target phrases.
        args: the options, parsed by the host's parser (`parser`).
        show: progress.

    Raises:
        SPFError: with every item whose prompts could not be made; all others are written.
    """
    if problems := rules.model_problems(args, architecture.script):
        raise SPFError(problems)
    sets = data_sets(args, architecture.code(args))
    try:
        captions = items.captions(sets)
    except Exception as error:  # a caption file that is missing or no UTF-8, a line of JSONL without a caption
        raise SPFError(f"a caption of the data set cannot be read: {error}") from error
    if not captions:
        raise SPFError(f"--dataset_config {args.dataset_config}: there are no captions in its data sets.")
    todo, tokens = [], Tokens()
    for text, said in captions.items():
        told = fault(text, said, targets, family)
        if isinstance(told, Fault):
            todo.append(text)
        elif not tokens.agree(told):
            todo = list(captions)  # whose tokenizer is the right one nobody knows
            break
        else:
            tokens.add(told)
    current, unfit = len(captions) - len(todo), _Unfit(architecture)
    ready = [text for text in todo if unfit.takes(text, captions[text])]
    if ready:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with torch.no_grad():
            live = Live(architecture, architecture.load(args, device))
            phrases = TextSide(live, family, targets, nullcontext)
            for i, text in enumerate(ready):
                show(current + i, len(captions))
                if unfit.matches(text, captions[text][0], live):
                    write(text, captions[text][0], targets, family, live, phrases)
                elif len(unfit.other) == i + 1 >= ENOUGH:
                    break
    problems = unfit.problems()
    if problems:
        raise SPFError(problems)
    show(len(captions), len(captions))
    return Done(len(ready), current, () if args.keep_cache else _tidied(sets))


class _Unfit:
    """The items whose cached text is not there, or not that of their caption."""

    def __init__(self, architecture: Architecture):
        self._architecture = architecture
        self.missing: list[str] = []
        self.several: list[str] = []
        self.stale: list[str] = []
        self.other: list[str] = []

    def takes(self, text: str, captions: Sequence[str]) -> bool:
        """Whether the host has cached this caption."""
        if len(captions) > 1:
            self.several.append(text)
            return False
        if not os.path.isfile(text):
            self.missing.append(text)
            return False
        if prompts.host_caption(text) != captions[0]:
            self.stale.append(text)
            return False
        return True

    def matches(self, text: str, caption: str, live: Live) -> bool:
        """Whether what is cached is what the encoder makes of the caption."""
        start = len(live.tokenize(live.prefix)) if live.prefix else 0
        try:
            theirs = prompts.host_text(text)
        except ValueError:  # its tensors: what it says of the caption was read
            theirs = {}
        if prompts.near(live.tensors(caption), theirs, self._architecture.tensors, start):
            return True
        self.other.append(text)
        return False

    def problems(self) -> list[str]:
        script = self._architecture.text_script
        found = []
        if self.several:
            found.append(
                f"{len(self.several)} cached encodings are of several items with different captions, e.g. "
                f"{self.several[0]}: musubi-tuner names them by the image's name alone. Rename the images."
            )
        if self.missing:
            found.append(
                f"{len(self.missing)} captions are not cached, e.g. {self.missing[0]} is missing. Run {script} first."
            )
        if self.stale:
            found.append(
                f"{len(self.stale)} cached encodings are of another caption than the data set has now, e.g. "
                f"{self.stale[0]}. Run {script} again (without --skip_existing)."
            )
        if self.other:
            found.append(
                f"{len(self.other)} cached encodings are not what this text encoder makes of their captions, e.g. "
                f"{self.other[0]}. Name the encoder that {script} was given, or run it again with this one."
            )
        return found


def write(text: str, caption: str, targets: Sequence[Target], family: Family, live: Live, phrases: TextSide) -> None:
    """Record an item.

    Args:
        text: the file with the host's cached text.
        caption: the item's, of which that is.
        targets: the target phrases.
        family: of the model.
        live: encodes.
        phrases: a text side with the same encoder, which keeps the vectors of phrases.

    Raises:
        SPFError: the file cannot be written.
    """
    recorder = _Recorder(live, phrases, split(caption, targets).base)
    vectors = TextSide(recorder, family, targets, nullcontext).rehearse(caption, length=LONG)
    prompts.write(
        prompts.beside(text),
        Record(
            caption,
            tuple(map(str, targets)),
            split(caption, targets).base,
            recorder.prefix,
            recorder.tokens,
            tuple(vectors),
            Stamp.of(text),
        ),
        recorder.tensors,
        torch.stack(list(vectors.values())) if vectors else torch.zeros(0, 0),
    )


def _tidied(sets: Sequence[Any]) -> tuple[str, ...]:
    """Remove our files whose cached text is gone, as the host removes what belongs to no item; returns their paths."""
    removed = []
    for data_set in sets:
        for path in sorted(Path(data_set.cache_directory).glob(f"*_{data_set.architecture}{prompts.OURS}")):
            text = str(path).removesuffix(prompts.OURS) + TEXT
            if os.path.exists(text):
                continue
            try:
                prompts.read(str(path))
            except (OSError, ValueError):
                continue  # not ours, or not for us to judge
            path.unlink()
            removed.append(str(path))
    return tuple(removed)
