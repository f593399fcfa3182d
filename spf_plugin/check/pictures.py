"""The image files themselves: can they be read, and is one of them there twice?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from spf_plugin.check.dataset import Entry
from spf_plugin.check.findings import Finding, of, some


def _reason(path: Path) -> str | None:
    """Why an image cannot be read, or None."""
    from PIL import Image

    try:
        if not path.stat().st_size:
            return "the file is empty"
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow lets many kinds through, depending on the format
        return (str(error) or type(error).__name__).replace(repr(str(path)), "").strip() or "not an image"
    return None


def look_at(entries: Sequence[Entry], progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """Unreadable images and duplicates; decodes every image once.

    Args:
        entries: the images.
        progress: called with images done, images in all.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return [Finding("note", "images-not-read", "Pillow is not installed, so the images were not opened")]
    broken: dict[str, str] = {}
    digests: dict[str, list[Entry]] = {}
    for done, entry in enumerate(entries):
        progress(done, len(entries))
        reason = _reason(entry.path)
        if reason:
            broken[entry.name] = reason
        else:
            digests.setdefault(hashlib.sha256(entry.path.read_bytes()).hexdigest(), []).append(entry)
    progress(len(entries), len(entries))
    found = []
    if broken:
        shown = some([f"{name} ({reason})" for name, reason in broken.items()])
        found.append(
            Finding(
                "error",
                "unreadable",
                f"{of(len(broken), len(entries))} cannot be read: {shown}",
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
    return found
