"""Which images of a data set the host registers, how often it shows each and at which size.

It passes over subsets, adds repeats to regularisation images, and pairs images with masks.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spf_plugin.tools.check.buckets import Buckets, Size
from spf_plugin.tools.check.dataset import Count, Data, Dataset, Entry, Subset
from spf_plugin.tools.check.findings import some
from spf_plugin.tools.check.host_options import MASKS, METADATA
from spf_plugin.tools.check.subsets import images

Reader = Callable[[Subset, Data], Iterator[Entry]]


def size_of(path: Path) -> Size | None:
    """Width and height of an image, from its header; None where they cannot be read, or Pillow is missing."""
    if not os.path.isfile(path):  # a pipe would block
        return None
    try:
        from PIL import Image

        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of its size: nothing is decoded here
            return image.size
    except Exception:  # Pillow lets many kinds through; `pictures` says what is wrong with the file
        return None


def add(dataset: Dataset, read: Reader, data: Data) -> None:
    """The images of one data set, with what is wrong with them, and what they come to.

    Args:
        dataset: the data set.
        read: the images of a subset.
        data: gets the entries, their count, and the findings.
    """
    trained: dict[str, Entry] = {}
    regular: list[Entry] = []
    seen: set[str | None] = set()
    held_back = held_repeats = 0
    for subset in dataset.subsets:
        if subset.num_repeats < 1:
            data.add("warning", "no-repeats", f"{subset.label}: num_repeats is below 1, so sd-scripts leaves it out")
            continue
        source = subset.metadata_file if dataset.kind == METADATA else subset.image_dir
        if source in seen:
            message = f"{source} is there twice in {dataset.label}: sd-scripts takes only the first"
            fix = "Raise its num_repeats, or put it into a [[datasets]] of its own."
            data.add("warning", "same-subset", message, fix)
            continue
        found = _large_enough(dataset, list(read(subset, data)))
        split = 0.0 if subset.is_reg or dataset.kind == METADATA else max(0.0, dataset.validation_split)
        if split and not found and os.path.isdir(source or ""):
            data.add("error", "no-images", f"{source}: no images to hold back by validation_split: sd-scripts stops")
        kept = len(range(len(found))[: math.ceil(len(found) * (1 - split))])
        if not kept:
            continue
        seen.add(source)
        held_back += len(found) - kept
        held_repeats += (len(found) - kept) * subset.num_repeats
        if subset.is_reg:
            regular += found
        else:
            trained.update({entry.key: entry for entry in found})
    entries = list(trained.values())
    repeats = sum(entry.shown for entry in entries) - held_repeats
    regular = _balanced(regular, repeats)
    if dataset.kind == MASKS:
        _masks(dataset, entries, held_back, data)
    data.entries += [*entries, *regular]
    sizes = dataset.sizes
    known = sizes is not None and not sizes.problem() and not held_back
    shown = _sorted(sizes, [*entries, *regular], data) if sizes and known else None
    batches = None if shown is None else sum(-(-count // max(1, dataset.batch_size)) for count in shown.values())
    data.counts.append(Count(len(entries) - held_back, repeats, sum(entry.shown for entry in regular), shown, batches))


def _large_enough(dataset: Dataset, found: list[Entry]) -> list[Entry]:
    """Without what `skip_image_resolution` leaves out."""
    least = dataset.skip_image_resolution
    if least is None:
        return found
    return [entry for entry in found if (size := size_of(entry.path)) is None or math.prod(size) > math.prod(least)]


def _balanced(regular: Sequence[Entry], wanted: int) -> list[Entry]:
    """Regularisation images are shown as often as training images are: the host adds repeats, or leaves some out."""
    taken: list[Entry] = []
    count = 0
    for entry in regular:
        if count >= wanted:
            break
        taken.append(entry)
        count += entry.shown
    if not taken or count >= wanted:
        return taken
    more, first = divmod(wanted - count, len(taken))
    return [replace(entry, repeats=entry.shown + more + (i < first)) for i, entry in enumerate(taken)]


def _sorted(sizes: Buckets, entries: Sequence[Entry], data: Data) -> dict[Size, int] | None:
    """How many images, with repeats, are trained at each size; None where a size cannot be read."""
    counts: Counter[Size] = Counter()
    small: list[Entry] = []
    unknown = False
    for entry in entries:
        size = size_of(entry.path)
        bucket = sizes.of(size) if size else None
        if bucket:
            counts[bucket] += entry.shown
        elif size:
            small.append(entry)
        unknown = unknown or bucket is None
    if small:
        names = [entry.name for entry in small]
        message = (
            f"{some(names)} is smaller than bucket_reso_steps {sizes.step}, and bucket_no_upscale leaves nothing of it"
        )
        data.add("error", "small-images", message, "Use larger images, or leave bucket_no_upscale out.", names)
    return None if unknown else dict(sorted(counts.items()))


def _masks(dataset: Dataset, entries: Sequence[Entry], held_back: int, data: Data) -> None:
    """Every image needs its mask, by name and of its size, and no mask may be left over."""
    folders: dict[str | None, str | None] = {}
    for subset in dataset.subsets:
        folders.setdefault(subset.image_dir, subset.conditioning_data_dir)
    missing, other_size = [], []
    used: set[str] = set()
    for entry in entries:
        folder = Path(folders.get(entry.subset.image_dir) or "")
        if not os.path.isdir(folder):
            continue
        mask = next((mask for mask in images(folder) if mask.stem == entry.path.stem), None)
        if mask is None:
            missing.append(entry)
            continue
        used.add(os.path.splitext(os.path.abspath(mask))[0])
        sizes = size_of(entry.path), size_of(mask)
        if dataset.enable_bucket and None not in sizes and sizes[0] != sizes[1]:
            other_size.append(entry)
    everywhere = dict.fromkeys(subset.conditioning_data_dir for subset in dataset.subsets)
    for name in everywhere:
        if not os.path.isdir(name or ""):
            data.add("error", "no-folder", f"conditioning_data_dir {name}: there is no such folder (from {Path.cwd()})")
    extra = [
        mask.name
        for name in everywhere
        for mask in images(Path(name or ""))
        if os.path.splitext(os.path.abspath(mask))[0] not in used
    ]
    for mine, code, what in ((missing, "masks", "no mask"), (other_size, "mask-size", "a mask of another size")):
        if mine:
            names = [entry.name for entry in mine]
            fix = "Put an image of the same name and size into conditioning_data_dir."
            data.add("error", code, f"{some(names)} has {what}: sd-scripts stops", fix, names)
    if extra or held_back:
        what = f"{some(extra)}: masks without image" if extra else "validation_split leaves masks without image"
        data.add("warning", "newer", f"{what}: sd-scripts before v0.11 stops", "Take them out, or use a later release.")
