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


def problems(said: Coverage, targets: Sequence[Target], limit: int, longer: str = "") -> list[str]:
    """Why nothing would be learned of these captions, or nothing preserved.

    Args:
        said: what they say.
        targets: the run's.
        limit: tokens of text that the text encoder takes.
        longer: what would make it more, as the end of a sentence.
    """
    found: list[str] = []
    if said.captions and said.nothing:  # no captions: a data set of the user's own class, which gives them later
        common = said.said or "nothing (captions are empty: check --caption_extension)"
        wanted = "|".join(map(str, targets))
        found.append(
            f"the target {wanted!r} occurs in none of the {said.captions} captions. They most often say {common}."
        )
    if said.cut and len(said.cut) == said.with_target:
        found.append(
            f"the target lies behind token {limit} in all {len(said.cut)} captions that say it, and is cut off. Move "
            f"it to the front of the captions{longer}."
        )
    if said.bare and len(said.bare) == said.with_target:
        found.append(
            f"all {len(said.bare)} captions that say the target say nothing else, so nothing says what to preserve. "
            "Describe what else the images show: background, clothes, pose."
        )
    return found


def warnings(said: Coverage, limit: int) -> list[str]:
    """What is learned of fewer images than it may seem, where anything is learned at all."""
    found: list[str] = []
    if said.nothing:
        return found
    if said.without:
        examples = "; ".join(repr(caption[:80]) for caption in said.without[:3])
        found.append(
            f"{len(said.without)} of {said.captions} captions do not contain the target and only preserve the base "
            f"model, e.g. {examples}"
        )
    if 0 < len(said.cut) < said.with_target:
        found.append(
            f"in {len(said.cut)} of {said.with_target} captions the target lies behind token {limit} and is cut off, "
            f"e.g. {said.cut[0][:80]!r}: move it to the front"
        )
    if 0 < len(said.bare) < said.with_target:
        found.append(
            f"{len(said.bare)} of {said.with_target} captions say nothing but the target, so nothing says what to "
            f"preserve there, e.g. {said.bare[0][:80]!r}"
        )
    if said.unused:
        found.append(f"no caption contains {', '.join(repr(str(target)) for target in said.unused)}")
    return found
