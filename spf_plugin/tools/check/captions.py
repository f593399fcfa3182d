"""What the captions say: the split of each, and what is wrong with them one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from spf_plugin.core.prompt import Kind, Prompt, Spans, Target, split
from spf_plugin.core.serving import describing
from spf_plugin.hosts.kohya.captions import taken
from spf_plugin.tools.check.dataset import Entry
from spf_plugin.tools.check.findings import Finding, of, some
from spf_plugin.tools.check.reading import is_broken
from spf_plugin.tools.check.spelling import near_misses
from spf_plugin.tools.check.tokens import Tokenizer

_WEIGHTS = re.compile(r"\([^()]*:[\d.]+\)|\[[^\[\]]+\]")
_JOINING = "with|wearing|wears|has|having|in|and|plus"
_SMALL = f"{_JOINING}|on|at|by|a|an|the|her|his|their|its"
_CONNECTIVE = re.compile(rf"\b(?:{_JOINING})\b", re.IGNORECASE)
LEADING = re.compile(rf"^(?:(?:{_SMALL})\s+)+", re.IGNORECASE)


@dataclass(frozen=True)
class Described:
    """One prompt of one image, split and located.

    Attributes:
        entry: the image.
        prompt: the split caption.
        full: spans in the full prompt.
        base: spans in the base prompt.
        tokens: length of the full prompt, before anything is cut off.
        limit: how many tokens the text encoder takes.
        targets: the targets that hold for this image.
    """

    entry: Entry
    prompt: Prompt
    full: Spans
    base: Spans
    tokens: int
    limit: int
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def cut(self) -> bool:
        return self.tokens > self.limit


def describe(
    entries: Sequence[Entry], targets: Mapping[int, tuple[Target, ...]], tokenizer: Tokenizer, limit: int
) -> list[Described]:
    """Every prompt of every image.

    Args:
        entries: the images.
        targets: per `id(entry.subset)` the targets that hold there.
        tokenizer: see `tokens`.
        limit: tokens of text that the text encoder takes.
    """
    out = []
    for entry in entries:
        chosen = targets[id(entry.subset)]
        for text in entry.prompts:
            prompt = split(text, chosen)
            out.append(
                Described(
                    entry,
                    prompt,
                    tokenizer.spans(prompt, limit, full=True),
                    tokenizer.spans(prompt, limit, full=False),
                    len(tokenizer.tokenize(prompt.full)),
                    limit,
                    chosen,
                )
            )
    return out


def names(rows: Sequence[Described]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.name for row in rows))


def quoted(texts: Sequence[str]) -> str:
    return some([repr(t) for t in dict.fromkeys(texts)])


def count_of(rows: Sequence[Described]) -> int:
    return len(names(rows))


def look(rows: Sequence[Described], *, weighted: bool | None) -> list[Finding]:
    """Everything about the training captions (no regularisation images in `rows`).

    Args:
        rows: the training prompts.
        weighted: the host reads attention weights, `(hair:1.2)`; None where it cannot.
    """
    if not rows:
        return []
    return [
        *_targets_themselves(rows),
        *_missing(rows),
        *_near(rows),
        *_spelled(rows),
        *_swallowed(rows),
        *_broken(rows),
        *_signs(rows, weighted),
    ]


def _targets_themselves(rows: Sequence[Described]) -> list[Finding]:
    found = []
    targets = list(dict.fromkeys(target for row in rows for target in row.targets))
    for target in targets:
        if _CONNECTIVE.search(target.phrase):
            found.append(
                Finding(
                    "warning",
                    "wide-target",
                    f"the target {target.phrase!r} names more than one thing: all of it is taken out of the base "
                    "prompt, so nothing of it is preserved",
                    "Name only what the LoRA shall learn.",
                )
            )
        inside = [o for o in targets if o is not target and target.pattern.search(o.phrase)]
        if inside:
            found.append(
                Finding(
                    "warning",
                    "nested-targets",
                    f"the target {target.phrase!r} is part of the target {inside[0].phrase!r}, and takes every other "
                    f"{target.phrase!r} out of the base prompts too",
                )
            )
        if not any(split(row.prompt.full, [target]).has_target for row in rows if target in row.targets):
            found.append(Finding("warning", "unused-target", f"no caption says {target.phrase!r}"))
    return found


def _missing(rows: Sequence[Described]) -> list[Finding]:
    by_image: dict[str, list[Described]] = {}
    for row in rows:
        by_image.setdefault(row.name, []).append(row)
    without = [name for name, mine in by_image.items() if not any(r.prompt.has_target for r in mine)]
    if without and len(without) < len(by_image):
        return [
            Finding(
                "warning",
                "target-missing",
                f"{of(len(without), len(by_image))} have a caption without the target; they only preserve the base "
                "model",
                "Nothing, where an image does not show it; else add the target to the caption.",
                tuple(without),
            )
        ]
    sometimes = [n for n, mine in by_image.items() if 0 < sum(r.prompt.has_target for r in mine) < len(mine)]
    if sometimes:
        return [
            Finding(
                "note",
                "target-in-some-wildcards",
                f"in {of(len(sometimes), len(by_image))} only some choices of the wildcards say the target",
                "",
                tuple(sometimes),
            )
        ]
    return []


_KINDS = {
    "plural": "in another number",
    "hyphen": "with other hyphens or spaces",
    "order": "in another order",
    "typo": "spelled otherwise",
}


def _near(rows: Sequence[Described]) -> list[Finding]:
    """What resembles a target in the base prompts: the target is not found there, and the reference draws it."""
    hits: dict[tuple[str, str], list[tuple[Described, str]]] = {}
    for row in rows:
        for target in row.targets:
            for miss in near_misses(row.prompt.base, target):
                hits.setdefault((target.phrase, miss.kind), []).append((row, miss.text))
    found = []
    for (phrase, kind), mine in hits.items():
        affected = names([row for row, _ in mine])
        word = "image says" if len(affected) == 1 else "images say"
        found.append(
            Finding(
                "warning",
                f"near-miss-{kind}",
                f"{len(affected)} {word} {quoted([text for _, text in mine])}: {phrase!r} {_KINDS[kind]}, which is not "
                "found as the target and stays in the base prompt",
                f"Write it in the caption as the target is written, or add it: spf_target={phrase}|{mine[0][1]}",
                affected,
            )
        )
    return found


def _first_target(row: Described) -> str:
    return next(t.phrase for t in row.targets if not t.replacement and t.pattern.search(row.prompt.full))


def _broken(rows: Sequence[Described]) -> list[Finding]:
    """A base prompt that lacks a word: the reference is drawn for it, and the LoRA learns what it does not say."""
    mine = [row for row in rows if is_broken(row.prompt)]
    if not mine:
        return []
    return [
        Finding(
            "warning",
            "broken-base",
            f"{of(len(names(mine)), count_of(rows))} read as if something were missing without the target: "
            f"{quoted([row.prompt.base for row in mine])}",
            f"Say what stands in its place: spf_target={_first_target(mine[0])}->WORDS. Or let the target name the "
            "words around it too",
            names(mine),
        )
    ]


def _spelled(rows: Sequence[Described]) -> list[Finding]:
    """Found, but written otherwise: an underscore is a token of its own, other case is not."""
    underscores, cases = [], []
    for row in rows:
        for piece in row.prompt.pieces:
            if piece.kind is Kind.TARGET and "_" in piece.text:
                underscores.append((row, piece.text))
            elif piece.kind is Kind.TARGET and piece.text not in [t.phrase.replace("_", " ") for t in row.targets]:
                cases.append((row, piece.text))
    found = []
    if underscores:
        affected = names([row for row, _ in underscores])
        found.append(
            Finding(
                "warning",
                "underscore",
                f"{of(len(affected), count_of(rows))} write the target as {quoted([t for _, t in underscores])}: it is "
                "found, but the text encoder reads the underscore as a sign of its own",
                "Write a space; prompts will say the target with one.",
                affected,
            )
        )
    if cases:
        affected = names([row for row, _ in cases])
        found.append(
            Finding(
                "note",
                "other-case",
                f"{of(len(affected), count_of(rows))} write the target as {quoted([t for _, t in cases])}: it is "
                "found, and the text encoder reads the same",
                "",
                affected,
            )
        )
    return found


def _tail(text: str) -> str:
    """The words behind the last connective or article."""
    return re.split(rf"\b(?:{_SMALL})\b", text, flags=re.IGNORECASE)[-1].strip()


def _described(row: Described) -> str:
    """The words of the caption that describe a target and are not in it."""
    for before, piece in pairwise(row.prompt.pieces):
        if piece.kind is Kind.TARGET and before.kind is Kind.DROPPED and (found := describing(before.text)):
            return f"{found} {piece.text}"
    return ""


def _swallowed(rows: Sequence[Described]) -> list[Finding]:
    """A target that takes the noun of a longer phrase leaves the rest of it behind; a target named twice."""
    torn: list[tuple[Described, str, str]] = []
    twice: list[Described] = []
    for row in rows:
        pieces = row.prompt.pieces
        if sum(piece.kind is Kind.TARGET for piece in pieces) > len(row.targets):
            twice.append(row)
        for i, piece in enumerate(pieces):
            if piece.kind is not Kind.TARGET:
                continue
            lead = pieces[i - 1] if i and pieces[i - 1].kind is Kind.DROPPED else None
            before = pieces[i - 2 if lead else i - 1] if i - bool(lead) > 0 else None
            replaced = i + 1 < len(pieces) and pieces[i + 1].kind is Kind.REPLACEMENT
            after = pieces[i + 1] if i + 1 < len(pieces) else None
            goes_on = after is not None and after.kind is Kind.BASE
            if before is None or before.kind is not Kind.BASE or replaced or goes_on or not before.text.strip():
                continue
            if lead is None or not lead.text.strip():
                torn.append((row, before.text.strip(), piece.text))
    found = []
    if torn:
        affected = names([row for row, _, _ in torn])
        _, left, target = torn[0]
        found.append(
            Finding(
                "warning",
                "torn-phrase",
                f"the target takes a part of a longer phrase in {of(len(affected), count_of(rows))}: of "
                f"{f'{left} {target}'!r} the base prompt keeps {left!r}",
                f"If all of it shall be learned, say so: spf_target={_tail(left)} {target}. Else write a "
                f"replacement: {target}->something else.",
                affected,
            )
        )
    described = [(row, words) for row in rows if (words := _described(row))]
    if described:
        affected = names([row for row, _ in described])
        found.append(
            Finding(
                "note",
                "described-target",
                f"what describes the target goes with it in {of(len(affected), count_of(rows))}: "
                f"{quoted([words for _, words in described])}",
                "If that shall be learned too, let the target say it.",
                affected,
            )
        )
    if twice:
        found.append(
            Finding(
                "note",
                "target-twice",
                f"{of(count_of(twice), count_of(rows))} name the target more than once; every time counts as target",
                "",
                names(twice),
            )
        )
    return found


def _signs(rows: Sequence[Described], weighted: bool | None) -> list[Finding]:
    found = []
    signed = [row for row in rows if _WEIGHTS.search(row.prompt.full)]
    if signed and not weighted:
        found.append(
            Finding(
                "warning",
                "weights-not-read",
                f"{of(count_of(signed), count_of(rows))} hold attention weights, and the text encoder reads their "
                f"signs as text: {signed[0].prompt.full!r}",
                "Remove the signs." if weighted is None else "Set weighted_captions = true, or remove the signs.",
                names(signed),
            )
        )
    one_phrase = [row for row in rows if "," not in row.prompt.full and ";" in row.prompt.full]
    if one_phrase:
        found.append(
            Finding(
                "warning",
                "no-commas",
                f"{of(count_of(one_phrase), count_of(rows))} are not separated by commas, so SPF sees one long phrase: "
                f"{one_phrase[0].prompt.full[:60]!r}",
                "Separate the parts of a caption by commas.",
                names(one_phrase),
            )
        )
    dropped = [row for row in rows if _may_lose_target(row)]
    if dropped:
        rate = max(row.entry.subset.caption_tag_dropout_rate for row in dropped)
        steps = f"{rate:.0%} of the steps" if rate else "the first steps"
        found.append(
            Finding(
                "warning",
                "target-dropped",
                f"{'caption_tag_dropout_rate' if rate else 'token_warmup_step'} leaves the target out of {steps} while "
                "the image shows it",
                "Put the target first and set keep_tokens = 1.",
                names(dropped),
            )
        )
    return found


def _may_lose_target(row: Described) -> bool:
    return row.prompt.has_target and any(
        text == row.prompt.full and not split(left, row.targets).has_target
        for text, left in taken(row.entry.caption, row.entry.subset)
    )
