"""What musubi-tuner and SPF have cached of a data set: training sees nothing else."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from spf_plugin.core.prompt import Target
from spf_plugin.hosts.musubi import architectures, items, rules
from spf_plugin.hosts.musubi.rules import HOST
from spf_plugin.tools.check.findings import Finding, of, some
from spf_plugin.tools.check.musubi.data import Found
from spf_plugin.tools.check.source import HostArgs


def look(sets: Sequence[Found], args: HostArgs, arch: str, targets: Sequence[Target]) -> list[Finding]:
    """What is missing in the caches, or of something else than the data set.

    Args:
        sets: the data sets.
        args: the host's arguments.
        arch: SPF's name of the architecture.
        targets: of the run; empty where they are wrong.
    """
    architecture = architectures.named(arch)
    code = architecture.code(args)  # what the host calls the run's model in the names of its files
    missing: dict[str, list[str]] = {"latents": [], "text": []}
    stale: list[str] = []
    count = 0
    shown: list[str] = []
    texts: dict[str, list[str]] = {}
    for found in sets:
        if found.cache is None:
            continue
        latents = _latents(found, code)
        known = {item.stem for item in found.data.items}
        stale += sorted(set(latents) - known)
        count += len(found.data.items)
        if architecture.shown:
            shown += items.showing(_files(found, code), architecture.shown)
        for item in found.data.items:
            text = os.path.join(str(found.cache), architectures.text_file(item.stem, code))
            if item.stem not in latents:
                missing["latents"].append(item.stem)
            if not os.path.isfile(text):
                missing["text"].append(item.stem)
            elif item.stem in latents:
                texts.setdefault(text, []).append(item.caption)
    findings = _missing(missing, count, architecture)
    findings += [Finding("error", "stops", problem) for problem in rules.shown_problems(shown)]
    if stale:
        message = f"{len(stale)} cached items are not in the data set, and {HOST} trains them: {some(stale)}"
        fix = f"Cache latents and text again without --keep_cache, or delete their files ({stale[0]}_*_{code}*)."
        findings.append(Finding("warning", "stale-cache", message, fix, tuple(stale)))
    return findings + (_prompts(texts, architecture, targets, args) if targets and texts else [])


def _latents(found: Found, code: str) -> dict[str, int]:
    """The names of the items whose latents are cached, as the host reads them off the files, and how many each has."""
    behind = 3 if found.data.video else 2  # frames, size, code
    names: dict[str, int] = {}
    for path in _files(found, code):
        stem = "_".join(os.path.basename(path).split("_")[:-behind])
        names[stem] = names.get(stem, 0) + 1
    return names


def _files(found: Found, code: str) -> list[str]:
    """The files of cached latents."""
    return glob.glob(os.path.join(glob.escape(str(found.cache)), architectures.latents_files(code)))


def _missing(missing: dict[str, list[str]], items: int, architecture: architectures.Architecture) -> list[Finding]:
    scripts = {"latents": architecture.latents_script, "text": architecture.text_script}
    findings = []
    for what, stems in missing.items():
        if not stems:
            continue
        level = "error" if len(stems) == items else "warning"
        does = "finds nothing to train" if level == "error" else "leaves them out"
        message = f"{of(len(stems), items, 'items')} have no cached {what}, and {HOST} {does}"
        fix = f"Run {scripts[what]} with this --dataset_config."
        findings.append(Finding(level, "not-cached", message, fix, tuple(stems)))
    return findings


def _prompts(
    texts: dict[str, list[str]], architecture: architectures.Architecture, targets: Sequence[Target], args: HostArgs
) -> list[Finding]:
    """Whether what `spf cache-prompts` wrote is what a run would take: by the run's own rules."""
    from torch import nn

    from spf_plugin.families import known
    from spf_plugin.hosts.musubi.replay import Fault, fault, text_first, text_is_stale

    family = known.named(architecture.family)(nn.Module())
    wrong: dict[Fault, list[str]] = {}
    stale: set[Fault] = set()
    for text, captions in texts.items():
        told = fault(text, captions, targets, family)
        if isinstance(told, Fault):
            wrong.setdefault(told, []).append(os.path.basename(text).removesuffix(architectures.TEXT))
            stale |= {told} if text_is_stale(text, captions) else set()
    return [
        Finding(
            "error",
            "no-prompts",
            f"the prompts of {of(len(stems), len(texts), 'cached items')} {kind.value}",
            f"{text_first(architecture) if kind in stale else ''}Run {architecture.command(args, targets)}",
            tuple(stems),
        )
        for kind, stems in wrong.items()
    ]
