"""SPF's settings and the host's options: what would stop the run, and what would make it something else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from spf_plugin.config import Read
from spf_plugin.core.prompt import Target
from spf_plugin.hosts import resuming
from spf_plugin.hosts.kohya import own_targets, rules
from spf_plugin.hosts.kohya.captions import dropout, shuffled
from spf_plugin.hosts.kohya.images import Image
from spf_plugin.hosts.kohya.rules import MUCH_DROPOUT, NETWORK_MODULES
from spf_plugin.hosts.looking import name_problems
from spf_plugin.network_args import check_words, read_words
from spf_plugin.tools.check import trainer
from spf_plugin.tools.check.dataset import Data
from spf_plugin.tools.check.family import Family
from spf_plugin.tools.check.findings import Finding, of
from spf_plugin.tools.check.source import HostArgs


def parse_settings(args: HostArgs, target: str | None, folders: Sequence[Path]) -> tuple[Read, list[Finding]]:
    """SPF's settings, as training would read them from `network_args`, and what is wrong with them.

    Args:
        args: the host's arguments.
        target: from `--target`; wins.
        folders: where a relative `spf_config` is looked for.
    """
    words = args.network_args or []
    if not isinstance(words, str):
        words = [str(word) for word in words]
    found = read_words(words, folders, **({"target": target} if target else {}))
    of_words = check_words(words)
    return found, [
        Finding("error", "network-args" if problem in of_words else "setting", problem) for problem in found.problems
    ]


def targets_of(targets: tuple[Target, ...], data: Data) -> dict[int, tuple[Target, ...]]:
    """Per `id(subset)` its targets: its own in place of the run's (`targets`)."""
    out = {}
    for subset in data.subsets:
        try:
            own = own_targets.of_attributes(subset.custom_attributes)
            out[id(subset)] = targets if own is None else own
        except ValueError:  # the host's rules say what is wrong with it
            out[id(subset)] = ()
    return out


def look(
    args: HostArgs,
    spf: Read,
    data: Data,
    model: Family,
    tokenize: Callable[[str], Sequence[int]],
    *,
    for_host: bool,
) -> list[Finding]:
    """Mistakes in the settings and options.

    Args:
        args: the host's arguments.
        spf: SPF's settings.
        data: the data set.
        model: what kind of base model it is.
        tokenize: text -> token ids without begin, end and padding.
        for_host: a run of sd-scripts is known, and not only its data.
    """
    script = model.script
    # Unless it is certainly none of SDXL: what would be wrong with SDXL is worth saying of a guess too.
    sdxl = not script.is_dit and model.certain in ("", "sdxl")
    images = [
        Image.of([entry.caption], entry.subset, is_reg=entry.subset.is_reg, path=str(entry.path))
        for entry in data.entries
    ]
    images, problems = own_targets.readable(images)
    limit = script.text_limit(args)
    wrong = {*spf.wrong, "target"} if problems else spf.wrong
    said = rules.look(
        args, images, spf.config, wrong, sdxl=sdxl, dit=script.dit, trying=False, tokenize=tokenize, limit=limit
    )
    never = spf.config.never_aligned(args.max_train_steps)
    found = [
        Finding("error", "never-aligned" if problem in never else "stops", problem)
        for problem in (*name_problems(args, "sd-scripts"), *problems, *said.errors)
    ]
    # What is of captions, `captions` says with more detail.
    found += [Finding("warning", "warns", warning) for warning in said.warnings]
    if for_host:
        found += [*_module(args), *trainer.look(args, data, model), *_options(args, data, is_dit=script.is_dit)]
    found += together(args, spf, data)
    for subset in data.subsets:
        rate = dropout(subset)
        if rate >= MUCH_DROPOUT:
            found.append(
                Finding(
                    "warning",
                    "caption-dropout",
                    f"{subset.label}: {rate:.0%} of the captions are dropped; those steps are plain training, without "
                    "SPF",
                    "0.1 or less is usual.",
                )
            )
    return found


def _module(args: HostArgs) -> list[Finding]:
    module = args.network_module
    if module is None:
        fix = "Add --network_module spf_plugin.lora to the launch line."
        return [Finding("warning", "no-module", "the config names no network_module", fix)]
    if module not in NETWORK_MODULES:
        return [
            Finding(
                "error",
                "other-module",
                f"network_module is {module!r}: SPF would not run, and its settings would be ignored",
                'Set network_module = "spf_plugin.lora"; the other module may be named by spf_network.',
            )
        ]
    return []


def _options(args: HostArgs, data: Data, *, is_dit: bool) -> list[Finding]:
    found = []
    rates = args.text_encoder_lr
    if isinstance(rates, list) and len(rates) > 1 and not is_dit:
        message = f"text_encoder_lr = {rates}: one for each text encoder, and sd-scripts up to v0.9.1 takes only one"
        found.append(Finding("note", "newer", message, "Use a later release, or give one."))
    if args.given.get("skip_image_resolution"):
        message = "skip_image_resolution: only sd-scripts from v0.11 on has it"
        found.append(Finding("note", "newer", message, "Use a later release, or take the small images out."))
    for subset in data.subsets:
        separator = subset.keep_tokens_separator
        mine = [entry for entry in data.entries if entry.subset is subset]
        if separator and not shuffled(subset) and any(separator in entry.caption for entry in mine):
            found.append(
                Finding(
                    "warning",
                    "separator-stays",
                    f"{subset.label}: without shuffle_caption the keep_tokens_separator {separator!r} stays in the "
                    "captions, and the text encoder reads it",
                )
            )
    classes = [entry for entry in data.entries if entry.source == "class" and not entry.subset.is_reg]
    nothing = [entry for entry in data.entries if entry.source == "nothing" and not entry.subset.is_reg]
    trained = sum(not entry.subset.is_reg for entry in data.entries)
    for mine, code, what in (
        (classes, "class-caption", f"have no caption file and get the class {classes[0].caption!r}" if classes else ""),
        (nothing, "no-caption", "have no caption at all"),
    ):
        if mine:
            fix = f"Write a {mine[0].subset.caption_extension} file of the same name beside each."
            images = tuple(entry.name for entry in mine)
            found.append(Finding("warning", code, f"{of(len(mine), trained)} {what}", fix, images))
    return found


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # no name of a package, or a module that is only half there
        return False


def _length(args: HostArgs, data: Data) -> tuple[int, int]:
    """Optimiser steps of the run, and how many they are at most: buckets that are not known make more batches."""
    if not args.max_train_epochs:
        return args.max_train_steps, args.max_train_steps
    batches = most = 0
    for dataset, count in zip(data.datasets, data.counts, strict=True):
        if count.batches is not None:
            batches, most = batches + count.batches, most + count.batches
            continue
        shown = count.repeats + count.regular
        batches += -(-shown // max(1, dataset.batch_size))
        most += shown
    accumulated = max(1, args.gradient_accumulation_steps or 1)
    return args.max_train_epochs * -(-batches // accumulated), args.max_train_epochs * -(-most // accumulated)


def together(args: HostArgs, spf: Read, data: Data) -> list[Finding]:
    """SPF's settings beside the host's: its length, and what is installed."""
    found = []
    config, wrong = spf.config, spf.wrong
    likely, most = _length(args, data)
    later = args.max_train_epochs or args.resume  # else the host's rules say it
    if likely and later and "stage2_start" not in wrong and config.never_aligned(likely):
        about = "about " if args.max_train_epochs else ""
        found.append(
            Finding(
                "error" if config.never_aligned(most) and not args.resume else "warning",
                "never-aligned",
                f"alignment would start at step {config.stage2_step(likely)}, and the run ends at {about}step "
                f"{likely}: a plain LoRA" + (", unless what is resumed is aligned already" if args.resume else ""),
                "Lower spf_stage2_start: below 1 it is a share of the run, from 1 on a step.",
            )
        )
    found += [
        Finding("warning", "resumed-otherwise", change)
        for change in resuming.changes(resuming.of_run(args), config, wrong)
    ]
    if not config.active:
        found.append(Finding("note", "measures-only", "all weights are 0: the LoRA will be plain, SPF only measures"))
    package = config.network.split(".")[0]
    if package and package != "networks" and not _importable(package):
        fix = "pip install --no-deps lycoris-lora" if package == "lycoris" else ""
        message = f"spf_network={config.network}: there is no {package} in this Python environment"
        found.append(Finding("warning", "no-network", message, fix))
    return found
