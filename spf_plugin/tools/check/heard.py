"""Puts what sd-scripts makes of a data set into the place of SPF's model of it: of the two, sd-scripts is right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from spf_plugin.tools.check.asking import Answer
from spf_plugin.tools.check.dataset import Count, Data, Dataset, Entry, Subset
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import FOLDERS, MASKS, METADATA

MODEL = "as SPF's model of sd-scripts reads it"
#: Errors of what sd-scripts prepares without a word, and then fails at or trains otherwise than asked for.
LATER = frozenset(("no-folder", "caption-extension", "mask-size", "small-images"))


def heard(data: Data, answer: Answer, *, whole: bool) -> tuple[Data, str]:
    """The data set as it will be trained, and who read it.

    Args:
        data: as the model has it; its findings are of use either way.
        answer: what sd-scripts says.
        whole: the run is known; else its size may be none of the user's.
    """
    name = f"sd-scripts at {answer.host}"
    if answer.cannot:
        return data, f"{MODEL}, as {name} cannot be asked: {answer.cannot}"
    if answer.datasets is None:
        data.findings.insert(0, Finding("error", "sd-scripts-stops", f"{name} stops: {answer.stops}"))
        return data, f"{MODEL}, as {name} stops"
    return _as_told(data, answer.datasets, name, whole=whole), f"as read by {name}"


def _as_told(data: Data, told: list[dict[str, Any]], name: str, *, whole: bool) -> Data:
    out = Data(findings=[kept for finding in data.findings if (kept := _judged(finding, name)) is not None])
    place = {id(subset): i for i, dataset in enumerate(data.datasets) for subset in dataset.subsets}
    known = {(place[id(entry.subset)], os.path.abspath(entry.key)): entry for entry in data.entries}
    for i, theirs in enumerate(told):
        mine = data.datasets[i] if len(data.datasets) == len(told) else Dataset(label=f"[[datasets]] {i + 1}")
        sized = whole or mine.resolution is not None
        dataset = _dataset(mine, theirs, sized=sized)
        entries = []
        for key, path, caption, repeats, _, number in theirs["images"]:
            subset, ours = dataset.subsets[number], known.get((i, os.path.abspath(key)))
            entries.append(_entry(ours, key, Path(path), caption, subset, repeats))
        out.datasets.append(dataset)
        out.entries += entries
        out.counts.append(_count(entries, theirs, sized=sized))
    return out


def _judged(finding: Finding, name: str) -> Finding | None:
    """What remains of a finding about a data set that sd-scripts takes; None where nothing does."""
    if finding.code == "newer":
        return None  # it is known which release reads it
    if finding.level != "error" or finding.code in LATER:
        return finding
    message = f"{finding.message} (so SPF's model has it; {name} takes the data set)"
    return Finding("note", "overruled", message, "", finding.images)


def _values(kind: type, theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: theirs[f.name] for f in fields(kind) if f.name in theirs}


def _dataset(mine: Dataset, theirs: Mapping[str, Any], *, sized: bool) -> Dataset:
    values = theirs["values"]
    subsets = []
    for own in theirs["subsets"]:
        source = own.get("image_dir"), own.get("metadata_file")
        like = (subset for subset in mine.subsets if (subset.image_dir, subset.metadata_file) == source)
        subsets.append(replace(next(like, Subset()), **_values(Subset, own)))
    kind = MASKS if values["masked"] else METADATA if any(s.metadata_file for s in subsets) else FOLDERS
    size = {"resolution": (values["width"], values["height"])} if sized else {}
    said = {name: value for name, value in _values(Dataset, values).items() if value is not None}
    return replace(mine, kind=kind, subsets=tuple(subsets), **{**said, **size})


def _entry(ours: Entry | None, key: str, path: Path, caption: str, subset: Subset, repeats: int) -> Entry:
    if ours is not None and ours.caption == caption:
        source = ours.source
    elif subset.metadata_file:
        source = "metadata"
    elif caption and caption != subset.class_tokens:
        source = "file"
    else:
        source = "class" if caption else "nothing"
    path = path if ours is None else ours.path  # cached latents stand in the image's place in some
    return Entry(path, f"{path.parent.name}/{path.name}", caption, source, subset, key, repeats)


def _count(entries: list[Entry], theirs: Mapping[str, Any], *, sized: bool) -> Count:
    """What a data set comes to; without a size of its own its buckets are unknown."""
    trained = [entry for entry in entries if not entry.subset.is_reg]
    shown = sum(entry.shown for entry in trained)
    buckets = {(width, height): count for width, height, count in sorted(theirs["buckets"])} if sized else None
    regular = sum(entry.shown for entry in entries) - shown
    return Count(len(trained), shown, regular, buckets, theirs["batches"] if sized else None)
