"""Which subsets the host would make of a folder or of a dataset TOML, and what it refuses in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import read_json, read_toml, shown
from spf_plugin.tools.check.dataset import Data, Subset
from spf_plugin.tools.check.findings import some
from spf_plugin.tools.check.host_options import DATASET, SUBSET
from spf_plugin.tools.check.kinds import is_of
from spf_plugin.tools.check.source import HostArgs

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number with a point",
    str: "a text in quotes",
    dict: "a table: { name = value }",
    list: "a list",
}


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing where the system does not say it."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def images(folder: Path) -> Iterator[Path]:
    """The images of a folder that the host reads."""
    for path in listed(folder):
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."):
            yield path


def unreadable(folder: Path, what: str, data: Data) -> None:
    """Say of a folder that is there that nobody may look into it."""
    if not os.access(folder, os.R_OK | os.X_OK):
        data.add("error", "no-folder", f"{what} {folder}: it cannot be looked into. Check its permissions")


def make(args: HostArgs, *levels: Mapping[str, Any], **own: Any) -> Subset:
    """A subset: its own values, else the dataset's, else [general]'s, else the arguments'."""
    renamed = {"num_repeats": "dataset_repeats", "batch_size": "train_batch_size"}
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Subset)):
        candidates = [own.get(name), *(level.get(name) for level in levels), getattr(args, renamed.get(name, name))]
        # What has the wrong type is reported where it was read, and passed over here.
        value = next((c for c in candidates if c is not None and is_of(c, {**DATASET, **SUBSET}[name])), None)
        if value is not None:
            values[name] = value
    return Subset(**values)


def from_folder(
    folder: str | None, args: HostArgs, data: Data, *, is_reg: bool = False, loose_images: bool = False
) -> Iterator[Subset]:
    """The subfolders of `train_data_dir` or `reg_data_dir` whose names begin with a number."""
    if not folder:
        return
    base = Path(folder)
    option = "reg_data_dir" if is_reg else "train_data_dir"
    if not os.path.isdir(base):
        data.add("error", "no-folder", f"{option} {base}: there is no such folder (from {Path.cwd()})")
        return
    unreadable(base, option, data)
    ignored = []
    for sub in (p for p in listed(base) if p.is_dir() and not p.name.startswith(".")):
        number, _, name = sub.name.partition("_")
        if not re.fullmatch(r"[+-]?\d+", number.strip()):
            if any(images(sub)):
                ignored.append(sub.name)
        else:
            yield make(args, image_dir=str(sub), num_repeats=int(number), is_reg=is_reg, class_tokens=name)
    if ignored:
        data.add(
            "warning",
            "folder-without-repeats",
            f"sd-scripts passes over {some(ignored)}: the name does not begin with the number of repeats",
            f"Rename it, for example to 10_{ignored[0]}.",
        )
    loose = list(images(base))
    if loose and loose_images:
        yield make(args, image_dir=str(base))
        data.add(
            "note",
            "loose-images",
            f"{len(loose)} images lie directly in {base}: spf train takes them, sd-scripts does not",
            f"For sd-scripts put them into a subfolder named by repeats, such as {base.name}/10_name.",
        )
    elif loose:
        data.add(
            "warning",
            "loose-images",
            f"{len(loose)} images lie directly in {base}, where sd-scripts does not look",
            f"Put them into a subfolder named by repeats, such as {base.name}/10_name.",
        )


def from_config(path: Path, args: HostArgs, data: Data) -> Iterator[Subset]:
    """The subsets of a `--dataset_config`.

    Raises:
        SPFError: it cannot be read.
    """
    config = read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
    if not isinstance(config, dict):
        raise SPFError(f"{path} is no data set configuration: it has no names. See presets/dataset.toml.")
    general, datasets = config.get("general", {}), config.get("datasets", [])
    if not isinstance(general, dict):
        data.add("error", "dataset-config", f"{path.name}: general must be written [general], with one bracket")
        return
    for key in set(config) - {"general", "datasets"}:
        _unknown(data, path, "", key, ["general", "datasets"])
    _check_keys(data, path, "[general]", general, DATASET)
    if not isinstance(datasets, list) or not all(isinstance(d, dict) for d in datasets):
        data.add("error", "dataset-config", f"{path.name}: datasets must be written [[datasets]], with two brackets")
        return
    for i, dataset in enumerate(datasets, 1):
        subsets = dataset.get("subsets", [])
        if not isinstance(subsets, list) or not all(isinstance(s, dict) for s in subsets):
            data.add("error", "dataset-config", f"{path.name}: write [[datasets.subsets]], with two brackets")
            continue
        _check_keys(
            data, path, f"[[datasets]] {i}", {k: v for k, v in dataset.items() if k != "subsets"}, DATASET, "subsets"
        )
        with_metadata = sum("metadata_file" in subset for subset in subsets)
        if 0 < with_metadata < len(subsets):
            data.add(
                "error",
                "dataset-config",
                f"{path.name}: [[datasets]] {i} mixes subsets with and without metadata_file",
                "Put them into two [[datasets]].",
            )
        for subset in subsets:
            _check_keys(data, path, f"[[datasets.subsets]] of dataset {i}", subset, SUBSET)
            if not with_metadata and "image_dir" not in subset:
                data.add("error", "dataset-config", f"{path.name}: a subset of dataset {i} has no image_dir")
                continue
            yield make(args, subset, dataset, general)


def _unknown(data: Data, path: Path, where: str, key: str, choices: Sequence[str]) -> None:
    place = f" in {where}" if where else ""
    data.add("error", "dataset-config", f"{path.name}: sd-scripts refuses {key!r}{place}{nearest(key, choices)}")


def _check_keys(
    data: Data, path: Path, where: str, values: Mapping[str, Any], known: Mapping[str, Any], *more: str
) -> None:
    for key, value in values.items():
        wanted = known.get(key)
        if wanted is None:
            _unknown(data, path, where, key, [*known, *more])
        elif not is_of(value, wanted):
            name = _TYPE_NAMES.get(wanted if isinstance(wanted, type) else wanted[0], "something else")
            data.add("error", "dataset-config", f"{path.name}: {key} = {shown(value)} in {where} must be {name}")
