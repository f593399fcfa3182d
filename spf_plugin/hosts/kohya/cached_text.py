"""Where the text that is trained with is not the caption that is believed, because the host has kept an older one.

With SDXL's `--cache_text_encoder_outputs` it encodes every caption once, as it stands in its file, and with
`..._to_disk` keeps that for all later runs. With `cache_info` it keeps the captions. It never compares either with the
files again.
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

Encoded = Sequence[NDArray[Any]]  # hidden states `[T, C]` of both encoders side by side, and the pooled ones `[E]`
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


def by_encoding(images: Sequence[Image], encode: Callable[[str], Encoded]) -> str | None:
    """What is true: captions, encoded once more, beside what the host will load for them.

    Those that are newer than their encoding, and some of every folder: the cached text may be older than the whole
    caption file, such as the folder's name that stood in for it while --caption_extension was forgotten.

    Args:
        images: the whole data set.
        encode: a caption to what the host would cache of it.
    """
    cached = _cached(images)
    suspects = _changed(cached)[:SUSPECTS]
    first = {os.path.dirname(image.path): image for image in reversed(cached)}
    spread = cached[:: max(1, len(cached) // OTHERS)]
    looked_at = {image.cache(): image for image in (*suspects, *first.values(), *spread)}
    if not looked_at:
        return None
    nothing = encode("")
    wrong = [image for image in looked_at.values() if not _holds(image, nothing, encode)]
    if not wrong:
        return None
    return (
        f"{len(wrong)} of {len(looked_at)} cached encodings that were looked at are not those of their captions, e.g. "
        f"{os.path.basename(wrong[0].cache())} is not that of {wrong[0].captions[0][:80]!r}: sd-scripts made them of "
        "other captions, by another model or with another --max_token_length, and would train with them. Delete the "
        f"*{TEXT_CACHE} files."
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


def _holds(image: Image, nothing: Encoded, encode: Callable[[str], Encoded]) -> bool:
    """Whether the encoding on the disk is that of the image's caption, but for rounding."""
    try:
        with np.load(image.cache()) as file:
            hidden = np.concatenate([file["hidden_state1"], file["hidden_state2"]], axis=-1).astype(np.float32)
            kept = (hidden, file["pool2"].astype(np.float32)[None])
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return False
    states, pooled = encode(image.captions[0])
    fresh = (states, pooled[None])
    if [part.shape for part in kept] != [part.shape for part in fresh]:
        return False
    for ours, theirs, empty in zip(fresh, kept, (nothing[0], nothing[1][None]), strict=True):
        between = np.linalg.norm(ours - empty, axis=-1).mean()
        scale = between if image.captions[0].strip() else np.linalg.norm(ours, axis=-1).mean()
        # Written so that a NaN on the disk is no match.
        if not np.linalg.norm(ours - theirs, axis=-1).max() < ANOTHER_CAPTION * scale:
            return False
    return True
