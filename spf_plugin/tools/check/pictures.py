"""The image files themselves: can they be read, is one of them there twice, and do they share a background?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from spf_plugin.tools.check import borders
from spf_plugin.tools.check.asking import Progress
from spf_plugin.tools.check.captions import Described
from spf_plugin.tools.check.dataset import Entry
from spf_plugin.tools.check.findings import Finding, of, some

_PIECE = 2**20


def _border(path: Path) -> tuple[borders.Colour | None, str]:
    """`borders.border` of an image, and why it cannot be read (empty where it can)."""
    from PIL import Image

    try:
        if not path.stat().st_size:
            return None, "the file is empty"
        with Image.open(path) as image:
            return borders.border(image), ""
    except Exception as error:  # Pillow lets many kinds through, depending on the format
        reason = (str(error) or type(error).__name__).replace(repr(str(path)), "").strip()
        return None, reason or "not an image"


def _digest(path: Path) -> str:
    """Of a file's content, which is never in memory whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def look_at(
    entries: Sequence[Entry],
    rows: Sequence[Described],
    progress: Progress = lambda what, done, total: None,
) -> list[Finding]:
    """Unreadable images, duplicates and one background in most of them; decodes every image once.

    Args:
        entries: the images.
        rows: the training prompts, without regularisation images.
        progress: called with images done and in all.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return [Finding("note", "images-not-read", "Pillow is not installed, so the images were not opened")]
    broken: dict[str, str] = {}
    digests: dict[str, list[Entry]] = {}
    seen: dict[str, borders.Colour | None] = {}
    files = {os.path.abspath(entry.path): entry for entry in entries}  # one folder may be trained at two resolutions
    for done, entry in enumerate(files.values()):
        progress("reading images", done, len(files))
        colour, reason = _border(entry.path)
        if reason:
            broken[entry.name] = reason
        else:
            seen[entry.name] = colour
            digests.setdefault(_digest(entry.path), []).append(entry)
    progress("reading images", len(files), len(files))
    found = []
    if broken:
        shown = some([f"{name} ({reason})" for name, reason in broken.items()])
        found.append(
            Finding(
                "error",
                "unreadable",
                f"{of(len(broken), len(files))} cannot be read: {shown}",
                "Replace or remove them.",
                tuple(broken),
            )
        )
    same = [group for group in digests.values() if len(group) > 1]
    other = [group for group in same if len({entry.caption for entry in group}) > 1]
    if same:
        names = [" = ".join(entry.name for entry in group) for group in same]
        found.append(
            Finding(
                "warning",
                "duplicate-images",
                f"the same image is there more than once: {some(names)}"
                + ("; with different captions" if other else ""),
                "Keep one; a larger number of repeats shows all images more often.",
                tuple(entry.name for group in same for entry in group),
            )
        )
    return found + borders.look(rows, seen)
