"""Captions: what is base, what is target, and which token positions belong to which phrase. Pure text, no torch.

Method, section 1: a caption is `base + target`. The base prompt is the caption without the target phrase (addition), or
with its replacement (replacement). Base phrases are the comma-separated parts of the base prompt; the span of a phrase
in the base prompt and in the full prompt differs when the target stands before it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

LONG_PHRASE_WORDS = 8
_CONNECTIVES = "with|wearing|wears|has|having|in|and|plus"
_ARTICLES = "a|an|the|her|his|their|its"
# What a target can be the object of: it goes with the target. (English; other languages lose their target alone.)
_PREPOSITIONS = (
    "on|at|by|of|to|for|from|under|over|above|below|near|beside|behind|before|between|among|against|around|across|along|"
    "through|inside|outside|into|onto|next to|in front of|on top of|without"
)
_TAKES_OBJECT = (
    "holding|holds|carrying|carries|sporting|sports|riding|rides|using|uses|showing|shows|featuring|features"
)
# Words that cannot be the noun of which the target says something: what follows stays.
_FOLLOWS = (
    f"{_CONNECTIVES}|{_PREPOSITIONS}|{_TAKES_OBJECT}|while|during|as|when|where|who|that|which|is|are|was|were|but|or|off|"
    "standing|sitting|looking|walking|running|smiling|posing|lying|leaning|playing|reading|drinking|eating|dancing|"
    "laughing|staring|facing|kneeling|jumping|sleeping|talking|waving|working"
)
_LEAD = re.compile(
    rf"(?:(?:\s+|^)(?:(?:who|that|which)\s+)?(?:{_CONNECTIVES}|{_PREPOSITIONS}|{_TAKES_OBJECT}))?"
    rf"(?:(?:\s+|^)(?:{_ARTICLES}))?\s*$",
    re.IGNORECASE,
)
_LEAD_LENGTH = 60  # characters before a target that are looked at: searching all of a long caption is quadratic
_ARTICLE_ONLY = re.compile(rf"(?<=\s)(?:{_ARTICLES})\s+$", re.IGNORECASE)
_AND_FOLLOWS = re.compile(r"\s+(?:and|plus)\s+", re.IGNORECASE)
_CONNECTIVE_FOLLOWS = re.compile(rf"\s*(?:$|[.;:)\]]|(?:{_FOLLOWS})\b)", re.IGNORECASE)
_COMMAS = re.compile("([,\uff0c\u3001])")  # also the Chinese and the Japanese one
# Words behind which something must come. (Not "behind" or "her": "from behind", "the sea behind her".)
_NEVER_LAST = (
    "with|wearing|wears|having|and|plus|of|to|for|from|at|against|among|between|into|onto|without|near|next to|"
    f"{_TAKES_OBJECT}"
)
_BROKEN = re.compile(
    rf"(?:^|(?<=[\s,\uff0c\u3001]))(?:(?:{_ARTICLES})(?=\s+(?:{_FOLLOWS})\b)|"
    rf"(?:{_NEVER_LAST}|an?|the|their|its|\S+'s)(?=\s*(?:$|[,\uff0c\u3001.;:])))",
    re.IGNORECASE,
)
_JOINS_TARGETS = re.compile(rf"\s*(?:(?:{_CONNECTIVES})\s+)?(?:(?:{_ARTICLES})\s+)?", re.IGNORECASE)
_LONG_SPLIT = re.compile(r"(?=\s(?:with|wearing|in|and|on|at|by|standing|sitting|looking)\s)", re.IGNORECASE)
_WEIGHT_OPEN = re.compile(r"(?:\\?[(\[])+$")
_WEIGHT_CLOSE = re.compile(r"^(?::[+-]?[.\d]+)?(?:\\?[)\]])+")
_WEIGHT_SYNTAX = re.compile(r"\\([()\[\]\\])|:[+-]?[.\d]+\)|[()\[\]]")


# Chinese, Japanese, Thai and their kin write no spaces; Korean hangs its particles on the word.
_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
)
_UNSPACED = re.compile(f"[{_UNSPACED_RANGES}]")
_ACCENTS = "\u0300-\u036f"  # of a decomposed letter
_LETTER = rf"[^\W{_UNSPACED_RANGES}]"  # a letter, digit or underscore of a script that separates words


def _either(letter: str) -> str:
    """A regular expression for a letter in its composed and decomposed form, or a bracket with or without backslash."""
    if letter in "()[]":
        return rf"\\?{re.escape(letter)}"
    apart = unicodedata.normalize("NFD", letter)
    return re.escape(letter) if apart == letter else f"(?:{letter}|{apart})"


@dataclass(frozen=True)
class Target:
    """A target phrase, and what stands in its place in the base prompt (empty for an addition)."""

    phrase: str
    replacement: str = ""

    def __str__(self) -> str:
        return f"{self.phrase}->{self.replacement}" if self.replacement else self.phrase

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the phrase in any case, with spaces or underscores between its words, as whole words only.

        Underscores and hyphens join words: `hair` is not in `hair_bow`, nor `shirt` in "t-shirt". Brackets match with
        or without a backslash, accented letters in one character or two.
        """
        words = [word for word in re.split(r"[\s_]+", self.phrase.replace("\\", "")) if word]
        text = r"[\s_]+".join("".join(map(_either, unicodedata.normalize("NFC", word))) for word in words)
        # Beside a letter of a script without spaces there is no word boundary to look for.
        start = "" if _UNSPACED.fullmatch(words[0][0]) else rf"(?<!{_LETTER})(?<!{_LETTER}-)"
        end = "" if _UNSPACED.fullmatch(words[-1][-1]) else rf"(?!-?{_LETTER}|[{_ACCENTS}])"
        return re.compile(start + text + end, re.IGNORECASE)


def parse_targets(value: str | Sequence[str]) -> tuple[Target, ...]:
    """`"blonde hair|dress->T-shirt"` (or a list of such) to targets.

    Raises:
        ValueError: an empty phrase or an unfinished replacement.
    """
    items = value.split("|") if isinstance(value, str) else [item for v in value for item in v.split("|")]
    targets = []
    for item in items:
        phrase, arrow, replacement = (part.strip(" \t\"'") for part in item.partition("->"))
        if not re.search(r"[^\W_]", phrase):
            raise ValueError("has an empty target phrase; write for example spf_target=blonde_hair")
        if arrow and not re.search(r"[^\W_]", replacement):
            raise ValueError(f"has nothing after '->'; write for example {phrase}->T-shirt, or leave the arrow out")
        targets.append(Target(phrase, replacement.replace("_", " ")))
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

    Every occurrence of every target counts. Words that only introduce the target go with it ("a woman *with* blonde
    hair"), also a comma next to it, and attention-weight signs around it ("(blonde hair:1.2)").
    """
    raw: list[Piece] = []
    for i, part in enumerate(_COMMAS.split(caption)):
        if i % 2:
            raw.append(Piece(part, Kind.SEPARATOR))
        else:
            raw.extend(_split_part(part, targets))
    return Prompt(tuple(_number_phrases(_drop_lone_commas(raw))))


def _split_part(part: str, targets: Sequence[Target]) -> list[Piece]:
    """One comma-separated part; its pieces are BASE, TARGET, DROPPED or REPLACEMENT."""
    pieces: list[Piece] = []
    position = 0
    for run in _runs(part, targets):
        start, end = run[0][0].start(), run[-1][0].end()
        before, after = part[position:start], part[end:]
        opening, closing = _WEIGHT_OPEN.search(before), _WEIGHT_CLOSE.search(after)
        signs_before = signs_after = ""
        if opening and closing:  # "(blonde hair:1.2)"
            signs_before, signs_after = opening.group(), closing.group()
            before, after = before[: opening.start()], after[closing.end() :]
        lead = tail = ""
        if not run[0][1].replacement:
            lead, tail = _serving_words(before, after)
            before = before[: len(before) - len(lead)]
            if not (pieces or before or tail or lead[:1].isspace()):  # nothing is left before it: no space, either
                tail = after[: len(after) - len(after.lstrip())]
        pieces += [Piece(before, Kind.BASE), Piece(lead + signs_before, Kind.DROPPED)]
        joined_from = start
        for match, target in run:
            pieces.append(Piece(part[joined_from : match.start()], Kind.DROPPED))
            pieces.append(Piece(match.group(), Kind.TARGET))
            pieces.append(Piece(target.replacement, Kind.REPLACEMENT))
            joined_from = match.end()
        pieces.append(Piece(signs_after + tail, Kind.DROPPED))
        position = end + len(signs_after) + len(tail)
    pieces.append(Piece(part[position:], Kind.BASE))
    return [p for p in pieces if p.text]


def _runs(part: str, targets: Sequence[Target]) -> list[list[tuple[re.Match[str], Target]]]:
    """Occurrences of targets; added targets that only "and" or the like separates form one run."""
    hits = [(match, target) for target in targets for match in target.pattern.finditer(part)]
    hits.sort(key=lambda hit: (hit[0].start(), -hit[0].end()))
    runs: list[list[tuple[re.Match[str], Target]]] = []
    end = 0
    for match, target in hits:
        if match.start() < end:  # overlaps the one before: the earlier, longer match has it
            continue
        joins = runs and not target.replacement and not runs[-1][-1][1].replacement
        if joins and _JOINS_TARGETS.fullmatch(part[end : match.start()]):
            runs[-1].append((match, target))
        else:
            runs.append([(match, target)])
        end = match.end()
    return runs


def _serving_words(before: str, after: str) -> tuple[str, str]:
    """The words around an added target that make no sense without it: `(leading, trailing)`."""
    following_and = _AND_FOLLOWS.match(after)
    if following_and:  # "with [blonde hair and] a hat": what introduces the list stays
        match = _ARTICLE_ONLY.search(before)
        return (match.group() if match else ""), following_and.group()
    if _CONNECTIVE_FOLLOWS.match(after):  # "a woman [with blonde hair] in a jacket"
        match = _LEAD.search(before[-_LEAD_LENGTH:])
        return (match.group() if match else ""), ""
    return before[len(before.rstrip()) :], ""  # "a [blonde hair] woman": one of the two spaces is enough


def _drop_lone_commas(pieces: list[Piece]) -> list[Piece]:
    """A comma next to a part that is gone from the base prompt goes too; so does the space that followed it."""
    parts: list[list[Piece]] = [[]]
    commas = [""]
    for piece in pieces:
        if piece.kind is Kind.SEPARATOR:
            parts.append([])
            commas.append(piece.text)
        else:
            parts[-1].append(piece)
    empty = ["".join(p.text for p in part if p.in_base).strip() == "" for part in parts]
    had_target = [any(p.kind is Kind.TARGET for p in part) for part in parts]
    out: list[Piece] = []
    kept_any = False
    for i, part in enumerate(parts):
        gone = empty[i] and had_target[i]
        if i:
            # The base prompt needs this comma only between two parts of which the later one stays.
            out.append(Piece(commas[i], Kind.SEPARATOR if kept_any and not gone else Kind.DROPPED))
        if gone:
            part = [Piece(p.text, Kind.DROPPED) if p.kind is Kind.BASE else p for p in part]
        elif i and not kept_any and part and part[0].kind is Kind.BASE:
            text = part[0].text  # the first part that stays: its leading space belonged to the dropped comma
            space = text[: len(text) - len(text.lstrip())]
            part = [Piece(space, Kind.DROPPED), Piece(text[len(space) :], Kind.BASE), *part[1:]]
        kept_any = kept_any or not gone
        out += [p for p in part if p.text]
    return out


def _number_phrases(pieces: list[Piece]) -> list[Piece]:
    """Give each base piece its phrase; a long part without commas is split at its connectives."""
    out: list[Piece] = []
    phrase = -1
    fresh = True  # the next base piece opens a new phrase
    for piece in pieces:
        if _COMMAS.fullmatch(piece.text) and piece.kind in (Kind.SEPARATOR, Kind.DROPPED):
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
                if fresh or len(chunks) > 1:
                    phrase += 1
                out.append(Piece(chunk, Kind.BASE, phrase))
                fresh = False
    return out


def broken(base: str) -> str | None:
    """What in a base prompt reads as if something were missing behind it: "with a", "holding", "her"; None if nothing.

    It can only see English words that need another one.
    """
    found = _BROKEN.search(base)
    return found.group() if found else None


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
    """

    phrases: tuple[tuple[int, ...], ...]
    target: tuple[int, ...]
    end: int


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
    between letters and punctuation, before it merges: exact there, and within a token for scripts without spaces.

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
    text, begin = "", 0
    for piece in prompt.pieces:
        if not (piece.in_full if full else piece.in_base):
            continue
        text += piece.text
        end = limit if begin >= limit else min(len(tokenize(text)), limit)  # behind the limit there is nothing to count
        positions = [position(token) for token in range(begin, end)]
        if piece.kind is Kind.TARGET:
            target.extend(positions)
        elif piece.phrase >= 0:
            phrases[piece.phrase].extend(positions)
        begin = max(begin, end)
    return Spans(tuple(tuple(p) for p in phrases), tuple(target), position(begin))
