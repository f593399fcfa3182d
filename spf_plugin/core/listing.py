"""Commas that end nothing: between adjectives, and between the things of a list. Pure text, no torch."""

from __future__ import annotations

from spf_plugin.core import words as w
from spf_plugin.core.clause import LONG, Clause, phrase_end

LENGTH = 160  # characters of a list behind its first thing
_HAD = frozenset(("has", "have", "had", "having"))
_HAVING = frozenset(("with", "w/", "avec", "con", "com", "mit", "с", "со"))


def goes_on(clause: Clause, phrase: int, opener: int, kind: str, rest: str) -> bool:
    """Whether the target is the first of several things that one word introduces: "in hat, coat and boots".

    `phrase` is the word where its phrase begins, `opener` and `kind` what introduces it, `rest` what follows the comma.
    Things without an article have to be the end of a sentence: of tags, "trees and sky" is not what somebody wears.
    """
    if kind not in ("verb", "prep") or not rest:
        return False
    article = phrase < len(clause.words) and clause.word(phrase) in w.DETERMINERS
    if article and kind == "prep" and clause.word(opener) not in _HAVING:
        return False  # "in a red dress, a dog and a cat beside her"
    things = Clause.read(rest[:LENGTH])
    i = 0
    for _ in range(LONG):
        final = things.word(i) in w.AND
        i += final
        if not final and (things.word(i) in w.DETERMINERS) is not article:
            return False
        end = phrase_end(things, i)
        if end == i:
            return False
        if final:
            return article or not rest[things.ends[end - 1] :].strip(" .")
        i = end
        if i < len(things.words) and rest[things.starts[i]] == ",":
            i += 1
        elif things.word(i) not in w.AND:
            return False
    return False


def is_between_adjectives(before: str, after: str) -> bool:
    """Whether a comma between two texts is one between adjectives: "with a long, thick [beard]"."""
    clause = Clause.read(before)
    left = len(clause.words)
    while _could_describe(clause, left - 1, before):
        left -= 1
    behind = Clause.read(after)
    opens = clause.word(left - 1) in (w.DETERMINERS - {"the"}) | _HAVING | _HAD  # not "in the dark, hat on head"
    return (
        left < len(clause.words) and opens and all(_could_describe(behind, i, after) for i in range(len(behind.words)))
    )


def _could_describe(clause: Clause, i: int, text: str) -> bool:
    word = clause.word(i)
    comma = not word and 0 <= i < len(clause.words) and text[clause.starts[i]] == ","
    return comma or w.is_adjective(word) or word in w.OF_THINGS
