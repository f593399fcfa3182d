"""Whether a base prompt reads as a person would write it, where the target was taken out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from spf_plugin.core import words as w
from spf_plugin.core.clause import Clause, unit_before
from spf_plugin.core.prompt import Kind, Prompt
from spf_plugin.core.serving import acts

_NEAR = 80  # characters beside a gap that are looked at
_NEEDS_NOUN = w.DETERMINERS | w.PREPOSITIONS | w.OF | w.AND | w.VERBS | w.TRANSITIVE | {"whose"}
_NEEDS_MORE = _NEEDS_NOUN | w.AUXILIARIES | w.RELATIVES
_BEFORE_ADJECTIVES = (w.DETERMINERS | w.PREPOSITIONS | w.OF | w.VERBS | set(w.HAS)) - {"in"}  # "a woman in red"
_UNITS = w.VERB_UNITS | w.PREPOSITION_UNITS
_NO_NOUN = w.PREPOSITIONS | w.AND | w.AUXILIARIES | w.RELATIVES | w.BEGINS | w.OF
_NO_BEGINNING = w.AUXILIARIES | w.OF | w.RELATIVES | {"has", "have", "had", "with"}
_BEFORE_VERBS = frozenset(("before", "after", "without", "by", "for", "like", "as"))  # "after smiling"
_SIGN = re.compile(r"[^\w\s'’\"(\[{\\]|$")
_UNSPACED_END = re.compile("[的着戴穿拿在是和与をのがはにでと]$")
_UNSPACED_START = re.compile(r"[をはが的]|[을를]\s")
_ALWAYS_WRONG = re.compile("を|'s |’s ")


def _gaps(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """What the base prompt says before and behind everything that was taken out of it; a comma that went too counts."""
    base = prompt.base
    position = 0
    taken = ""
    for piece in (*prompt.pieces, None):
        if piece and not piece.in_base:
            taken += piece.text
            continue
        if taken and piece and not piece.text.strip():  # the one space that is left of two
            taken += piece.text
            position += len(piece.text)
            continue
        if taken and not (piece and piece.kind is Kind.REPLACEMENT):
            before, after = base[max(0, position - _NEAR) : position], base[position : position + _NEAR]
            words = unicodedata.normalize("NFC", taken.strip())
            begins, ends = (bool(_SIGN.match(sign)) for sign in (words[:1], words[-1:]))
            if begins and ends and len(words) > 1:  # where two commas went, none has to stand
                begins = ends = False
            elif ends and not begins:  # nor behind the first thing of a list, "wearing [a hat,] a coat, and boots"
                ends = not before.strip() or bool(_SIGN.match(before.strip()[-1]))
            yield before + "," * begins, "," * ends + after
        taken = ""
        position += len(piece.text) if piece else 0


def _lacks_noun(left: Clause) -> bool:
    """Whether it ends in "with long" or "a long, thick": what describes a thing, and no thing."""
    last = described = len(left.words) - 1
    while _only_describes(left.word(described)) or (0 < described < last and not left.word(described)):
        described -= 1
    return described < last and left.word(described) in _BEFORE_ADJECTIVES


def _only_describes(word: str) -> bool:
    """A narrow view: "t-shirt", "seated" and "сумкой" may be more than that."""
    return w.is_adjective(word) and not re.search("-|ed$|[а-яё]", word)


def _lacks_rest(left: Clause, following: str, second: str, *, ends: bool) -> bool:
    """Whether a clause stops after "whose arms", "her cheeks", or goes on with nothing but its verb, "die trägt"."""
    last = len(left.words) - 1
    whose = "whose" in left.words[max(0, last - 2) :] and following not in w.AUXILIARIES | w.VERBS
    body = ends and left.word(last) in w.BODY and left.word(last - 1) in w.POSSESSIVES and not left.word(last - 2)
    verb = left.word(last) in ("die", "der", "das") and following in w.VERBS and not second
    return whose or body or verb


def _is_broken(before: str, after: str) -> bool:
    if _ALWAYS_WRONG.match(after) or (before[-1:].isspace() and after[:1].isspace()):
        return True
    before, after = before.strip(), after.strip()
    starts, ends = not before or bool(_SIGN.match(before[-1])), bool(_SIGN.match(after))
    left, right = Clause.read(before.rstrip(",;")), Clause.read(after.lstrip(",;"))
    following = right.word(0)
    if starts:
        beginning = following in _NO_BEGINNING or bool(_UNSPACED_START.match(after))
        return beginning or (before.endswith(",") and _lacks_noun(left))
    word = left.word(len(left.words) - 1)
    unspaced = bool(_UNSPACED_END.search(before))
    if (ends and (unspaced or word in _NEEDS_MORE)) or (unspaced and _UNSPACED_START.match(after)):
        return True
    nothing = ends or following in _NO_NOUN
    if nothing and (_lacks_noun(left) or unit_before(left, len(left.words), _UNITS) < len(left.words)):
        return True
    if _lacks_rest(left, following, right.word(1), ends=ends):
        return True
    if (word.endswith("'s") and word != "'s") or word in _NEEDS_NOUN - w.AND:
        participle = following.endswith("ing") and following not in w.NO_VERBS and acts(right, 0)
        return nothing or (participle and word not in w.DETERMINERS | w.VERBS | _BEFORE_VERBS)
    return False


def is_broken(prompt: Prompt) -> bool:
    """Whether the base prompt has a word beside a gap that needs what is gone: an article, a preposition, a verb."""
    return prompt.has_target and any(_is_broken(before, after) for before, after in _gaps(prompt))
