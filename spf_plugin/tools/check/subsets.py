"""Which subsets the host would make of a folder or of a dataset TOML, and what it refuses in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import read_json, read_toml, shown
from spf_plugin.tools.check.buckets import Size
from spf_plugin.tools.check.dataset import Data, Dataset, Subset
from spf_plugin.tools.check.findings import some
from spf_plugin.tools.check.host_options import DATASET, FOLDERS, MASKS, METADATA, NOT_OF, SINCE_2025, SUBSET
from spf_plugin.tools.check.kinds import in_data_set
from spf_plugin.tools.check.source import HostArgs

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SPELLED = {spelled for ending in IMAGE_ENDINGS for spelled in (ending, ending.upper())}  # the host takes no ".Png"
_RENAMED = {"num_repeats": "dataset_repeats", "batch_size": "train_batch_size"}
_TYPES = {**DATASET, **SUBSET}
_TWO = {"resolution": "two whole numbers", "face_crop_aug_range": "two numbers with a point: [0.8, 1.2]"}
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number with a point",
    str: "a text in quotes",
    dict: "a table: { name = value }",
    list: "a list",
}


def as_they_come(folder: Path) -> list[Path]:
    """What lies in a folder, in the system's order, which is the host's; nothing where the system does not say it."""
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):  # a NUL in the name
        return []


def listed(folder: Path) -> list[Path]:
    """The same in order of names."""
    return sorted(as_they_come(folder))


def images(folder: Path) -> Iterator[Path]:
    """The images of a folder that the host reads."""
    for path in listed(folder):
        ending = path.suffix.lower() if os.name == "nt" else path.suffix
        if ending in _SPELLED and not path.name.startswith("."):
            yield path


def unreadable(folder: Path, what: str, data: Data) -> None:
    """Say of a folder that is there that nobody may look into it."""
    if not os.access(folder, os.R_OK | os.X_OK):
        data.add("error", "no-folder", f"{what} {folder}: it cannot be looked into. Check its permissions")


def _value(name: str, args: HostArgs, levels: Sequence[Mapping[str, Any]]) -> Any:
    """The first that is there: of a subset, its data set, [general], the arguments; None where nobody says it."""
    for value in (*(level.get(name) for level in levels), getattr(args, _RENAMED.get(name, name))):
        # What has the wrong type is reported where it was read, and passed over here.
        if value is not None and in_data_set(name, value, _TYPES[name]):
            return value
    return None


def make(args: HostArgs, *levels: Mapping[str, Any], kind: str = FOLDERS) -> Subset:
    """A subset of a data set of this kind: what the kind does not take is not there."""
    names = (f.name for f in fields(Subset) if f.name not in NOT_OF[kind])
    values = {name: value for name in names if (value := _value(name, args, levels)) is not None}
    extension = values.get("caption_extension")
    if extension and not extension.startswith("."):
        values["caption_extension"] = f".{extension}"
    return Subset(**values)


def pair(value: Any, number: Callable[[Any], Any] = int) -> tuple[Any, Any] | None:
    """Two numbers as the host reads them: `512`, `[512, 768]`, `"512"` or `"512,768"`; None for anything else."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [number(part) for part in parts]
    except (ValueError, TypeError):
        return None
    return (numbers[0], numbers[-1]) if len(numbers) in (1, 2) else None


def _size(name: str, args: HostArgs, levels: Sequence[Mapping[str, Any]]) -> Size | None:
    given = (level.get(name) for level in levels)
    own = next((value for value in given if value is not None and in_data_set(name, value, _TYPES[name])), None)
    value = getattr(args, name) if own is None else own
    return None if value is None else pair(value)


def gather(
    args: HostArgs, subsets: Sequence[Subset], *levels: Mapping[str, Any], kind: str = FOLDERS, label: str = ""
) -> Dataset:
    """A data set of these subsets: its own values, else [general]'s, else the arguments'."""
    values: dict[str, Any] = {name: _size(name, args, levels) for name in ("resolution", "skip_image_resolution")}
    for name in (f.name for f in fields(Dataset) if f.name in DATASET and f.name not in values):
        value = _value(name, args, levels)
        if value is not None:
            values[name] = value
    return Dataset(kind, tuple(subsets), label or "the data set", **values)


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
    for sub in (p for p in as_they_come(base) if p.is_dir() and not p.name.startswith(".")):
        number, _, name = sub.name.partition("_")
        if not re.fullmatch(r"[+-]?\d+", number.strip()):
            if any(images(sub)):
                ignored.append(sub.name)
        else:
            own = {"image_dir": str(sub), "num_repeats": int(number), "is_reg": is_reg, "class_tokens": name}
            yield make(args, own)
    if ignored:
        ignored.sort()
        data.add(
            "warning",
            "folder-without-repeats",
            f"sd-scripts passes over {some(ignored)}: the name does not begin with the number of repeats",
            f"Rename it, for example to 10_{ignored[0]}.",
        )
    loose = list(images(base))
    if loose and loose_images:
        yield make(args, {"image_dir": str(base)})
        data.add(
            "note",
            "loose-images",
            f"{len(loose)} images lie directly in {base}: spf train takes them, sd-scripts' train_data_dir does not",
            f"For train_data_dir put them into a subfolder named by repeats, such as {base.name}/10_name; "
            "the image_dir of a data set configuration takes the folder as it is.",
        )
    elif loose:
        data.add(
            "warning",
            "loose-images",
            f"{len(loose)} images lie directly in {base}, where sd-scripts does not look",
            f"Put them into a subfolder named by repeats, such as {base.name}/10_name.",
        )


def from_config(path: Path, args: HostArgs, data: Data) -> Iterator[Dataset]:
    """The data sets of a `--dataset_config`.

    Raises:
        SPFError: it cannot be read.
    """
    if path.suffix.lower() not in (".json", ".toml"):
        raise SPFError(f"{path}: sd-scripts takes a data set configuration only as .toml or .json. Rename it.")
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
        kind = _kind(data, path, i, subsets, masked=bool(args.masked_loss))
        own = {k: v for k, v in dataset.items() if k != "subsets"}
        _check_keys(data, path, f"[[datasets]] {i}", own, _left(DATASET, kind), "subsets")
        made = []
        for subset in subsets:
            _check_keys(data, path, f"[[datasets.subsets]] of dataset {i}", subset, _left(SUBSET, kind))
            if kind == METADATA or "image_dir" in subset:
                made.append(make(args, subset, own, general, kind=kind))
            else:
                data.add("error", "dataset-config", f"{path.name}: a subset of dataset {i} has no image_dir")
        yield gather(args, made, own, general, kind=kind, label=f"[[datasets]] {i}")


def _left(keys: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {key: wanted for key, wanted in keys.items() if key not in NOT_OF[kind]}


def _kind(data: Data, path: Path, number: int, subsets: Sequence[Mapping[str, Any]], *, masked: bool) -> str:
    """Of which class the host makes a data set; a mixture is reported."""
    masks = sum("conditioning_data_dir" in subset for subset in subsets)
    if masks and not masked:
        data.add(
            "error",
            "dataset-config",
            f"{path.name}: [[datasets]] {number} has conditioning_data_dir, which needs masked_loss",
            "Set masked_loss = true for the run, or take the masks out.",
        )
        return MASKS
    if 0 < masks < len(subsets):
        data.add(
            "error",
            "dataset-config",
            f"{path.name}: [[datasets]] {number} mixes subsets with and without conditioning_data_dir",
            "Put them into two [[datasets]].",
        )
        return MASKS
    if masks:
        return MASKS
    with_metadata = sum("metadata_file" in subset for subset in subsets)
    if 0 < with_metadata < len(subsets):
        data.add(
            "error",
            "dataset-config",
            f"{path.name}: [[datasets]] {number} mixes subsets with and without metadata_file",
            "Put them into two [[datasets]].",
        )
    return METADATA if with_metadata else FOLDERS


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
            continue
        if not in_data_set(key, value, wanted):
            name = _TYPE_NAMES.get(wanted if isinstance(wanted, type) else wanted[0], "something else")
            name = _TWO.get(key, name) if isinstance(value, list) else name
            data.add("error", "dataset-config", f"{path.name}: {key} = {shown(value)} in {where} must be {name}")
        elif isinstance(value, bool) and wanted is not bool:
            message = f"{path.name}: {key} = {str(value).lower()} in {where} counts as {int(value)}"
            data.add("warning", "dataset-config", message, "Write the number.")
        if key in SINCE_2025:
            data.add("note", "newer", f"{path.name}: {key}: sd-scripts up to v0.9.1 refuses it", "Use a later release.")
