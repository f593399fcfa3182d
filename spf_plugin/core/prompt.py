"""Captions: what is base, what is target, and which token positions belong to which phrase. Pure text, no torch.

Method, section 1: a caption is `base + target`. The base prompt is the caption without the target phrase (addition), or
with its replacement (replacement). Base phrases are the comma-separated parts of the base prompt; the span of a phrase
in the base prompt and in the full prompt differs when the target stands before it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise, zip_longest

from spf_plugin.core import listing, matching, serving, tidying
from spf_plugin.core.clause import Clause
from spf_plugin.core.words import AND, AUXILIARIES, DETERMINERS, UNSPACED_AND_BEHIND, is_adjective

LONG_PHRASE_WORDS = 8
_NEAR = 60  # characters beside a comma that are looked at
_SURE = 32  # tokens beyond the limit; what follows in the same word merges with fewer
COMMA = re.compile("[,\uff0c\u3001]")  # also full-width, and Chinese and Japanese lists'
_LONG_SPLIT = re.compile(r"(?=\s(?:with|wearing|in|and|on|at|by|standing|sitting|looking)\s)", re.IGNORECASE)
_WEIGHT_SYNTAX = re.compile(r"\\([()\[\]\\])|:[+-]?[.\d]+\)|[()\[\]]")
_WORD = re.compile(r"\w+")
_AND = frozenset(("and", "und", "et", "и", "а"))  # that can be nothing else: "plus size", "E cup"
_JOINING = AND | {"with", "wearing", "wears", "has", "having", "in"}


@dataclass(frozen=True)
class Target:
    """A target phrase, and what stands in its place in the base prompt (empty for an addition)."""

    phrase: str
    replacement: str = ""

    def __str__(self) -> str:
        return f"{self.phrase}->{self.replacement}" if self.replacement else self.phrase

    @property
    def pattern(self) -> re.Pattern[str]:
        """See `matching.pattern`."""
        return matching.pattern(self.phrase)


def parse_targets(value: str | Sequence[str]) -> tuple[Target, ...]:
    """`"blonde hair|dress->T-shirt"` (or a list of such) to targets.

    Raises:
        ValueError: an empty phrase, one that no caption can say, or a replacement that is none.
    """
    items = value.split("|") if isinstance(value, str) else [item for v in value for item in v.split("|")]
    targets = []
    for item in items:
        phrase, arrow, replacement = (part.strip(" \t\"'") for part in item.partition("->"))
        if not re.search(r"[^\W_]", phrase):
            raise ValueError("has an empty target phrase; write for example spf_target=blonde_hair")
        if arrow and not re.search(r"[^\W_]", replacement):
            raise ValueError(f"has nothing after '->'; write for example {phrase}->T-shirt, or leave the arrow out")
        if COMMA.search(phrase):
            parts = "|".join(part.strip() for part in COMMA.split(phrase) if part.strip())
            raise ValueError(f"has a comma in {phrase!r}, and captions are split at commas; name the parts: {parts}")
        target = Target(phrase, replacement.replace("_", " "))
        if replacement and target.pattern.fullmatch(target.replacement):
            raise ValueError(f"replaces {phrase!r} by itself, so there is nothing to learn; leave the arrow out")
        targets.append(target)
    return tuple(targets)


class Kind(Enum):
    """What a piece of the caption is to SPF."""

    BASE = "base"
    TARGET = "target"  # in the full prompt only
    DROPPED = "dropped"  # words and signs that only serve the target; in the full prompt only
    REPLACEMENT = "replacement"  # in the base prompt only
    SEPARATOR = "separator"  # in both prompts, belongs to no phrase


@dataclass(frozen=True)
class Piece:
    """A run of the caption's text; `phrase` is the index of the base phrase it belongs to, or -1."""

    text: str
    kind: Kind
    phrase: int = -1

    @property
    def in_full(self) -> bool:
        return self.kind is not Kind.REPLACEMENT

    @property
    def in_base(self) -> bool:
        return self.kind not in (Kind.TARGET, Kind.DROPPED)

    @property
    def is_placed(self) -> bool:
        """Whether its tokens are asked for."""
        return self.kind is Kind.TARGET or self.phrase >= 0


@dataclass(frozen=True)
class Prompt:
    """A caption, split."""

    pieces: tuple[Piece, ...]

    @property
    def full(self) -> str:
        return "".join(p.text for p in self.pieces if p.in_full)

    @property
    def base(self) -> str:
        return "".join(p.text for p in self.pieces if p.in_base)

    def behind(self, words: str) -> Prompt:
        """The same prompt behind words that belong to no phrase."""
        return Prompt((Piece(words, Kind.SEPARATOR), *self.pieces)) if words else self

    @property
    def has_target(self) -> bool:
        return any(p.kind is Kind.TARGET for p in self.pieces)

    @property
    def target(self) -> str:
        return ", ".join(p.text for p in self.pieces if p.kind is Kind.TARGET)

    @property
    def phrases(self) -> list[str]:
        """The base phrases in order, as the base prompt says them."""
        count = 1 + max((p.phrase for p in self.pieces), default=-1)
        return ["".join(p.text for p in self.pieces if p.phrase == i and p.in_base).strip() for i in range(count)]


def split(caption: str, targets: Sequence[Target]) -> Prompt:
    """Split a caption into base phrases and target.

    Every occurrence of every target counts. Words that only serve the target go with it ("a woman *with* blonde hair",
    see `serving`), so do a comma next to it, and attention-weight signs around it ("(blonde hair:1.2)").
    """
    kinds = [Kind.BASE] * len(caption)
    hits: list[_Hit] = []
    small: list[int] = []
    for comma in COMMA.finditer(caption):
        kinds[comma.start()] = Kind.SEPARATOR
    parts = _parts(caption, targets)
    for part in parts:
        if part.hits:
            _mark_part(kinds, caption, part)
            small += _small_words(kinds, caption, part)
            hits += [(first + part.start, last + part.start, target) for first, last, target in part.hits]
    rest = set(small)
    if any(kinds[i] is Kind.BASE and caption[i].isalnum() for i in range(len(caption)) if i not in rest):
        for i in small:  # only where something else is left: "she" says more than nothing
            kinds[i] = Kind.DROPPED
    for first, last, _ in hits:
        kinds[first:last] = [Kind.TARGET] * (last - first)
    _drop_commas_before_predicates(kinds, caption, parts)
    if _Part(0, len(caption), hits).is_added:
        left = next((word for word in _WORD.finditer(caption) if kinds[word.start()] is Kind.BASE), None)
        if left and left.group().lower() in _AND and Kind.DROPPED in kinds[: left.start()]:
            kinds[left.start() : left.end()] = [Kind.DROPPED] * len(left.group())  # "[Her hat is red, and] she smiles"
    if hits:
        gone = [kind in (Kind.TARGET, Kind.DROPPED) for kind in kinds]
        for i in tidying.leftovers(caption, gone, {last for _, last, target in hits if target.replacement}):
            kinds[i] = Kind.DROPPED
    return Prompt(tuple(_number_phrases(_pieces(caption, kinds, hits))))


_Hit = tuple[int, int, Target]  # first character, the one behind the last, target


@dataclass(frozen=True)
class _Part:
    """Where a part between commas lies, the targets in it, and its own commas, which are between adjectives."""

    start: int
    end: int
    hits: list[_Hit]
    commas: frozenset[int] = frozenset()

    @property
    def is_added(self) -> bool:
        """Whether there are targets, and none of them is replaced."""
        return bool(self.hits) and not any(target.replacement for _, _, target in self.hits)


def _parts(caption: str, targets: Sequence[Target]) -> list[_Part]:
    """The parts between the commas, from right to left joined where a target is described on both sides of one."""
    borders = [-1, *(comma.start() for comma in COMMA.finditer(caption)), len(caption)]
    parts: list[_Part] = []
    for comma, end in reversed(list(pairwise(borders))):
        start = comma + 1
        part = _Part(start, end, _hits(caption[start:end], targets))
        behind = parts[-1] if parts else None
        if behind and behind.hits and not part.hits:
            first = behind.start + behind.hits[0][0]
            between = caption[behind.start : first]
            if len(between) <= _NEAR and listing.is_between_adjectives(caption[max(0, end - _NEAR) : end], between):
                moved = behind.start - start
                joined = [(first + moved, last + moved, target) for first, last, target in behind.hits]
                own = frozenset((end - start, *(place + moved for place in behind.commas)))
                parts[-1] = _Part(start, behind.end, joined, own)
                continue
        parts.append(part)
    return parts[::-1]


def _hits(part: str, targets: Sequence[Target]) -> list[_Hit]:
    """Where targets stand; of two that overlap, the earlier has it, or the longer."""
    found = [(match.start(), match.end(), target) for target in targets for match in target.pattern.finditer(part)]
    found.sort(key=lambda hit: (hit[0], -hit[1]))
    hits: list[_Hit] = []
    for hit in found:
        if not hits or hit[0] >= hits[-1][1]:
            hits.append(hit)
    return hits


def _drop_commas_before_predicates(kinds: list[Kind], caption: str, parts: Sequence[_Part]) -> None:
    """ "The man[, who has a beard,] is old": between who it is and what he is stands no comma."""
    for part, following in pairwise(parts[1:]):
        first = _WORD.search(caption, following.start, following.end)
        if not part.is_added or not first or first.group().lower() not in AUXILIARIES:
            continue
        if not any(kinds[i] is Kind.BASE and caption[i].isalnum() for i in range(part.start, part.end)):
            kinds[part.start - 1] = kinds[part.end] = Kind.DROPPED


def _mark_part(kinds: list[Kind], caption: str, place: _Part) -> None:
    """Mark as dropped what goes with the targets of one comma-separated part, and the targets themselves."""
    offset, part = place.start, caption[place.start : place.end]
    clause = Clause.read(part, place.commas)
    rest = caption[place.end + 1 : place.end + 1 + listing.LENGTH]

    def drop(start: int, end: int) -> None:
        kinds[offset + start : offset + end] = [Kind.DROPPED] * (end - start)

    for first, last, target in _runs(part, clause, place.hits):
        start, end = tidying.with_signs(part, first, last)
        drop(start, first)
        drop(last, end)
        if target.replacement:
            continue
        beside = (part[max(start - 1, 0) : start], part[end : end + 1], part[first], part[last - 1])
        if any(map(matching.is_unspaced, beside)):
            start, end = serving.around_unspaced(part, start, end)
        else:
            start, end = serving.around(clause, start, end, rest, opens=not offset)
        drop(start, end)


def _small_words(kinds: Sequence[Kind], caption: str, part: _Part) -> list[int]:
    """The characters of clauses that had a target, and of which nothing is left but "she" or "there"."""
    offset = part.start
    clause = Clause.read(caption[offset : part.end], part.commas)
    replaced = [first for first, _, target in part.hits if target.replacement]
    found: list[int] = []
    begin = 0
    for i in (*clause.signs, len(clause.words)):
        if begin < i:
            start, end = clause.starts[begin], clause.ends[i - 1]
            places = zip(clause.words[begin:i], clause.starts[begin:i], clause.ends[begin:i], strict=True)
            left = [word for word, first, last in places if Kind.BASE in kinds[offset + first : offset + last]]
            if len(left) < i - begin and serving.says_nothing(left) and not any(start <= r < end for r in replaced):
                found += range(offset + start, offset + end)
        begin = i + 1
    return found


def _runs(part: str, clause: Clause, hits: Sequence[_Hit]) -> list[_Hit]:
    """Added targets that only "and" or the like separates are one, from the first to the last."""
    runs: list[_Hit] = []
    for start, end, target in hits:
        if runs and not target.replacement and not runs[-1][2].replacement:
            gap = part[runs[-1][1] : start].strip()
            first, last = bisect_left(clause.starts, runs[-1][1]), bisect_left(clause.starts, start)
            between = clause.words[first:last] if last - first <= LONG_PHRASE_WORDS else [""]
            small = all(word in _JOINING | DETERMINERS or is_adjective(word) for word in between)
            if not gap or small or UNSPACED_AND_BEHIND.fullmatch(gap):
                runs[-1] = (runs[-1][0], end, target)
                continue
        runs.append((start, end, target))
    return runs


def _pieces(caption: str, kinds: Sequence[Kind], hits: Sequence[_Hit]) -> list[Piece]:
    """Runs of one kind; every comma and every target is a piece of its own."""
    borders = {0, len(caption), *(place for first, last, _ in hits for place in (first, last))}
    borders |= {place for comma in COMMA.finditer(caption) for place in comma.span()}
    borders |= {i for i in range(1, len(caption)) if kinds[i] is not kinds[i - 1]}
    replacements = {last: target.replacement for _, last, target in hits}
    places = sorted(borders)
    out = []
    for start, end in pairwise(places):
        out.append(Piece(caption[start:end], kinds[start]))
        if replacements.get(end) and kinds[start] is Kind.TARGET:
            out.append(Piece(replacements[end], Kind.REPLACEMENT))
    return out


def _number_phrases(pieces: list[Piece]) -> list[Piece]:
    """Give each base piece its phrase; a long part without commas is split at its connectives."""
    out: list[Piece] = []
    phrase = -1
    fresh = True  # the next base piece opens a new phrase
    for piece in pieces:
        if piece.kind in (Kind.SEPARATOR, Kind.DROPPED) and COMMA.fullmatch(piece.text):
            fresh = True
            out.append(piece)
        elif piece.kind is not Kind.BASE:
            out.append(piece)
        elif not piece.text.strip():
            out.append(Piece(piece.text, Kind.SEPARATOR))
        else:
            chunks = [piece.text]
            if len(piece.text.split()) > LONG_PHRASE_WORDS:
                chunks = [chunk for chunk in _LONG_SPLIT.split(piece.text) if chunk]
            for chunk in chunks:
                if not chunk.strip():  # the first of two spaces
                    out.append(Piece(chunk, Kind.SEPARATOR))
                    continue
                if fresh or len(chunks) > 1:
                    phrase += 1
                out.append(Piece(chunk, Kind.BASE, phrase))
                fresh = False
    return out


def strip_weights(text: str) -> str:
    """The words of a weighted caption without its signs: `"(blonde hair:1.2)"` -> `"blonde hair"`."""
    return _WEIGHT_SYNTAX.sub(lambda m: m.group(1) or "", text)


@dataclass(frozen=True)
class Spans:
    """Token positions of one prompt, counted from 0 in the sequence that the denoiser sees.

    Attributes:
        phrases: for every base phrase, its positions (the same number of phrases in base and full prompt).
        target: positions of the target; empty in the base prompt.
        end: the first position after the last word, where EOS and padding begin.
        gap: positions of EOS and padding before it, where the sequence is made of several texts.
    """

    phrases: tuple[tuple[int, ...], ...]
    target: tuple[int, ...]
    end: int
    gap: Sequence[int] = ()


def spans(
    prompt: Prompt,
    tokenize: Callable[[str], Sequence[int]],
    limit: int,
    position: Callable[[int], int] = lambda token: token,
    *,
    full: bool,
) -> Spans:
    """Where each phrase lies among the tokens.

    A piece ends where the tokenized text up to its end has that many tokens. CLIP's tokenizer cuts at spaces, and
    between letters and punctuation, before it merges: exact there, and within a token for scripts without spaces. What
    ends at a space is counted once, and nothing behind the limit, so the time is that of tokenizing the text once.

    Args:
        prompt: a split caption.
        tokenize: text -> its token ids, without begin, end and padding.
        limit: tokens of text that fit; the rest is cut off.
        position: where the n-th token of the text lies in the sequence that the denoiser sees.
        full: positions in the full prompt, else in the base prompt.
    """
    count = 1 + max((p.phrase for p in prompt.pieces), default=-1)
    phrases: list[list[int]] = [[] for _ in range(count)]
    target: list[int] = []
    words, tokens = "", 0  # the text that is not counted yet, and the tokens before it
    begin = now = 0  # tokens before the piece, and up to its end
    pieces = [piece for piece in prompt.pieces if (piece.in_full if full else piece.in_base)]
    for piece, following in zip_longest(pieces, pieces[1:]):
        if following and not piece.is_placed and not following.is_placed:
            words += piece.text  # nobody asks where the one ends and the other begins
            continue
        if tokens < limit and begin < limit + _SURE:
            words += piece.text
            cut = words.rfind(" ")
            if cut > 0:
                tokens += len(tokenize(words[:cut]))
                words = words[cut:]
            now = tokens + len(tokenize(words)) if words.strip() else tokens
        positions = [position(token) for token in range(min(begin, limit), min(now, limit))]
        if piece.kind is Kind.TARGET:
            target.extend(positions)
        elif piece.phrase >= 0:
            phrases[piece.phrase].extend(positions)
        begin = max(begin, now)
    return Spans(tuple(tuple(p) for p in phrases), tuple(target), position(min(begin, limit)))
