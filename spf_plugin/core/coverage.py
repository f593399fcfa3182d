"""How far a data set's captions say the targets: what both trainers ask before the first step. Pure text, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spf_plugin.core.prompt import COMMA, Prompt, Target, spans, split

_SHOWN = 5


@dataclass(frozen=True)
class Coverage:
    """What the captions say of the targets. A caption is shown by the first text that it may become.

    Attributes:
        captions: how many there are.
        without: those without any of their targets, which only preserve the base model, in their order.
        cut: those whose targets all lie behind what the text encoder takes, so that nothing shows them.
        bare: those that say nothing but the target, so that nothing says what to preserve.
        unused: the run's targets that no caption contains.
        said: the commonest comma-separated parts of `without`, quoted and joined; empty where these say nothing.
    """

    captions: int
    without: tuple[str, ...]
    cut: tuple[str, ...]
    bare: tuple[str, ...]
    unused: tuple[Target, ...]
    said: str

    @property
    def nothing(self) -> bool:
        """Whether no caption has a target, so that nothing would be learned."""
        return len(self.without) == self.captions

    @property
    def with_target(self) -> int:
        return self.captions - len(self.without)


def coverage(
    captions: Sequence[tuple[Sequence[str], Sequence[Target] | None]],
    targets: Sequence[Target],
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int = 0,
) -> Coverage:
    """Look for the targets in every caption.

    Args:
        captions: each as all texts that it may become (one, but for wildcards), with its own targets, or None where
            the run's hold.
        targets: the run's.
        tokenize: text -> token ids without begin, end and padding; None where no tokenizer is at hand.
        limit: tokens of text that the text encoder takes.
    """
    without, cut, bare = [], [], []
    for texts, own in captions:
        prompts = [split(text, targets if own is None else own) for text in texts]
        saying = [prompt for prompt in prompts if prompt.has_target]
        if not saying:
            without.append(texts[0] if texts else "")
            continue
        if tokenize is not None and all(_cut(prompt, tokenize, limit) for prompt in saying):
            cut.append(saying[0].full)
        if all(not prompt.base.strip() for prompt in saying):
            bare.append(saying[0].full)
    parts = Counter(part.strip() for caption in without for part in COMMA.split(caption) if part.strip())
    unused = tuple(
        target
        for target in targets
        if not any(split(text, [target]).has_target for texts, own in captions if own is None for text in texts)
    )
    said = ", ".join(repr(part) for part, _ in parts.most_common(_SHOWN))
    return Coverage(len(captions), tuple(without), tuple(cut), tuple(bare), unused, said)


def _cut(prompt: Prompt, tokenize: Callable[[str], Sequence[int]], limit: int) -> bool:
    if len(prompt.full.encode()) <= limit:  # no token is shorter than a byte
        return False
    return not spans(prompt, tokenize, limit, full=True).target
