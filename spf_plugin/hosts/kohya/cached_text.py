"""Where the text that is trained with is not the caption that is believed, because the host has kept an older one.

With `--cache_text_encoder_outputs` (SDXL and the transformers) it encodes every caption once, as it stands in its file,
and with `..._to_disk` keeps that for all later runs. With `cache_info` it keeps the captions. It never compares either
with the files again.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.hosts.kohya.captions import of_file
from spf_plugin.hosts.kohya.images import TEXT_CACHE, Image

TEXT_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")  # the second turns the first on
INFO_CACHE = "metadata_cache.json"  # in an image_dir
SUSPECTS, OTHERS = 32, 8  # captions that are encoded once more: a second each for SDXL's encoders on a slow CPU
# Of the distance between a caption's states and those of no caption, at the worst token: another word moves its token
# by about all of it, bfloat16 by a few hundredths.
ANOTHER_CAPTION = 0.3

# What the host keeps of a caption, in its own order: hidden states `[T, C]`, pooled ones `[E]`, ids and masks `[T]` of
# whole numbers or bools. SDXL's hidden states are those of both encoders side by side.
Encoded = Sequence[NDArray[Any]]
Read = Callable[[str], Encoded]  # of a file; any error of `_DAMAGED` where it is none of the host's
_DAMAGED = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile)
Stale = Callable[[Sequence[Image]], "str | None"]


def in_use(args: Any, *, sdxl: bool) -> bool:
    """Whether the host trains with cached text; without SDXL the options come from a file only, and do nothing."""
    return sdxl and asked_for(args)


def asked_for(args: Any) -> bool:
    """Whether one of the options is set."""
    return any(getattr(args, name, False) for name in TEXT_CACHES)


def problems(
    args: Any, images: Sequence[Image], *, sdxl: bool, ending: str | None = None, stale: Stale | None = None
) -> list[str]:
    """Where the text that the host has cached is not the text that it reports as the caption.

    Args:
        args: the host's arguments.
        images: the whole data set.
        sdxl: the script is sdxl_train_network.py.
        ending: of the cached files' names, where the model is no UNet and caches text, too.
        stale: looks at the cached files (`by_time`, `by_encoding`); None is `by_time`.
    """
    if not in_use(args, sdxl=sdxl or ending is not None):
        return []
    found = []
    if any(image.framed for image in images):
        found.append(
            "caption_prefix and caption_suffix do nothing together with --cache_text_encoder_outputs: sd-scripts "
            "then encodes the captions without them. Write them into the caption files."
        )
    literal = [image for image in images if not image.framed and _is_literal(image)]
    if literal:
        found.append(
            "enable_wildcard, secondary_separator and further lines do nothing together with "
            f"--cache_text_encoder_outputs: sd-scripts then encodes {len(literal)} captions as they stand, signs and "
            f"all, e.g. {literal[0].captions[0][:80]!r}. Write each as one line without them."
        )
    if getattr(args, "cache_text_encoder_outputs_to_disk", False):
        reason = by_time(images, ending or TEXT_CACHE) if stale is None else stale(images)
        found += [reason] if reason else []
    return found


def _is_literal(image: Image) -> bool:
    """Whether the host would make something else of the caption, if it did not cache it as it stands."""
    return len(image.captions) == 1 and image.prompts != image.captions


def kept_captions(images: Sequence[Image]) -> list[str]:
    """With `cache_info` the host keeps the captions themselves, and does not read their files again."""
    old = []
    for image in images:
        if image.kept and image.path and image.caption_extension and os.path.isfile(image.source):
            try:
                with open(image.source, encoding="utf-8") as file:
                    text = of_file(file.read(), wildcards=image.wildcards)
            except (OSError, UnicodeDecodeError):
                continue
            old += [image] if image.captions != (text,) else []
    if not old:
        return []
    found = []
    found.append(
        f"{len(old)} captions are not those of their files, e.g. {os.path.basename(old[0].source)}: sd-scripts takes "
        f"what cache_info kept in {INFO_CACHE}, and would train with that. Delete {INFO_CACHE} beside the images."
    )
    return found


def by_time(images: Sequence[Image], ending: str = TEXT_CACHE) -> str | None:
    """What is known without a text encoder: captions that are newer than what is cached of them."""
    suspects = _changed(_cached(images, ending), ending)
    if not suspects:
        return None
    return (
        f"{len(suspects)} captions were changed after their encoding was cached, and sd-scripts would train with "
        f"the old ones, e.g. {os.path.basename(suspects[0].cache(ending))}. Delete the *{ending} files."
    )


def read_sdxl(path: str) -> Encoded:
    """What SDXL's trainer keeps: hidden states, and the pooled ones."""
    with np.load(path) as file:
        return (np.concatenate([file["hidden_state1"], file["hidden_state2"]], axis=-1), file["pool2"])


def by_encoding(
    images: Sequence[Image], encode: Callable[[str], Encoded], read: Read = read_sdxl, ending: str = TEXT_CACHE
) -> str | None:
    """What is true: captions, encoded once more, beside what the host will load for them.

    Those that are newer than their encoding, and some of every folder: the cached text may be older than the whole
    caption file, such as the folder's name that stood in for it while --caption_extension was forgotten.

    Args:
        images: the whole data set.
        encode: a caption to what the host would cache of it.
        read: what the host has cached in a file, in the same order.
        ending: of the files' names.
    """
    cached = _cached(images, ending)
    suspects = _changed(cached, ending)[:SUSPECTS]
    first = {os.path.dirname(image.path): image for image in reversed(cached)}
    spread = cached[:: max(1, len(cached) // OTHERS)]
    looked_at = {image.cache(ending): image for image in (*suspects, *first.values(), *spread)}
    if not looked_at:
        return None
    nothing = encode("")
    wrong = [image for path, image in looked_at.items() if not _holds(image, path, nothing, encode, read)]
    if not wrong:
        return None
    return (
        f"{len(wrong)} of {len(looked_at)} cached encodings that were looked at are not those of their captions, e.g. "
        f"{os.path.basename(wrong[0].cache(ending))} is not that of {wrong[0].captions[0][:80]!r}: sd-scripts made "
        "them of other captions, by another model or with another token length, and would train with them. Delete the "
        f"*{ending} files."
    )


def _cached(images: Sequence[Image], ending: str = TEXT_CACHE) -> list[Image]:
    """Those whose one caption has an encoding on the disk."""
    return [
        image for image in images if len(image.captions) == 1 and image.path and os.path.isfile(image.cache(ending))
    ]


def _changed(images: Sequence[Image], ending: str = TEXT_CACHE) -> list[Image]:
    return [
        image
        for image in images
        if os.path.isfile(image.source) and os.path.getmtime(image.source) > os.path.getmtime(image.cache(ending))
    ]


def _holds(image: Image, path: str, nothing: Encoded, encode: Callable[[str], Encoded], read: Read) -> bool:
    """Whether the encoding on the disk is that of the image's caption, but for rounding."""
    try:
        kept = [np.asarray(part) for part in read(path)]
    except _DAMAGED:
        return False
    kept, fresh = _without_padding(kept, encode(image.captions[0]))
    if [part.shape for part in kept] != [part.shape for part in fresh]:
        return False
    for i, (ours, theirs, empty) in enumerate(zip(fresh, kept, nothing, strict=True)):
        if ours.dtype.kind != "f":
            if not np.array_equal(ours, theirs):
                return False
        elif ours.ndim and not _is_near(ours, theirs, empty, _mask(fresh[i + 1 :], len(ours))):
            return False  # a single number is none of the text: the host's dropout rate
    return True


def _without_padding(kept: Encoded, fresh: Encoded) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Both as long as the shorter, where what is cut off is masked padding: some hosts pad to a batch's longest."""
    theirs, ours = list(kept), list(fresh)
    for i, (a, b) in enumerate(zip(kept, fresh, strict=False)):
        if not (a.ndim and b.ndim):
            continue
        length, shapes = min(len(a), len(b)), (a.shape[:1], b.shape[:1])
        masks = [
            (x, y)
            for x, y in zip(kept, fresh, strict=False)
            if (x.shape, y.shape) == shapes and x.dtype.kind in "iub" and y.dtype.kind in "iub"
        ]
        if masks and not any(x[length:].any() or y[length:].any() for x, y in masks):
            theirs[i], ours[i] = a[:length], b[:length]
    return theirs, ours


def _mask(others: Encoded, length: int) -> NDArray[np.bool_]:
    """Which of the tokens are no padding: the first mask of this length that the host keeps behind the states."""
    for part in others:
        if part.shape == (length,) and part.dtype.kind in "iub" and part.any() and part.max() <= 1:
            return part.astype(bool)
    return np.ones(length, dtype=bool)


def _is_near(ours: NDArray[Any], theirs: NDArray[Any], empty: NDArray[Any], mask: NDArray[np.bool_]) -> bool:
    """Whether the states of two captions are those of one. Empty captions are held against their own length."""
    a, b, nothing = (np.atleast_2d(part.astype(np.float32)) for part in (ours, theirs, empty))
    if len(mask) == len(a):
        a, b = a[mask], b[mask]
        nothing = nothing[mask] if len(nothing) == len(mask) else nothing
    if np.array_equal(a, b):
        return True
    comparable = nothing.shape == a.shape and not np.array_equal(a, nothing)
    scale = np.linalg.norm(a - nothing if comparable else a, axis=-1).mean()
    # Written so that a NaN on the disk is no match.
    return bool(np.linalg.norm(a - b, axis=-1).max() < ANOTHER_CAPTION * scale)
