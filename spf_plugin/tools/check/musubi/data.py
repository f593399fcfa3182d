"""The data set of a run inside musubi-tuner, by the rules of its `dataset/config_utils.py` and `datasources.py`."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import CAPTION_BYTES, METADATA_BYTES, read_json, read_text, read_toml, shown
from spf_plugin.hosts.musubi.dataset import ONE_FRAME, Dataset, Item
from spf_plugin.hosts.musubi.rules import HOST
from spf_plugin.hosts.musubi.scripts import Script
from spf_plugin.tools.check.findings import Finding, some

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG", ".JPG", ".JPEG", ".WEBP", ".BMP", ".avif", ".AVIF")
MORE_IMAGES = (".jxl", ".JXL")  # with a further package
VIDEOS = tuple(
    case
    for ending in ("mp4", "webm", "avi", "mkv", "mov", "flv", "wmv", "m4v", "mpg", "mpeg")
    for case in (f".{ending}", f".{ending.upper()}")
)
_SIZE = "one whole number, or two in a list"
_SHARED: dict[str, Any] = {
    "caption_extension": str,
    "batch_size": int,
    "num_repeats": int,
    "resolution": _SIZE,
    "enable_bucket": bool,
    "bucket_no_upscale": bool,
}
_IMAGE: dict[str, Any] = {
    **_SHARED,
    "image_directory": str,
    "image_jsonl_file": str,
    "cache_directory": str,
    "control_directory": str,
    "multiple_target": bool,
    "fp_latent_window_size": int,
    "fp_1f_clean_indices": list,
    "fp_1f_target_index": int,
    "fp_1f_no_post": bool,
    "no_resize_control": bool,
    "control_resolution": _SIZE,
}
_VIDEO: dict[str, Any] = {
    **_SHARED,
    "video_directory": str,
    "video_jsonl_file": str,
    "control_directory": str,
    "target_frames": list,
    "frame_extraction": str,
    "frame_stride": int,
    "frame_sample": int,
    "max_frames": int,
    "cache_directory": str,
    "source_fps": float,
    "fp_latent_window_size": int,
}
#: Old names that the host still takes.
OLD = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
_NAMES = {str: "a text in quotes", int: "a whole number", bool: "true or false", float: "a number with a point"}
_SOURCES = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")


@dataclass(frozen=True)
class Found:
    """One `[[datasets]]` as it would be trained.

    Attributes:
        data: what a run looks at.
        values: its settings, with those of `[general]`.
        cache: the folder of its cache; None where the host has none.
        buckets: cached items with repeats at each size; None where nobody says it.
        batches: steps of an epoch with these; None where nobody says it, or there are none.
    """

    data: Dataset
    values: Mapping[str, Any]
    cache: Path | None
    buckets: Mapping[tuple[int, int], int] | None = None
    batches: int | None = None

    @property
    def source(self) -> str:
        return str(next((self.values[name] for name in _SOURCES if self.values.get(name)), "?"))

    @property
    def repeats(self) -> int:
        return int(self.values.get("num_repeats", 1))


@dataclass
class Data:
    """Everything that was read."""

    found: list[Found] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, code: str, message: str, fix: str = "", images: Sequence[str] = ()) -> None:
        self.findings.append(Finding(level, code, message, fix, tuple(images)))


def content(path: Path) -> dict[str, Any]:
    """What a data set's file says.

    Raises:
        SPFError: it cannot be read.
    """
    ending = path.name.lower().rpartition(".")[2]
    if ending not in ("toml", "json"):
        raise SPFError(f"{path}: {HOST} takes a data set configuration only as .toml or .json. Rename it.")
    said = read_json(path) if ending == "json" else read_toml(path)
    if not isinstance(said, dict):
        raise SPFError(f"{path} is no data set configuration: it has no names. See presets/musubi/dataset.toml.")
    return said


def read(path: Path, script: Script | None) -> Data:
    """The data sets of a `--dataset_config`.

    Args:
        path: the file.
        script: the trainer, where it is known.

    Raises:
        SPFError: it cannot be read.
    """
    data, said = Data(), content(path)
    general, sets = said.get("general", {}), said.get("datasets", [])
    for key in set(said) - {"general", "datasets"}:
        _unknown(data, path, "", key, ["general", "datasets"])
    if not isinstance(general, dict):
        data.add("error", "dataset-config", f"{path.name}: general must be written [general], with one bracket")
        general = {}
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        data.add("error", "dataset-config", f"{path.name}: datasets must be written [[datasets]], with two brackets")
        return data
    general = _checked(data, path, "[general]", general, _SHARED)
    for i, own in enumerate(sets, 1):
        label = f"[[datasets]] {i}"
        video = "video_directory" in own or "video_jsonl_file" in own
        values = {**general, **_checked(data, path, label, own, _VIDEO if video else _IMAGE)}
        found = _found(data, path, label, values, video=video)
        if found is not None:
            data.found.append(found)
            _numbers(data, path, found, script)
    _caches_apart(data, path)
    if not sets:
        data.add("error", "dataset-config", f"{path.name} has no [[datasets]], so there is nothing to train")
    return data


def _unknown(data: Data, path: Path, where: str, key: str, choices: Sequence[str]) -> None:
    place = f" in {where}" if where else ""
    data.add("error", "dataset-config", f"{path.name}: {HOST} refuses {key!r}{place}{nearest(key, choices)}")


def _fits(value: Any, wanted: Any) -> bool:
    """As the host's schema has it: a `true` is a whole number, and a whole number is no float."""
    if wanted is _SIZE:
        return isinstance(value, int) or (
            isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value)
        )
    if wanted is list:
        return isinstance(value, list) and all(isinstance(item, int) for item in value)
    return isinstance(value, wanted)


def _checked(data: Data, path: Path, where: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the host takes; what it does not goes to `data`."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        name = OLD.get(key, key)
        wanted = known.get(name)
        if wanted is None:
            _unknown(data, path, where, key, list(known))
        elif not _fits(value, wanted):
            must = wanted if wanted is _SIZE else _NAMES.get(wanted, "a list of whole numbers")
            data.add("error", "dataset-config", f"{path.name}: {key} = {shown(value)} in {where} must be {must}")
        elif isinstance(value, bool) and wanted is not bool:
            message = f"{path.name}: {key} = {str(value).lower()} in {where} counts as {int(value)}"
            data.add("warning", "dataset-config", message, "Write the number.")
        else:
            kept[name] = value
    return kept


def _found(data: Data, path: Path, label: str, values: dict[str, Any], *, video: bool) -> Found | None:
    """One data set with its items; None where nothing says what they are."""
    of = "video" if video else "image"
    folder, lines = values.get(f"{of}_directory"), values.get(f"{of}_jsonl_file")
    if folder is None and lines is None:
        message = f"{path.name}: {label} names neither image_directory, image_jsonl_file, video_directory nor "
        data.add("error", "dataset-config", message + "video_jsonl_file")
        return None
    if folder is not None and lines is not None:
        data.add("warning", "ignored-option", f"{path.name}: {label}: {of}_jsonl_file is ignored beside {of}_directory")
    control = bool(values.get("control_directory"))
    if folder is not None:
        items = list(_of_folder(data, folder, values.get("caption_extension"), label, video=video))
    else:
        assert lines is not None
        items, theirs = _of_lines(data, Path(lines), of)
        control = control or theirs
    cache = values.get("cache_directory") or folder
    if cache is None:
        message = f"{path.name}: {label} has no cache_directory, and {HOST} fails without where items come from JSON "
        data.add("error", "no-cache", message + "lines", 'For example cache_directory = "cache"')
    one_frame = tuple(name for name in ONE_FRAME if values.get(name))
    several, batch_size = bool(values.get("multiple_target")), int(values.get("batch_size", 1))
    dataset = Dataset(tuple(items), label, video, control, several, one_frame, batch_size=batch_size)
    return Found(dataset, values, Path(cache) if cache is not None else None)


def _listed(folder: str, endings: Sequence[str]) -> list[str]:
    """As the host does it: no hidden files, sorted."""
    found = {path for ending in endings for path in glob.glob(os.path.join(glob.escape(folder), "*" + ending))}
    return sorted(found)


def _of_folder(data: Data, folder: str, ending: str | None, label: str, *, video: bool) -> Iterator[Item]:
    what = "videos" if video else "images"
    if not os.path.isdir(folder):
        key = "video_directory" if video else "image_directory"
        data.add("error", "no-folder", f"{label}: {key} {folder}: there is no such folder (from {Path.cwd()})")
        return
    paths = _listed(folder, VIDEOS if video else IMAGES)
    if not paths:
        data.add("error", "no-images", f"{label}: there are no {what} in {folder}; {HOST} looks into no folder in it")
        return
    if ending is None:
        message = f"{label} has no caption_extension, and {HOST} fails when it reads a caption"
        data.add("error", "caption-extension", message, 'Set caption_extension = ".txt".')
        return
    bases = {os.path.splitext(os.path.basename(path))[0] for path in _listed(folder, [ending])}
    without = [p for p in paths if os.path.splitext(os.path.basename(p))[0] not in bases]
    if without:
        others = [p for p in without if os.path.isfile(os.path.splitext(p)[0] + ".txt") and ending != ".txt"]
        fix = 'Set caption_extension = ".txt".' if others else f"Write a {ending} file of the same name beside each."
        does = "fails at them" if video else "leaves them out"
        level = "error" if video or len(without) == len(paths) else "warning"
        message = f"{label}: {len(without)} of {len(paths)} {what} have no {ending} file, and {HOST} {does}: "
        data.add(level, "no-caption", message + some(map(os.path.basename, without)), fix)
    for path in paths:
        caption = None if path in without else _caption(data, os.path.splitext(path)[0] + ending, label)
        if caption is not None:
            yield Item(path, caption)


def _caption(data: Data, file: str, label: str) -> str | None:
    try:
        text = read_text(Path(file), CAPTION_BYTES)
    except SPFError as error:
        data.add("error", "not-utf8", f"{label}: {error.problems[0]}", f"{HOST} stops there.")
        return None
    if text.startswith("\ufeff"):
        message = f"{label}: {os.path.basename(file)} begins with a byte order mark, which the text encoder reads"
        data.add("warning", "bom", message, "Save as UTF-8 without BOM.")
    if not text.strip():
        message = f"{label}: {os.path.basename(file)} is empty: an image without a caption"
        data.add("warning", "empty-caption-file", message, "Describe the image.")
    return text.strip()


def _of_lines(data: Data, path: Path, of: str) -> tuple[list[Item], bool]:
    """The items of JSON lines, and whether they have control images."""
    try:
        rows = [(i, json.loads(line)) for i, line in enumerate(_lines(path), 1)]
    except SPFError as error:
        data.add("error", "metadata", error.problems[0])
        return [], False
    except (ValueError, RecursionError) as error:
        data.add("error", "metadata", f"{path}: a line is no JSON, and {HOST} stops there: {error}")
        return [], False
    items, missing, wrong = [], [], []
    for i, row in rows:
        name = row.get(f"{of}_path", row.get(f"{of}_path_0")) if isinstance(row, dict) else None
        caption = row.get("caption") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(caption, str):
            wrong.append(str(i))
            continue
        if not os.path.exists(name):
            missing.append(name)
        items.append(Item(name, caption))
    if wrong:
        message = f"{path.name}: lines {some(wrong)} have no {of}_path or no caption, and {HOST} fails there"
        data.add("error", "metadata", message, f'Every line is {{"{of}_path": "...", "caption": "..."}}.')
    if missing:
        fix = "Paths are relative to the working folder."
        data.add("error", "image-missing", f"{path.name} names {of}s that are not there: {some(missing)}", fix, missing)
    control = any(key.startswith("control_path") for _, row in rows if isinstance(row, dict) for key in row)
    return items, control


def _lines(path: Path) -> list[str]:
    """An empty line is a mistake, but for the end of the last one."""
    text = read_text(path, METADATA_BYTES)
    return text.removesuffix("\n").split("\n") if text else []


def _numbers(data: Data, path: Path, found: Found, script: Script | None) -> None:
    """Numbers that the host fails at, or that do nothing."""
    values, label = found.values, found.data.label
    for name in ("batch_size", "num_repeats"):
        if values.get(name, 1) < 1:
            data.add("error", "batch-size", f"{path.name}: {name} = {values[name]} in {label} leaves nothing to train")
    extraction = values.get("frame_extraction", "head")
    if extraction not in EXTRACTIONS:
        fix = f"It must be one of {', '.join(EXTRACTIONS)}."
        data.add("error", "frames", f"{path.name}: {HOST} does not know frame_extraction = {extraction!r}", fix)
    odd = [frames for frames in values.get("target_frames", []) if frames % 4 != 1]
    if odd:
        message = f"{path.name}: target_frames {some(odd)} in {label}: {HOST} rounds down to 4 N + 1"
        data.add("warning", "frames", message, "Write what is meant, such as 1, 25 or 49.")
    if "resolution" not in values:
        message = f"{path.name}: {label} has no resolution, so {HOST} takes 960 x 544"
        data.add("warning", "no-resolution", message, "For example resolution = [1024, 1024]")
    if values.get("bucket_no_upscale") and not values.get("enable_bucket"):
        data.add("warning", "ignored-option", f"{path.name}: bucket_no_upscale does nothing without enable_bucket")


def _caches_apart(data: Data, path: Path) -> None:
    """Two data sets in one cache folder would train each other's items; the host compares the names only."""
    seen: dict[str, Found] = {}
    for found in data.found:
        if found.cache is None:
            continue
        other = seen.setdefault(os.path.realpath(found.cache), found)
        if other is not found:
            message = f"{path.name}: {other.data.label} and {found.data.label} have one cache folder, {found.cache}, "
            fix = "Give each a cache_directory of its own."
            data.add("error", "one-cache", message + "and each would train what both cached", fix)
