"""One mistake, or one thing worth knowing, about a run that is planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("error", "warning", "note")
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A finding.

    Attributes:
        level: `error` (the run stops, or trains something else than asked for), `warning` or `note`.
        code: stable name, for scripts.
        message: what is there.
        fix: what to do about it; may be empty.
        images: the images it is about; may be empty.
    """

    level: str
    code: str
    message: str
    fix: str = ""
    images: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "images": list(self.images)}


def some(items: Iterable[object], shown: int = _SHOWN) -> str:
    """The first few of a list, and how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more


def of(count: int, total: int, noun: str = "images") -> str:
    """`"3 of 24 images"`, `"all 24 images"`, `"the only image"`."""
    if count == total:
        return f"all {total} {noun}" if total > 1 else f"the only {noun.removesuffix('s')}"
    return f"{count} of {total} {noun}"


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; each in the order in which they were found."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
