"""Asks musubi-tuner itself what it makes of a data set, where a copy of it is at hand, and puts that into the place of
SPF's model of it: of the two, musubi-tuner is right."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import CONFIG_BYTES, read_text
from spf_plugin.hosts.musubi import architectures
from spf_plugin.hosts.musubi.dataset import Dataset, Item
from spf_plugin.hosts.musubi.rules import HOST
from spf_plugin.hosts.musubi.scripts import Script
from spf_plugin.tools.check.asking import SECONDS, SECONDS_PER_IMAGE, Answer, Progress, put
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.musubi.data import Data, Found
from spf_plugin.tools.check.source import HostArgs

MODEL = f"as SPF's model of {HOST} reads it"
_PROGRAM = "spf_plugin.hosts.musubi.preparing"
#: Errors of what musubi-tuner reads, or refuses, when it makes its data sets; the others it meets later.
JUDGED = frozenset(("dataset-config", "not-utf8", "metadata", "caption-extension"))


def at_hand(script: Path | None = None) -> Path | None:
    """The copy of musubi-tuner that the run would be started in, by what lies there: the folder with its package.

    Args:
        script: the trainer, as the user writes it.
    """
    folders = [Path.cwd()]
    if script is not None:
        folders = [script.parent, script.absolute().parent.parent, *folders]
    try:
        found = importlib.util.find_spec("musubi_tuner")
    except (ImportError, ValueError):
        found = None
    folders += [Path(place).parent for place in (found and found.submodule_search_locations) or ()]
    places = (place.absolute() for folder in folders for place in (folder, folder / "src"))
    return next((place for place in places if _is_copy(place)), None)


def _is_copy(folder: Path) -> bool:
    """Whether a folder has what is asked here."""
    try:
        text = read_text(folder / "musubi_tuner" / "dataset" / "config_utils.py", CONFIG_BYTES)
    except SPFError:
        return False
    return "class BlueprintGenerator" in text and "def generate_dataset_group_by_blueprint" in text


def ask(host: Path, args: HostArgs, script: Script | None, images: int, progress: Progress) -> Answer:
    """What musubi-tuner makes of a run's data set.

    Args:
        host: see `at_hand`.
        args: the host's arguments.
        script: the trainer, where it is known.
        images: about how many the data set has, which sets the time that it may take.
        progress: called while it reads.
    """
    known = script is not None and script.arch in architectures.NAMES
    request = {
        "config": str(args.dataset_config),
        "code": architectures.named(script.arch).code(args) if script is not None and known else "",
        "timestep_buckets": args.num_timestep_buckets,
    }
    place = host.parent if host.name == "src" else host
    answer = put(HOST, _PROGRAM, {**request, "host": str(host)}, SECONDS + SECONDS_PER_IMAGE * images, progress)
    return replace(answer, host=place)


def heard(data: Data, answer: Answer) -> tuple[Data, str]:
    """The data set as it will be trained, and who read it; the arguments as for sd-scripts' (`check/heard.py`)."""
    name = f"{HOST} at {answer.host}"
    if answer.cannot:
        return data, f"{MODEL}, as {name} cannot be asked: {answer.cannot}"
    if answer.datasets is None:
        data.findings.insert(0, Finding("error", "musubi-stops", f"{name} stops: {answer.stops}"))
        return data, f"{MODEL}, as {name} stops"
    mine = data.found if len(data.found) == len(answer.datasets) else [None] * len(answer.datasets)
    found = [_found(ours, theirs) for ours, theirs in zip(mine, answer.datasets, strict=True)]
    return Data(found, [_judged(finding, name) for finding in data.findings]), f"as read by {name}"


def _judged(finding: Finding, name: str) -> Finding:
    """What remains of a finding about a data set that musubi-tuner takes."""
    if finding.level != "error" or finding.code not in JUDGED:
        return finding
    message = f"{finding.message} (so SPF's model has it; {name} takes the data set)"
    return Finding("note", "overruled", message, "", finding.images)


def _found(mine: Found | None, theirs: dict[str, Any]) -> Found:
    said = {field.name: theirs[field.name] for field in fields(Dataset)}
    items = tuple(Item(each["path"], each["caption"]) for each in theirs["items"])
    # Caches are looked at by where they are (`data.read`), which its own comparison of names does not.
    dataset = Dataset(**{**said, "items": items, "one_frame": tuple(theirs["one_frame"]), "cache": ""})
    buckets = theirs.get("buckets")
    return Found(
        dataset,
        {**(mine.values if mine else {}), **theirs["values"]},
        Path(theirs["cache"]) if theirs["cache"] else None,
        None if buckets is None else {(width, height): count for width, height, count in buckets},
        theirs.get("batches") or None,
    )
