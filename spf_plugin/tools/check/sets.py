"""What is wrong with the captions together: cut off, alike, and what goes with the target all the time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from spf_plugin.hosts.kohya.captions import shuffled
from spf_plugin.tools.check.captions import LEADING, Described, count_of, names
from spf_plugin.tools.check.findings import Finding, of

ALIKE = 0.9  # share of images with the same base prompt that counts as all alike
TOGETHER = 0.75  # share of the target's images that say something else too
MORE_THAN_WITHOUT = 0.3  # how much more often than the images without target
FEW = 4  # below this many images nothing is said about shares
_FILLER_WORDS = (
    "a an the her his their its with wearing wears has having in on at by and plus of to for from is are she he they "
    "photo picture image portrait person woman women man men girl boy lady guy people "
    "hair skin eyes eye face head body lips expression background view shot style light lighting quality"
)
_FILLER = frozenset(_FILLER_WORDS.split())


def look_together(rows: Sequence[Described]) -> list[Finding]:
    """Everything about the training captions as a set (no regularisation images in `rows`)."""
    if not rows:
        return []
    return [*_cut(rows), *_base_prompts(rows), *_same_captions(rows), *_together(rows)]


def _cut(rows: Sequence[Described]) -> list[Finding]:
    cut = [row for row in rows if row.cut]
    if not cut:
        return []
    limit = cut[0].limit
    longest = max(row.tokens for row in cut)
    fits = next((n for n in (150, 225) if n >= longest and n > limit), 225)
    fix = f"Set max_token_length = {fits}, or shorten them." if limit < 225 else "Shorten them."
    lost = [row for row in cut if row.prompt.has_target and not row.full.target]
    may = [row for row in cut if row.prompt.has_target and shuffled(row.entry.subset)]
    found = [
        Finding(
            "warning",
            "caption-cut",
            f"{of(count_of(cut), count_of(rows))} have a caption longer than {limit} tokens (the longest has "
            f"{longest}); the end is cut off",
            fix,
            names(cut),
        )
    ]
    if 0 < len(lost) < sum(row.prompt.has_target for row in rows):  # else the host's rules say it
        found.append(
            Finding(
                "warning",
                "target-cut",
                f"in {of(count_of(lost), count_of(rows))} the target lies behind token {limit} and is cut off",
                f"Move the target to the front. {fix}",
                names(lost),
            )
        )
    elif may and not lost:
        found.append(
            Finding(
                "warning",
                "target-may-be-cut",
                f"in {of(count_of(may), count_of(rows))} shuffling may move the target behind token {limit}",
                "Put the target first and set keep_tokens = 1.",
                names(may),
            )
        )
    return found


def _base_prompts(rows: Sequence[Described]) -> list[Finding]:
    with_target = [row for row in rows if row.prompt.has_target]
    if not with_target:
        return []
    found = []
    empty = [row for row in with_target if not row.prompt.base.strip()]
    if 0 < len(empty) < len(with_target):  # else the host's rules say it
        found.append(
            Finding(
                "warning",
                "base-empty",
                f"{of(count_of(empty), count_of(with_target))} say nothing but the target, so the base prompt is empty",
                "Describe what else the image shows: that is what SPF preserves best.",
                names(empty),
            )
        )
    bases = Counter(re.sub(r"\W+", " ", row.prompt.base.lower()).strip() for row in with_target)
    text, count = bases.most_common(1)[0]
    if text and len(with_target) >= FEW and count >= ALIKE * len(with_target):
        found.append(
            Finding(
                "warning",
                "base-alike",
                f"{of(count, len(with_target), 'captions')} have the same base prompt, {text!r}: nothing tells SPF "
                "what of an image is not the target",
                "Describe each image: background, clothes, pose.",
                names([r for r in with_target if re.sub(r"\W+", " ", r.prompt.base.lower()).strip() == text]),
            )
        )
    elif not empty:
        short = [row for row in with_target if len(row.prompt.phrases) == 1 and len(row.prompt.base.split()) < 4]
        if len(short) > len(with_target) / 2:
            found.append(
                Finding(
                    "warning",
                    "base-short",
                    f"{of(count_of(short), count_of(with_target))} say hardly more than the target, e.g. "
                    f"{short[0].prompt.full!r}",
                    "Name what the images share (background, clothes): what a caption names is held best.",
                    names(short),
                )
            )
    return found


def _same_captions(rows: Sequence[Described]) -> list[Finding]:
    by_text: dict[str, list[Described]] = {}
    for row in rows:
        by_text.setdefault(row.prompt.full, []).append(row)
    same = {text: mine for text, mine in by_text.items() if count_of(mine) > 1}
    total = sum(count_of(mine) for mine in same.values())
    if not same:
        return []
    text, most = max(same.items(), key=lambda item: count_of(item[1]))
    return [
        Finding(
            "warning" if 2 * total > count_of(rows) else "note",
            "same-caption",
            f"{of(total, count_of(rows))} share their caption with another; {count_of(most)} say {text!r}",
            "",
            tuple(name for mine in same.values() for name in names(mine)),
        )
    ]


def _sayings(row: Described) -> dict[str, str]:
    """What the base prompt says: its phrases without their connectives, and their words; word -> its phrase."""
    said: dict[str, str] = {}
    for phrase in row.prompt.phrases:
        plain = LEADING.sub("", phrase.lower().strip(" .;:()[]"))
        said[plain] = plain
        for word in re.findall(r"[^\W\d_]+", plain):
            said.setdefault(word, plain)
    return {key: phrase for key, phrase in said.items() if key and key not in _FILLER}


def together(rows: Sequence[Described]) -> list[tuple[str, int, int, int, int]]:
    """What the captions with the target say nearly always: `(saying, images with target that say it, images with
    target, images without target that say it, images without target)`, the most frequent first.

    A word is left out where a longer saying that holds it is as frequent.
    """
    with_target: dict[str, set[str]] = {}
    without: dict[str, set[str]] = {}
    for row in rows:
        side = with_target if row.prompt.has_target else without
        side.setdefault(row.name, set()).update(_sayings(row))
    n, m = len(with_target), len(without)
    if n < FEW:
        return []
    counts = Counter(saying for said in with_target.values() for saying in said)
    others = Counter(saying for said in without.values() for saying in said)
    found = []
    for saying, count in counts.most_common():
        if count < TOGETHER * n or (m and count / n - others[saying] / m < MORE_THAN_WITHOUT):
            continue
        longer = [o for o in counts if o != saying and re.search(rf"\b{re.escape(saying)}\b", o) and counts[o] >= count]
        if not longer and count > 1:
            found.append((saying, count, n, others[saying], m))
    return found


def _together(rows: Sequence[Described]) -> list[Finding]:
    found = together(rows)
    if not found:
        return []
    target = " or ".join(dict.fromkeys(t.phrase for row in rows for t in row.targets))
    lines = [
        f"{of(count, n)} with {target!r} also say {saying!r}" + (f" (without it {other} of {m})" if m else "")
        for saying, count, n, other, m in found[:5]
    ]
    return [
        Finding(
            "warning",
            "pollution",
            "\n".join(["a plain LoRA would learn with the target what nearly always comes with it:", *lines]),
            "SPF holds these, as the captions name them; a few images with the target and without them help most.",
        )
    ]
