"""Reads the images and captions of a data set, by the host's rules."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import CAPTION_BYTES, METADATA_BYTES, read_json, read_text
from spf_plugin.hosts.kohya.cached_text import INFO_CACHE
from spf_plugin.hosts.kohya.captions import of_file
from spf_plugin.tools.check import limits, registered, subsets
from spf_plugin.tools.check.dataset import Data, Entry, Subset
from spf_plugin.tools.check.findings import some
from spf_plugin.tools.check.host_options import MASKS, METADATA
from spf_plugin.tools.check.source import HostArgs
from spf_plugin.tools.check.subsets import IMAGE_ENDINGS, images, listed

#: Images that the host reads only with further packages, or not at all.
OTHER_IMAGES = (".gif", ".tif", ".tiff", ".heic", ".avif", ".jxl")


def read_data(args: HostArgs, *, loose_images: bool = False, whole: bool = True) -> Data:
    """The data set that these arguments name.

    Args:
        args: the host's arguments.
        loose_images: take images that lie directly in `train_data_dir` too, as `spf train` does and the host does not.
        whole: the run is known, and not only its data: what is missing is missing.

    Raises:
        SPFError: the dataset TOML cannot be read.
    """
    data = Data()
    limits.of_arguments(args, data)
    if args.dataset_config:
        data.datasets = list(subsets.from_config(Path(args.dataset_config), args, data))
        ignored = [name for name in ("train_data_dir", "reg_data_dir", "in_json") if args.given.get(name)]
        if ignored:
            data.add("warning", "ignored-option", f"{some(ignored)}: sd-scripts ignores them beside a dataset_config")
    elif args.in_json:
        own = {"image_dir": args.train_data_dir, "metadata_file": args.in_json}
        data.datasets = [subsets.gather(args, [subsets.make(args, own, kind=METADATA)], kind=METADATA)]
    else:
        found = [
            *subsets.from_folder(args.train_data_dir, args, data, loose_images=loose_images),
            *subsets.from_folder(args.reg_data_dir, args, data, is_reg=True),
        ]
        data.datasets = [subsets.gather(args, found)]
    if args.conditioning_data_dir and not any(dataset.kind == MASKS for dataset in data.datasets):
        data.add(
            "warning",
            "ignored-option",
            "conditioning_data_dir: sd-scripts takes masks only from the subsets of a dataset_config, and ignores this",
        )
    for dataset in data.datasets:
        limits.look(dataset, args, data, whole=whole)
        registered.add(dataset, from_metadata if dataset.kind == METADATA else from_folder, data)
    limits.cached(args, data)
    if not any(not entry.subset.is_reg for entry in data.entries) and not any(
        f.level == "error" for f in data.findings
    ):
        data.add(
            "error",
            "no-images",
            "there are no training images" + ("" if data.subsets else ", and no train_data_dir or dataset_config"),
            f"sd-scripts takes {', '.join(IMAGE_ENDINGS)} from folders named by repeats, such as "
            "train_data_dir/10_name, or from the image_dir of a dataset_config.",
        )
    return data


def from_folder(subset: Subset, data: Data) -> Iterator[Entry]:
    """The images of one folder; what is wrong with their files goes to `data`."""
    folder = Path(subset.image_dir or "")
    if not os.path.isdir(folder):
        data.add("error", "no-folder", f"image_dir {folder}: there is no such folder (from {Path.cwd()})")
        return
    subsets.unreadable(folder, "image_dir", data)
    kept = _kept_info(folder, subset, data)
    found = list(images(folder)) if kept is None else list(kept)
    problems: dict[str, list[str]] = {}
    used: set[Path] = set()
    without = []
    for path in found:
        caption, where, problem = _caption_file(path, subset)
        if kept is not None:  # the host does not read the file
            caption, problem = kept[path] or None, ""
        used.add(where)
        if problem:
            problems.setdefault(problem, []).append(path.name)
        source = "file"
        if caption is None:
            without.append(path)
            caption, source = (subset.class_tokens, "class") if subset.class_tokens is not None else ("", "nothing")
        yield Entry(path, f"{folder.name}/{path.name}", caption, source, subset, str(path))
    for problem, names in problems.items():
        code, fix = _PROBLEMS[problem]
        level = "error" if code in ("empty-caption-file", "not-utf8") else "warning"
        data.add(level, code, f"{folder.name}: {some(names)}: {problem}", fix, [f"{folder.name}/{n}" for n in names])
    instead = [p for p in without if os.path.isfile(p.with_suffix(".txt")) and subset.caption_extension != ".txt"]
    if instead:
        data.add(
            "error" if len(instead) == len(found) else "warning",
            "caption-extension",
            f"{folder.name}: {len(instead)} captions end in .txt, but sd-scripts would look for "
            f"{subset.caption_extension}",
            'Set caption_extension = ".txt".',
            [f"{folder.name}/{p.name}" for p in instead],
        )
    _other_files(folder, subset, found, used, data)


def _kept_info(folder: Path, subset: Subset, data: Data) -> dict[Path, str] | None:
    """The images and captions that `cache_info` has kept; None where the host reads the folder."""
    path = folder / INFO_CACHE
    if not subset.cache_info or not os.path.isfile(path):
        return None
    try:
        rows = read_json(path, METADATA_BYTES)
        return {Path(key): str(row["caption"] or "") for key, row in rows.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        data.add("error", "metadata", f"{path} is not what sd-scripts writes for cache_info: {error}", "Delete it.")
        return {}


_PROBLEMS = {
    "the caption file is empty, and sd-scripts stops there": ("empty-caption-file", "Write a caption, or delete it."),
    "the caption file is no UTF-8 text of less than 1 MiB": ("not-utf8", "Save it as UTF-8; sd-scripts stops there."),
    "the caption begins with a byte order mark, which the text encoder reads": ("bom", "Save as UTF-8 without BOM."),
    "only the first line of the caption is used": ("more-lines", "Write the caption in one line."),
}
_EMPTY, _NOT_UTF8, _BOM, _LINES = _PROBLEMS


def _caption_file(image: Path, subset: Subset) -> tuple[str | None, Path, str]:
    """`(caption or None, the file it is in or would be in, what is wrong with it)`."""
    stem = os.path.splitext(str(image))[0]
    parts = stem.split("_")
    without_face = "_".join(parts[:-4]) if len(parts) >= 5 else stem  # the host's rule for cut-out faces
    for candidate in (stem + subset.caption_extension, without_face + subset.caption_extension):
        path = Path(candidate)
        if not os.path.isfile(path):
            continue
        try:
            text = read_text(path, CAPTION_BYTES)
        except SPFError:  # it is a file
            return "", path, _NOT_UTF8
        if not text:
            return "", path, _EMPTY
        lines, caption = text.split("\n"), of_file(text, wildcards=subset.enable_wildcard)
        if subset.enable_wildcard:
            return caption, path, ""
        if caption.startswith("\ufeff"):
            return caption, path, _BOM
        return caption, path, _LINES if any(line.strip() for line in lines[1:]) else ""
    return None, Path(stem + subset.caption_extension), ""


def _other_files(folder: Path, subset: Subset, found: Sequence[Path], used: set[Path], data: Data) -> None:
    """Captions without image, images that are not read, and names that clash."""
    files = [p for p in listed(folder) if os.path.isfile(p) and not p.name.startswith(".")]
    orphans = [p.name for p in files if p.name.endswith(subset.caption_extension) and p not in used]
    if orphans:
        fix = "Name it as its image, or remove it."
        data.add("warning", "caption-without-image", f"{folder.name}: captions without image: {some(orphans)}", fix)
    others = [p.name for p in files if p.suffix.lower() in OTHER_IMAGES]
    if others:
        fix = "Save them as PNG, JPEG or WebP."
        data.add("warning", "image-not-read", f"{folder.name}: sd-scripts does not read {some(others)}", fix)
    nested = [p.name for p in listed(folder) if p.is_dir() and any(images(p))]
    if nested and not all(re.match(r"\d", name) for name in nested):
        data.add("warning", "nested-folder", f"{folder.name}: images in subfolders are not read: {some(nested)}")
    stems: dict[str, list[str]] = {}
    for path in found:
        stems.setdefault(path.stem, []).append(path.name)
    clashes = [" and ".join(names) for names in stems.values() if len(names) > 1]
    if clashes:
        data.add("warning", "shared-caption", f"{folder.name}: {some(clashes)} share one caption file", "Rename one.")


def from_metadata(subset: Subset, data: Data) -> Iterator[Entry]:
    """The images that an `in_json` names (JSON or JSON lines)."""
    path = Path(subset.metadata_file or "")
    try:
        metadata = _lines(path) if path.suffix == ".jsonl" else read_json(path, METADATA_BYTES)
        rows = [(str(key), dict(value)) for key, value in metadata.items()]
        relative = [key for key, _ in rows if not os.path.isabs(key)]
    except SPFError as error:
        data.add("error", "metadata", f"metadata {error.problems[0]}")
        return
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        data.add("error", "metadata", f"metadata {path} is not the JSON that sd-scripts writes: {error}")
        return
    if path.suffix == ".jsonl":
        data.add("note", "newer", f"{path.name}: sd-scripts up to v0.9.1 reads no .jsonl", "Use a later release.")
    if relative and subset.image_dir is None:
        fix = "Set image_dir (train_data_dir), or write whole paths."
        message = f"{path.name} names images such as {relative[0]}, and nothing says in which folder they lie"
        data.add("error", "metadata", message, fix)
        return
    missing, endless, ended, only_tags = [], [], [], []
    for key, row in rows:
        image = _metadata_image(key, subset)
        if image is None:
            missing.append(key)
            continue
        if str(image) != os.path.join(subset.image_dir or "", key):
            endless.append(key)
        elif not os.path.exists(key):
            ended.append(key)
        if subset.enable_wildcard and row.get("tags") and not str(row.get("caption") or "").strip():
            only_tags.append(key)
        yield Entry(image, f"{image.parent.name}/{image.name}", _metadata_caption(row, subset), "metadata", subset, key)
    if endless:
        message = f"{path.name}: {some(endless)} without the ending of its image, which some releases do not find"
        data.add("warning", "newer", message, "Write the whole name, or use v0.11 or later.", endless)
    if only_tags:
        message = f"{path.name}: {some(only_tags)}: tags without caption, which enable_wildcard loses before v0.11"
        data.add("warning", "newer", message, "Write them as the caption, or use a later release.", only_tags)
    if ended:
        message = (
            f"{path.name}: {some(ended)}: sd-scripts up to v0.9.1 finds an image in image_dir only without its ending"
        )
        data.add("note", "newer", message, "Use a later release.", ended)
    if missing:
        fix = "Paths are relative to image_dir (train_data_dir)."
        data.add(
            "error", "image-missing", f"{path.name} names images that are not there: {some(missing)}", fix, missing
        )


def _lines(path: Path) -> dict[str, Any]:
    """JSON lines: every line is one, so that an empty one is a mistake."""
    lines = read_text(path, METADATA_BYTES).removesuffix("\n").split("\n")
    return {row["image_path"]: row for row in map(json.loads, lines)}


def _metadata_caption(row: Mapping[str, Any], subset: Subset) -> str:
    """Caption and tags; with wildcards every line of the caption has the tags."""
    caption, tags = str(row.get("caption") or ""), str(row.get("tags") or "")
    if not subset.enable_wildcard or not tags:
        return f"{caption}{subset.caption_separator}{tags}" if caption and tags else caption or tags
    tags = tags.replace("\n", subset.caption_separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{subset.caption_separator}{tags}" for line in lines) or tags


def _metadata_image(key: str, subset: Subset) -> Path | None:
    base = os.path.join(subset.image_dir or "", key)
    candidates = [base, *(base + ending for ending in IMAGE_ENDINGS)]
    return next((Path(c) for c in candidates if os.path.isfile(c)), None)  # False for what no file can be called
