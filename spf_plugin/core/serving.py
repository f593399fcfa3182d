"""Which words of a caption serve only an added target, and go with it. Pure text, no torch.

The rule, for scripts with spaces. Backwards from the target: what describes it ("long red"), its article, and what
introduces it: a preposition ("with", "next to"), a verb that needs it ("is holding", "who has"), or "and". Forwards:
where it is on the body ("around her neck"), how it is arranged ("tied in a bun"), "of ..." and "that ...". All of that
goes where the phrase ends there: at a sign, or at a word that begins something of its own ("against", "who"). If a noun
follows, the target describes it ("a *blonde* woman"), and goes alone. If "and" follows, what introduced the
target introduces what stands behind the "and", and stays, unless that has an introduction of its own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from spf_plugin.core import listing
from spf_plugin.core import words as w
from spf_plugin.core.clause import LONG, OWN, Clause, begins_own, is_participle, phrase_end, unit_before

_NEAR = 24  # characters beside a target that are looked at in scripts without spaces
_CLAUSE = 12  # words of a clause behind "that"
_OTHERS = w.WHILE | w.INTRANSITIVE  # behind these, a clause tells of somebody else
_BEFORE_NOUN = w.PREPOSITIONS | w.DETERMINERS
# Where a word of these begins, the language is not one whose nouns stand side by side ("a hat box").
_NO_COMPOUNDS = re.compile(
    r"[\u0400-\u04ff].*|avec|sans|aux?|à|en|dans|portant|tenant|porte|qui|coiffée?|vêtue?|de|con|sin|senza|com|sem|lleva|indossa|"
    "mit|ohne|trägt|hält|eine?[nmr]?"
)
_PLURAL = re.compile(r"\w{2,}[^siu\W]s")  # or a verb: "jumps", but not "glass", "this", "cactus"


@dataclass(frozen=True)
class _Lead:
    """What introduces a target, as indices of words.

    Attributes:
        phrase: where its phrase begins, with article and what describes it.
        opener: where the preposition, verb or conjunction before that begins.
        predicate: the same, with "is" before a verb.
        everything: the same, with "who" or "and" before it.
        kind: of the opener: `prep`, `verb`, `is`, `and`, `of`, `whose`, or empty.
    """

    phrase: int
    opener: int
    predicate: int
    everything: int
    kind: str


def _has(clause: Clause, i: int) -> bool:
    language = w.HAS.get(clause.word(i))
    return bool(language and language.fullmatch(clause.word(i + 1)))


def _opener(clause: Clause, phrase: int) -> tuple[int, str]:
    last = clause.word(phrase - 1)
    if _has(clause, phrase - 1):
        return phrase - 1, "verb"
    if last == "whose":
        return phrase - 1, "whose"
    if (begin := unit_before(clause, phrase, w.VERB_UNITS)) < phrase:
        return begin, "verb"
    if (begin := unit_before(clause, phrase, w.PREPOSITION_UNITS)) < phrase:
        return begin, "prep"
    if last in w.VERBS:
        return phrase - 1, "verb"
    if last in w.PREPOSITIONS:
        return phrase - 1, "prep"
    if last in w.OF:
        return phrase - 1, "of"
    if last in w.AND:
        return phrase - 1, "and"
    if last in w.AUXILIARIES:
        return phrase - 1, "is"
    if is_participle(last) and last not in w.INTRANSITIVE and clause.word(phrase - 2) not in w.DETERMINERS:
        return phrase - 1, "verb"
    return phrase, ""


def _describes(clause: Clause, i: int, target: int) -> bool:
    """Whether the word before the target's phrase describes it."""
    word = clause.word(i)
    if is_participle(word) and word not in w.ADJECTIVES:  # "in shining armor"; but "without wearing hats"
        flowing = word in w.OF_THINGS and w.is_adjective(clause.word(i - 1))  # "long, flowing hair"
        return flowing or (clause.word(i - 1) in _BEFORE_NOUN and word not in w.TRANSITIVE)
    return (w.is_adjective(word) and word not in w.VERBS) or (i + 1 < target and word in w.ADVERBS)


def _noun_phrase(clause: Clause, described: int, target: int, behind: int) -> int:
    """Where the words begin that stand between an article that something introduces and the target, and so describe it,
    also those that are in no list: "plays an [acoustic] guitar"; `described` if it is none of that.
    """
    i = described
    while target - i < LONG and not begins_own(clause, i - 1) and not is_participle(clause.word(i - 1)):
        if clause.word(i - 1) in w.DETERMINERS | w.OF | w.PERSONS:
            break
        i -= 1
    article = clause.word(i - 1)
    if i == described or article not in w.DETERMINERS or _opener(clause, i - 1)[1] not in ("verb", "prep"):
        return described
    run_on = article in ("a", "an") and _PLURAL.fullmatch(clause.word(behind - 1))  # "holding a cat sunglasses"
    return described if run_on else i


def _lead(clause: Clause, target: int, behind: int) -> _Lead:
    described = target
    while _describes(clause, described - 1, target):
        described -= 1
        if clause.word(described - 1) in w.AND and _describes(clause, described - 2, target):
            described -= 1  # "a black and white dress"
    described = _noun_phrase(clause, described, target, behind)
    phrase = described
    if clause.word(phrase - 1) in ("de", "d'") and _has(clause, phrase - 2):
        phrase -= 1  # "elle a de longs cheveux"
    while clause.word(phrase - 1) in w.DETERMINERS and not _has(clause, phrase - 1):
        phrase -= 1
    if clause.word(phrase - 1) in w.OF and clause.word(phrase - 2) in w.MEASURES:  # "a pair of sunglasses"
        phrase -= 2
        while clause.word(phrase - 1) in w.DETERMINERS:
            phrase -= 1
    opener, kind = _opener(clause, phrase)
    if not kind and phrase == described:
        if w.is_adjective(clause.word(behind - 1)):  # "long blonde and curly hair": all of it is of the hair
            described = target
        return _Lead(described, described, described, described, "")
    if (
        clause.word(opener) in ("with", "by")
        and len(clause.word(opener - 1)) > 4
        and clause.word(opener - 1)[-2:] == "ed"
    ):
        opener, kind = opener - 1, "verb"  # "topped with"
    predicate = opener
    if kind in ("verb", "is"):
        while clause.word(predicate - 1) in w.AUXILIARIES | w.ADVERBS:
            predicate -= 1
    everything = predicate
    whose = next((i for i in range(predicate - 1, max(predicate - LONG, 0) - 1, -1) if clause.word(i) == "whose"), None)
    owned = clause.word(predicate - 1) in w.BODY and clause.word(predicate - 2) in w.POSSESSIVES
    if kind in ("verb", "is") and whose is not None:  # "whose hair is blonde"
        everything = whose
    elif kind in ("verb", "is") and owned and not clause.word(predicate - 3):
        everything = predicate - 2  # "a child, her cheeks decorated with face paint"
    elif (kind in ("verb", "is") and clause.word(everything - 1) in w.RELATIVES) or (
        kind in ("verb", "is", "prep") and clause.word(everything - 1) in w.AND | w.WHILE
    ):
        everything -= 1
    return _Lead(phrase, opener, predicate, everything, kind)


def _belongings(clause: Clause, i: int) -> int:
    """The end of what is said of the target behind it, which begins at `i`."""
    for _ in range(LONG):
        begin, word = i, clause.word(i)
        if word in w.OF:
            i = phrase_end(clause, i + 1)
        elif word in ("that", "which"):
            stop = min(clause.end_from(i), i + _CLAUSE)
            while i < stop and clause.word(i) not in _OTHERS:
                i += 1
        elif w.BEHIND.fullmatch(word):
            i += 1
        elif word in w.OF_THINGS:
            i += 1
            if clause.word(i) in w.DIRECTIONS and begins_own(clause, i + 1):
                i += 1  # "pulled low"
            if clause.word(i) in w.PREPOSITIONS | w.OF:
                i = phrase_end(clause, i + 1)
        elif word == "on" and (
            not clause.word(i + 1) or clause.word(i + 1) in OWN or is_participle(clause.word(i + 1))
        ):
            i += 1  # "with no shirt on"
        elif word in w.PLACES or (word.endswith("ed") and clause.word(i + 1) in w.PLACES):
            j = i + 1 + (word not in w.PLACES)
            while clause.word(j) in w.DETERMINERS | w.SIDES:
                j += 1
            if clause.word(j) in w.BODY:
                i = j + 1 + (clause.word(j + 1) in w.SIDES)
        if i == begin:
            break
    return i


def _ends(clause: Clause, i: int, lead: _Lead) -> bool:
    """Whether the target's phrase ends before word `i`; else that is the noun that the target describes."""
    word = clause.word(i)
    if begins_own(clause, i):
        return True
    if is_participle(word):  # "with a scarf playing guitar", but "a blonde smiling woman"
        after = i + 1
        return bool(lead.kind) or begins_own(clause, after) or clause.word(after) in w.DETERMINERS
    if clause.word(i + 1) in w.DETERMINERS:  # "opens the door": a verb that is in no list
        return True
    counted = clause.word(lead.phrase) in ("a", "an") and not w.is_adjective(clause.word(i - 1))
    if counted and _PLURAL.fullmatch(word):  # "a yellow umbrella jumps", but "in a red jeans"
        return True
    return bool(lead.kind) and bool(_NO_COMPOUNDS.fullmatch(clause.word(lead.opener)))


def around(clause: Clause, start: int, end: int, rest: str = "", *, opens: bool = True) -> tuple[int, int]:
    """The range of characters that goes with the target at `start` to `end`, which is a part of it.

    Args:
        rest: what the caption says behind the comma where the clause ends. If that goes too, so does the comma, and the
            range ends one behind the text.
        opens: whether the clause opens the caption.
    """
    first, behind = bisect_left(clause.starts, start), bisect_left(clause.starts, end)
    lead = _lead(clause, first, behind)
    last = _belongings(clause, behind)
    if not opens and _is_tag(clause, lead, last):
        return clause.starts[lead.phrase - 1], end
    if not lead.kind and clause.word(last) in w.AUXILIARIES and _owner(clause, lead.phrase - 1):
        return clause.ends[lead.phrase - 1] - 2, clause.ends[clause.end_from(last) - 1]  # "the woman['s hat is red]"
    if last == len(clause.words) and listing.goes_on(clause, lead.phrase, lead.opener, lead.kind, rest):
        return clause.starts[lead.phrase], clause.ends[last - 1] + 1  # "wearing [a crown,] a dress, and a necklace"
    alone = lead.phrase == 0 or not clause.word(lead.phrase - 1)
    if clause.word(behind) in w.OF and clause.word(behind + 1) in w.DETERMINERS:  # what it is "of" is somebody else
        if not lead.kind and alone:
            return clause.starts[lead.phrase], clause.ends[behind]  # "[a watercolor of] a fox in the snow"
        if clause.word(behind - 1) in w.STYLES:
            last = behind  # "a portrait [in the cyberpunk style] of a nun"
    begin, stop = first, last
    following = clause.word(last)
    about = following in w.AUXILIARIES | {"has", "have", "had"}
    about = about or (clause.word(lead.phrase) in w.POSSESSIVES and is_participle(following))
    if lead.kind == "whose" or (not lead.kind and alone and about):
        begin = lead.opener  # "her blonde hair is tied back": all of the clause is about the target
        acting = clause.word(last + 1) in w.INTRANSITIVE and clause.word(last + 2) in w.WHERE
        stop = last + 2 if acting else clause.end_from(stop)  # "[a dog is lying] on a couch"
    elif not lead.kind and not clause.word(last + 1) and (relative := _relative(clause, lead.phrase, following)) >= 0:
        begin, stop = relative, last + 1
    elif following in w.AND and clause.word(last + 1):
        begin, stop = _before_and(clause, lead, first, last)
    elif lead.kind == "is" and clause.word(lead.predicate - 1) == "there":
        begin, stop = lead.predicate - 1, clause.end_from(last)  # "there is [a red hat] on the table": so is its place
    elif following == "over" and lead.kind in ("verb", "prep") and clause.word(last + 1) in w.DETERMINERS:
        begin, stop = lead.phrase, last + 1  # "wearing [a leather jacket over] a white shirt"
    elif not _ends(clause, last, lead):
        return start, clause.ends[last - 1] if last > behind else end
    elif lead.kind == "of":
        says = is_participle(following) or following in w.BEGINS | w.VERBS | w.AUXILIARIES
        if clause.word(lead.opener) == "de":  # "una niña [de pelo rubio] juega": it is the girl that plays
            says = following in w.POSED
        begin = lead.phrase if says else lead.opener  # "a photo of [her] smiling": no photo smiles; `spf check` says so
    elif lead.kind == "prep":
        begin = lead.everything
        finite = following in w.AUXILIARIES or (_PLURAL.fullmatch(following) and not following.endswith("doors"))
        if finite and clause.word(begin - 1) in w.INTRANSITIVE:
            begin -= 1  # "a woman [sitting in a wheelchair] feeds pigeons"
        if not clause.word(last):  # "a man who is in a car": nothing is left that he is
            while clause.word(begin - 1) in w.AUXILIARIES | w.RELATIVES:
                begin -= 1
    elif lead.kind == "verb" and lead.everything == lead.predicate < lead.opener and following in w.WHERE:
        begin = lead.opener  # "she is [holding a cup] in a park"
    else:
        begin = lead.everything
    left = clause.starts[begin] if begin < first else start
    return left, clause.ends[stop - 1] if stop > behind else end


def _is_tag(clause: Clause, lead: _Lead, last: int) -> bool:
    """Whether all before the target is one word that says of which kind it is: "medical eyepatch", "sun hat"."""
    word, i = clause.word(lead.phrase - 1), lead.phrase - 1
    own = begins_own(clause, i) or is_participle(word) or word in w.PERSONS | w.DETERMINERS | w.OF or word[0].isdigit()
    said = clause.word(last - 1)
    own = own or word.endswith("'s") or w.is_adjective(said) or bool(w.BEHIND.fullmatch(said))  # "robe rouge": the robe
    return not lead.kind and not clause.word(last) and not clause.word(i - 1) and not own


def _owner(clause: Clause, i: int) -> bool:
    """Whether "the woman's" opens a clause."""
    if not clause.word(i).endswith("'s") or len(clause.word(i)) < 4:
        return False
    for _ in range(LONG):
        i -= 1
        if not clause.word(i):
            return True
        if clause.word(i) not in w.DETERMINERS and not w.is_adjective(clause.word(i)):
            return False
    return False


def describing(text: str) -> str:
    """Of words that went with a target behind them, the ones that describe it: "long" of "with long"."""
    clause = Clause.read(text)
    first = last = len(clause.words)
    while first and not (
        begins_own(clause, first - 1)
        or is_participle(clause.word(first - 1))
        or clause.word(first - 1) in w.DETERMINERS | w.OF | w.MEASURES
    ):
        first -= 1
    return text[clause.starts[first] : clause.ends[last - 1]] if first < last else ""


def _relative(clause: Clause, phrase: int, verb: str) -> int:
    """Where a German clause with its verb at the end begins, "die einen Hut trägt"; -1 if there is none."""
    if verb in w.VERBS or verb == "hat":
        for i in (phrase - 1, phrase):
            if clause.word(i) in ("die", "der", "das") and not clause.word(i - 1):
                return i
    return -1


def acts(clause: Clause, i: int) -> bool:
    """Whether a participle is a verb: "smiling at her", "holding a cup", but not "piercing blue eyes"."""
    word, after = clause.word(i), clause.word(i + 1)
    return word in w.INTRANSITIVE or word in w.TRANSITIVE or not after or after in OWN or after in w.DETERMINERS


def _before_and(clause: Clause, lead: _Lead, first: int, last: int) -> tuple[int, int]:
    """The same as indices of words, where the target is word `first`, and word `last` is "and"."""
    word = clause.word(last + 1)
    if "other" in (word, clause.word(last + 2)) or word == "another":
        return lead.everything, last  # "one [in a red beanie] and the other in a green parka"
    bare = not lead.kind and lead.phrase == first
    if bare and clause.word(first - 1):
        return first, last  # "an unlisted [hat] and a scarf"
    if (word in w.PRONOUNS and lead.kind) or (lead.kind == "is" and word in w.DETERMINERS):
        return lead.everything, last  # "a woman [with a scarf] and she smiles"
    if (is_participle(word) and acts(clause, last + 1)) or (
        begins_own(clause, last + 1) and word not in w.VERBS | w.AUXILIARIES
    ):
        return lead.opener, last + (lead.kind != "and")  # "is [wearing a scarf and] holding a cup"
    if word in w.VERBS | w.AUXILIARIES:
        return lead.predicate, last + (lead.kind != "and")  # "who [is wearing a scarf and] has freckles"
    j = last + 1
    while clause.word(j) in w.DETERMINERS or w.is_adjective(clause.word(j)):
        j += 1
    if clause.word(j) in w.PERSONS and lead.kind in ("prep", "verb"):
        return lead.everything, last  # "a woman [with a scarf] and a man": he is not what she has
    return lead.phrase, last + 1  # "with [blonde hair and] a hat"


def around_unspaced(text: str, start: int, end: int) -> tuple[int, int]:
    """The same in a script without spaces, by what stands directly beside the target."""
    before, after = text[max(0, start - _NEAR) : start], text[end : end + _NEAR]
    if together := w.UNSPACED_AND_BEHIND.match(after):
        return start, end + together.end()
    if together := w.UNSPACED_AND_BEFORE.search(before):
        return start - len(together.group()), end
    for verb, adjective in ((w.JA_VERB, w.JA_ADJECTIVE), (w.KO_VERB, w.KO_ADJECTIVE)):
        if found := verb.match(after):
            described = adjective.search(before)
            return start - (len(described.group()) if described else 0), end + found.end()
    if (at := w.ZH_AT.search(before)) and (place := w.ZH_PLACE.match(after)):
        return start - len(at.group()), end + place.end()
    of = w.ZH_OF.match(after) or w.JA_OF.match(after) or w.KO_OF.match(after)
    stop = end + (of.end() if of else 0)
    lead = w.ZH_VERB.search(before) or (w.ZH_MEASURE.search(before) if not after.strip() else None)
    return start - (len(lead.group()) if lead else 0), stop


def says_nothing(words: list[str]) -> bool:
    """Whether what is left of a clause is only small words, such as "she", "there is"."""
    return all(word in w.FILLERS for word in words if word)
