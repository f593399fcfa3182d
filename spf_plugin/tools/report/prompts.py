"""What to ask a model for: targets and captions from a LoRA's own metadata, or what the user gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spf_plugin.config import PREFIX, SPFConfig, parse
from spf_plugin.core.prompt import Target, parse_targets, split, strip_weights
from spf_plugin.errors import SPFError
from spf_plugin.lorafile.inspect import network_args
from spf_plugin.lorafile.sidecars import target_phrases

#: Where neither the file nor the user says anything else; each gets the target.
GENERAL = (
    "a photo of a woman",
    "a photo of a man",
    "a photo of a person on a street",
    "a photo of a person in a forest",
)
_MAP_SETTINGS = ("map", "map_gain", "layers")


@dataclass(frozen=True)
class Question:
    """A prompt without the target (`base`) and the same with it (`full`)."""

    base: str
    full: str
    target: Target

    @property
    def added(self) -> str:
        """What the full prompt has behind the base prompt, or all of it where the target does not stand at the end."""
        return self.full[len(self.base) :] if self.full.startswith(self.base) else f" → {self.full}"


def targets(metadata: Mapping[str, str], given: str | None, name: str) -> tuple[Target, ...]:
    """What the LoRA was taught.

    Args:
        metadata: of the LoRA file.
        given: `--target`; wins over the file.
        name: of the file, for the message.

    Raises:
        SPFError: neither says it, or `given` is malformed.
    """
    if given:
        try:
            return parse_targets(given)
        except ValueError as error:
            raise SPFError(f"--target {given!r} {error}") from None
    said = network_args(metadata).get(PREFIX + "target")
    if isinstance(said, str) and said:
        try:
            return parse_targets(said)
        except ValueError:
            pass  # another program's idea of that key
    found = tuple(Target(phrase) for phrase in target_phrases(metadata))
    if not found:
        raise SPFError(
            f'{name} does not say what it was taught (no spf_target in its metadata). Give --target "blonde hair", as '
            "its captions said it."
        )
    return found


def map_settings(metadata: Mapping[str, str]) -> SPFConfig:
    """How the LoRA's control map was made; SPF's defaults where the file does not say, or says what is not valid."""
    said = network_args(metadata)
    try:
        return parse({PREFIX + key: said[PREFIX + key] for key in _MAP_SETTINGS if PREFIX + key in said})
    except SPFError:
        return SPFConfig()


def tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each comma-separated part stood in the captions, from kohya's `ss_tag_frequency` or `ss_datasets`."""
    counts: Counter[str] = Counter()

    def add(frequency: object) -> None:
        for folder in frequency.values() if isinstance(frequency, dict) else ():
            for tag, count in folder.items() if isinstance(folder, dict) else ():
                if isinstance(count, int) and tag.strip():
                    counts[strip_weights(tag).strip()] += count

    add(_json(metadata, "ss_tag_frequency"))
    if not counts:
        datasets = _json(metadata, "ss_datasets")
        for dataset in datasets if isinstance(datasets, list) else ():
            add(dataset.get("tag_frequency") if isinstance(dataset, dict) else None)
    return counts


def _json(metadata: Mapping[str, str], key: str) -> object:
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def from_tags(counts: Mapping[str, int], found: Sequence[Target], limit: int) -> list[str]:
    """Prompts in the words of the captions: whole sentences that hold a target, else the commonest part and another.

    Args:
        counts: see `tag_counts`.
        found: the targets.
        limit: how many prompts at most.
    """
    ordered = sorted(counts, key=lambda tag: -counts[tag])
    holds = {tag: split(tag, found) for tag in ordered}
    sentences = [tag for tag in ordered if holds[tag].has_target and holds[tag].phrases]
    others = [tag for tag in ordered if not holds[tag].has_target]
    if sentences or not others:
        return sentences[:limit]
    return [others[0], *(f"{others[0]}, {tag}" for tag in others[1:])][:limit]


def read_file(path: Path, option: str = "--prompts") -> list[str]:
    """One prompt a line; empty lines and lines that begin with `#` do not count.

    Args:
        path: the file.
        option: that named it.

    Raises:
        SPFError: it cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SPFError(f"{option} {path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise SPFError(f"{option} {path} cannot be read: {error.strerror or error}.") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SPFError(f"{option} {path} holds no prompt: write one a line.")
    return found


def questions(texts: Sequence[str], found: Sequence[Target]) -> list[Question]:
    """Base and full prompt of every text; a text that names no target gets one behind it, in turn.

    Two texts with the same prompts count once.
    """
    made: dict[tuple[str, str], Question] = {}
    for i, text in enumerate(texts):
        prompt = split(text, found)
        target = found[i % len(found)]
        if prompt.has_target:
            target = next(t for t in found if t.pattern.search(text))
        else:
            prompt = split(", ".join(part for part in (text, target.phrase.replace("_", " ")) if part), found)
        made.setdefault((prompt.base, prompt.full), Question(prompt.base, prompt.full, target))
    return list(made.values())
