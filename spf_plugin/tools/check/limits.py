"""What the host refuses in the numbers of a data set: its sizes and batches, and changes of images that are cached."""

from __future__ import annotations

from spf_plugin.tools.check.dataset import Data, Dataset
from spf_plugin.tools.check.family import Family
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import INTERPOLATIONS, MASKS
from spf_plugin.tools.check.source import HostArgs
from spf_plugin.tools.check.subsets import pair


def of_arguments(args: HostArgs, data: Data) -> None:
    """What the host reads of the arguments before it looks at any data set."""
    if args.resolution is not None and pair(args.resolution) is None:
        message = f"resolution = {args.resolution!r} is not one whole number or two"
        data.add("error", "no-resolution", message, 'For example resolution = "512,512"')
    given = args.face_crop_aug_range
    if given is None:
        return
    low, high = pair(given, float) or (1.0, 0.0)
    if low > high or given.count(",") != 1:
        message = f"face_crop_aug_range = {given!r} is not two numbers, the lower one first"
        data.add("error", "crop-range", message, 'For example face_crop_aug_range = "2.0,4.0"')


def look(dataset: Dataset, args: HostArgs, data: Data, *, whole: bool) -> None:
    """What is wrong with the numbers of one data set goes to `data`."""
    where = dataset.label
    if dataset.sizes is None:
        if whole and args.resolution is None:
            fix = 'For example resolution = "512,512"'
            data.add("error", "no-resolution", f"resolution is missing for {where}", fix)
    elif problem := dataset.sizes.problem():
        data.add("error", "buckets", f"{where}: {problem}: sd-scripts stops", "Usual are 256, 1024 and steps of 64.")
    if dataset.batch_size < 1:
        message = f"{where}: a batch of {dataset.batch_size} images: sd-scripts has nothing to train"
        data.add("error", "batch-size", message)
    way = dataset.resize_interpolation
    if way is not None and way not in INTERPOLATIONS:
        fix = f"It must be one of {', '.join(INTERPOLATIONS)}."
        data.add("error", "interpolation", f"{where}: sd-scripts does not know resize_interpolation = {way!r}", fix)
    crops = [subset for subset in dataset.subsets if subset.random_crop]
    if crops and dataset.kind == MASKS:
        data.add("error", "changed-images", f"{crops[0].label}: random_crop cannot go with masks: sd-scripts stops")


def cached(args: HostArgs, data: Data) -> None:
    """Images that are changed anew at every step have no latents to cache; the host asks subsets that have images."""
    if not (args.cache_latents or args.cache_latents_to_disk):
        return
    masked = {id(subset) for dataset in data.datasets if dataset.kind == MASKS for subset in dataset.subsets}
    subsets = {id(entry.subset): entry.subset for entry in data.entries if id(entry.subset) not in masked}
    changed = [subset for subset in subsets.values() if subset.random_crop or subset.color_aug]
    if changed:
        name = "random_crop" if changed[0].random_crop else "color_aug"
        message = f"{changed[0].label}: {name} cannot go with cache_latents: sd-scripts stops"
        data.add("error", "changed-images", message, "Leave one of them out.")


def steps(data: Data, model: Family) -> list[Finding]:
    """Steps of the buckets that the script of this model does not take; beside masks only early releases look."""
    multiple = model.script.bucket_steps if model.name else 1
    found = []
    for dataset in data.datasets:
        if dataset.enable_bucket and dataset.bucket_reso_steps % multiple:
            masked = dataset.kind == MASKS
            level = "note" if masked else "warning" if model.guess else "error"
            found.append(
                Finding(
                    level,
                    "newer" if masked else "bucket-steps",
                    f"{dataset.label}: bucket_reso_steps {dataset.bucket_reso_steps} is no multiple of {multiple}: "
                    f"sd-scripts {'up to v0.9.1 ' if masked else ''}stops",
                    f"Set bucket_reso_steps = {multiple}.",
                )
            )
    return found
