"""How far a data set's captions say the targets: what both trainers ask before the first step. Pure text, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spf_plugin.core.prompt import COMMA, Target, split

_SHOWN = 5


@dataclass(frozen=True)
class Coverage:
    """What the captions say of the targets.

    Attributes:
        captions: how many there are.
        without: those without any of their targets, which only preserve the base model, in their order.
        unused: the run's targets that no caption contains.
        said: the commonest comma-separated parts of `without`, quoted and joined; empty where these say nothing.
    """

    captions: int
    without: tuple[str, ...]
    unused: tuple[Target, ...]
    said: str

    @property
    def nothing(self) -> bool:
        """Whether no caption has a target, so that nothing would be learned."""
        return len(self.without) == self.captions


def coverage(captions: Sequence[tuple[str, Sequence[Target] | None]], targets: Sequence[Target]) -> Coverage:
    """Look for the targets in every caption.

    Args:
        captions: each with its own targets, or None where the run's hold.
        targets: the run's.
    """
    without = tuple(
        caption for caption, own in captions if not split(caption, targets if own is None else own).has_target
    )
    parts = Counter(part.strip() for caption in without for part in COMMA.split(caption) if part.strip())
    unused = tuple(
        target
        for target in targets
        if not any(split(caption, [target]).has_target for caption, own in captions if own is None)
    )
    said = ", ".join(repr(part) for part, _ in parts.most_common(_SHOWN))
    return Coverage(len(captions), without, unused, said)
