"""Where a target's words stand in a text. Pure text, no torch."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Chinese, Japanese, Thai and their kin write no spaces; Korean hangs its particles on the word.
_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
)
_UNSPACED = re.compile(f"[{_UNSPACED_RANGES}]")
# Accents and vowel signs that are characters of their own: to Python no part of a word.
_MARKS = re.escape("".join(c for c in map(chr, range(0x300, 0x1B00)) if unicodedata.category(c)[0] == "M"))
_LETTER = rf"(?:[^\W{_UNSPACED_RANGES}]|[{_UNSPACED.sub('', _MARKS)}])"  # of a script that separates words; also "_"
_NO_MARK = "(?![\u0300-\u036f\u3099\u309a])"  # the accent would make the letter before it another one
_HYPHENS = "-\u2010\u2011"


def is_unspaced(text: str) -> bool:
    """Whether a character is of a script that does not separate words."""
    return bool(_UNSPACED.match(text))


def _written(cluster: str) -> str:
    """A pattern for one letter with its accents, composed or not, or for one sign."""
    if cluster in "()[]":  # booru captions write "\(", for which WebUIs read a bracket that is no weight
        return rf"\\?{re.escape(cluster)}"
    if cluster in _HYPHENS:
        return f"[{_HYPHENS}]"
    if cluster in "'’":
        return "['’]"
    apart = unicodedata.normalize("NFD", cluster)
    ways = [unicodedata.normalize("NFC", apart[:n]) + apart[n:] for n in range(len(apart), 0, -1)]
    ways = list(dict.fromkeys(map(re.escape, ways)))
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


@lru_cache(maxsize=1024)
def pattern(phrase: str) -> re.Pattern[str]:
    """Matches a phrase in any case, with spaces or underscores between its words, as whole words only.

    An underscore joins the words of a tag, a hyphen those of a compound: `hair` is not in `hair_bow`, nor `shirt` in
    "t-shirt"; `hair bow` and `t-shirt` are. Accents may be composed or not, brackets with or without a backslash.
    """
    phrase = re.sub(r"\\(?=[()\[\]])", "", unicodedata.normalize("NFC", phrase))
    words = [word for word in re.split(r"[\s_]+", phrase) if word]
    text = r"[\s_]+".join("".join(_written(c) for c in re.findall(rf"[^{_MARKS}][{_MARKS}]*|.", w)) for w in words)
    # Beside a letter of a script without spaces there is no word boundary to look for.
    start = "" if is_unspaced(words[0][0]) else rf"(?<!{_LETTER})(?<!{_LETTER}[{_HYPHENS}])"
    end = "" if is_unspaced(words[-1][-1]) else rf"(?![{_HYPHENS}]?{_LETTER})"
    return re.compile(start + text + _NO_MARK + end, re.IGNORECASE)
