"""The text side of a batch: captions to conditioning of both paths, token groups and semantic distances.

Everything that depends on a caption alone is computed once and kept, for the whole data set: `Cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spf_plugin import terminal
from spf_plugin.core import sfcm
from spf_plugin.core.prompt import Prompt, Spans, Target, split
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Family, Text

logger = terminal.logger(__name__)

# Everyday phrases that have nothing in common with a target: their distance to it calibrates CLIP's crowded cosines.
ANCHORS = (
    "a photo of a person",
    "plain background",
    "standing outdoors",
    "a brown jacket",
    "smiling face",
    "city street at night",
    "green grass",
    "a wooden table",
)
CACHED_SPLITS = CACHED_PHRASES = 2**18  # captions and phrases, a few hundred bytes to a few kilobytes each
CACHED_BYTES = 2 * 2**30  # of encoded base prompts, in main memory: 9,000 of SD1.5 or 3,300 of SDXL in half precision
# The same where they cannot be encoded later: 4,000 of FLUX, whose 512 states of T5-XXL take 4 MB.
EARLY_BYTES = 16 * 2**30

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TextHost(Protocol):
    """What the text side needs of a host."""

    @property
    def prefix(self) -> str:
        """What it puts before every prompt that it encodes, and does not report with the captions."""
        ...

    def tokenize(self, text: str) -> Sequence[int]:
        """Token ids as the host would make them, without BOS, EOS and padding. A host whose model has two tokenizers
        takes `which=1` besides, for the second."""
        ...

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        """Conditioning for these prompts, by the names that the model's family has for it; `beside` shares the batch
        where the host pads to the longest: base prompts have their full ones there, phrases have none."""
        ...


class Cache(dict[K, V]):
    """A dictionary that keeps what comes first, up to a size; what comes later is made each time.

    Forgetting what was used longest ago would forget all of a data set that is a little too large, in every epoch.

    Args:
        size: the most that is kept, in what `weigh` counts.
        weigh: the size of a value; by default 1, so that `size` is a number of values.
        full: called once, when something does not fit.
    """

    def __init__(self, size: int, weigh: Callable[[V], int] = lambda _: 1, full: Callable[[], None] = lambda: None):
        super().__init__()
        self.size, self.used = size, 0
        self._weigh, self._full, self._said = weigh, full, False

    def get_or(self, key: K, make: Callable[[], V]) -> V:
        if key in self:
            return self[key]
        value = make()
        weight = self._weigh(value)
        if self.used + weight <= self.size:
            self.used += weight
            self[key] = value
        elif not self._said:
            self._said = True
            self._full()
        return value


def size_in_bytes(text: Text) -> int:
    """Of all tensors of a conditioning."""
    return sum(part.nbytes for part in text.values())


def map_text(function: Callable[..., Tensor], *texts: Text) -> Text:
    """Apply `function` to the tensors of several conditionings that have the same name; the names are the first's."""
    return {name: function(*(text[name] for text in texts)) for name in texts[0]}


def _row(i: int, part: Tensor) -> Tensor:
    return part[i : i + 1].detach()


def _batch(*rows: Tensor) -> Tensor:
    """Samples `[1, S, ...]` in one batch; shorter ones padded with zeros, as hosts do it, whose masks end before."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0) * (row.dim() - 2) + (0, longest - row.shape[1])) for row in rows])


def vectors(text: Text, start: int, ends: Sequence[int]) -> Tensor:
    """One vector per prompt, `[B, E]`: the pooled output if there is one; of a language model the mean of its states
    from `start` on, as none of them stands for the whole, and what stands before is the same for all (and larger than
    all, where it is a begin token); else the state at EOS, position `ends[b]`."""
    if "pooled" in text:
        return text["pooled"]
    hidden = text["hidden"]
    if "hidden_mask" in text:
        valid = text["hidden_mask"][:, start:, None].to(hidden.device, torch.float32)  # [B, S - start, 1]
        return (hidden[:, start:].float() * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
    last = hidden.shape[1] - 1
    return torch.stack([hidden[b, min(end, last)] for b, end in enumerate(ends)])


def _compared(prompt: Prompt) -> tuple[str, ...]:
    """The phrases whose distances a caption needs."""
    return (*prompt.phrases, prompt.target, *ANCHORS) if prompt.has_target else ()


@dataclass(frozen=True)
class BatchText:
    """The text side of one batch. P is the largest number of base phrases in it; the last base group is EOS and
    padding.

    Attributes:
        prompts: the split captions.
        base_groups: `[B, T, P + 1]`, token membership in the base prompts.
        full_groups: `[B, T, P + 2]`, the same groups in the full prompts, and the target as the last.
        present: `[B, P + 1]`, 1 where the sample has the group.
        has_target: `[B]` bool.
        with_target: how many have; known without asking the device.
        empty: `[B]` bool, captions that were dropped out.
    """

    prompts: tuple[Prompt, ...]
    base_groups: Tensor
    full_groups: Tensor
    present: Tensor
    has_target: Tensor
    with_target: int
    empty: Tensor

    @property
    def base(self) -> list[str]:
        return [p.base for p in self.prompts]

    @property
    def full(self) -> list[str]:
        return [p.full for p in self.prompts]

    @property
    def all_empty(self) -> bool:
        """Whether every caption was dropped out; known without asking the device."""
        return not any(p.full.strip() for p in self.prompts)


class TextSide:
    """Splits, locates and encodes captions for one run.

    Args:
        host: tokenizer and text encoder; called with the adapter bypassed for the reference.
        family: of the denoiser: where phrases lie in its text sequence.
        targets: the target phrases.
        bypassed: a context manager factory that switches the adapter off.
    """

    def __init__(self, host: TextHost, family: Family, targets: Sequence[Target], bypassed: Callable[[], Any]):
        self.host, self.family = host, family
        self.targets = tuple(targets)
        self.bypassed = bypassed
        self._splits: Cache[tuple[str, tuple[Target, ...], int], tuple[Prompt, Spans, Spans]] = Cache(CACHED_SPLITS)
        self._encoded: Cache[tuple[str, int], Text] = Cache(CACHED_BYTES, size_in_bytes, self._too_many)  # on the CPU
        self._vectors: Cache[str, Tensor] = Cache(CACHED_PHRASES)

    def _too_many(self) -> None:
        logger.warning(
            f"SPF: {len(self._encoded)} encoded base prompts fill {self._encoded.size / 2**30:g} GB; further ones are "
            "encoded, or read, again each time they come. Shuffled captions, tag dropout and long texts make that many"
        )

    def for_batch(
        self, captions: Sequence[str], text: Text, overrides: Sequence[Sequence[Target] | None] = ()
    ) -> BatchText:
        """Split a batch of captions.

        Args:
            captions: as the host encoded them (after shuffling and dropout).
            text: the host's conditioning for them; gives T and the device.
            overrides: per sample the targets that replace the run's, or None.
        """
        length, dropped = self.family.length(text), self.family.dropped(text)
        rows = []
        for i, caption in enumerate(captions):
            if i < len(dropped) and dropped[i]:
                caption = ""
            override = overrides[i] if i < len(overrides) else None
            rows.append(self._split(caption, tuple(override) if override is not None else self.targets, length))
        count = max((len(base.phrases) for _, base, _ in rows), default=0)
        base_groups = torch.zeros(len(rows), length, count + 1)
        full_groups = torch.zeros(len(rows), length, count + 2)
        present = torch.zeros(len(rows), count + 1)
        for i, (_, base, full) in enumerate(rows):
            for p, (in_base, in_full) in enumerate(zip(base.phrases, full.phrases, strict=True)):
                base_groups[i, list(in_base), p] = 1
                full_groups[i, list(in_full), p] = 1
                present[i, p] = float(bool(in_base) and bool(in_full))  # a phrase cut off in one has nothing to compare
            for groups, found in ((base_groups, base), (full_groups, full)):
                groups[i, found.end :, count] = 1
                groups[i, list(found.gap), count] = 1
            present[i, count] = 1
            full_groups[i, list(full.target), count + 1] = 1
        device = text["hidden"].device
        return BatchText(
            prompts=tuple(prompt for prompt, _, _ in rows),
            base_groups=base_groups.to(device),
            full_groups=full_groups.to(device),
            present=present.to(device),
            has_target=torch.tensor([bool(full.target) for _, _, full in rows], device=device),
            with_target=sum(bool(full.target) for _, _, full in rows),
            empty=torch.tensor([not prompt.full.strip() for prompt, _, _ in rows], device=device),
        )

    def _split(self, caption: str, targets: tuple[Target, ...], length: int) -> tuple[Prompt, Spans, Spans]:
        def make() -> tuple[Prompt, Spans, Spans]:
            prompt = split(caption, targets)
            return prompt, *self._places(prompt, length)

        return self._splits.get_or((caption, targets, length), make)

    def _places(self, prompt: Prompt, length: int) -> tuple[Spans, Spans]:
        """Of the phrases, in the base prompt and in the full one."""
        find, tokenize, framed = self.family.spans, self.host.tokenize, prompt.behind(self.host.prefix)
        return find(framed, tokenize, length, full=False), find(framed, tokenize, length, full=True)

    @torch.no_grad()
    def base_text(self, text: BatchText, like: Text, *, text_encoder_trained: bool) -> Text:
        """The base prompts encoded by the untrained text encoder, in the type and on the device of `like`, and of what
        a host encodes what `like` has.

        Args:
            text: the batch.
            like: the host's conditioning for the full prompts.
            text_encoder_trained: if not, a caption without target needs no second encoding: its row of `like` is it.
        """
        length = self.family.length(like)
        rows = []
        for i, (base, full) in enumerate(zip(text.base, text.full, strict=True)):
            if base == full and not text_encoder_trained:
                rows.append(map_text(partial(_row, i), like))
            else:
                rows.append(self._encoded.get_or((base, length), partial(self._encode, base, text.full)))
        cast = [map_text(lambda to, part: part.to(to.device, to.dtype), like, row) for row in rows]
        return map_text(_batch, *cast)

    @torch.no_grad()
    def encode_early(
        self, captions: Iterable[tuple[str, Sequence[Target] | None]], *, text_encoder_trained: bool = False
    ) -> None:
        """Encode all that these captions will need, each with its own targets or None, while there are text encoders.

        Args:
            captions: of the data set.
            text_encoder_trained: captions without a target need an encoding too, of the untrained encoder.

        Raises:
            SPFError: it does not fit into the cache.
        """
        self._encoded.size = EARLY_BYTES
        done: set[str] = set()
        for caption, own in captions:
            prompt = split(caption, self.targets if own is None else own)
            if (text_encoder_trained or prompt.base != prompt.full) and prompt.base not in done:
                done.add(prompt.base)
                encoded = self._encode(prompt.base, [prompt.full])
                key = (prompt.base, self.family.length(encoded))
                self._encoded.get_or(key, partial(dict, encoded))
                if key not in self._encoded:
                    raise SPFError(
                        f"{len(self._encoded)} encoded base prompts fill {EARLY_BYTES / 2**30:g} GB, and this host "
                        "frees its text encoders before training. Use fewer captions, or let it encode them in every "
                        "step."
                    )
            for phrase in _compared(prompt):
                self.vector(phrase)

    @torch.no_grad()
    def rehearse(self, caption: str, *, length: int) -> dict[str, Tensor]:
        """Ask the host all that a caption will need in any batch of a run that trains no text encoder: tokens, its base
        prompt and phrases encoded.

        Args:
            caption: as the host encodes it.
            length: T of a text sequence in which nothing is cut off (`Family.length`).

        Returns:
            the phrases' vectors, `[E]` each.
        """
        prompt = split(caption, self.targets)
        self._places(prompt, length)
        if prompt.base != prompt.full:
            self._encode(prompt.base, [prompt.full])
        return {phrase: self.vector(phrase) for phrase in _compared(prompt)}

    def _encode(self, base: str, beside: Sequence[str]) -> Text:
        with self.bypassed():
            return map_text(lambda part: part.detach().cpu(), self.host.encode([base], beside=beside))

    @torch.no_grad()
    def distances(self, text: BatchText) -> Tensor:
        """`w_p` for every base phrase, `[B, P]` (`sfcm.semantic_distance`); 0 where a sample has no such phrase."""
        count = text.present.shape[1] - 1
        weights = torch.zeros(len(text.prompts), count)
        for i, prompt in enumerate(text.prompts):
            if prompt.has_target and prompt.phrases:
                phrases = torch.stack([self.vector(p) for p in prompt.phrases])
                anchors = torch.stack([self.vector(a) for a in ANCHORS])
                weights[i, : len(phrases)] = sfcm.semantic_distance(phrases, self.vector(prompt.target), anchors)
        return weights.to(text.present.device) * text.present[:, :count]

    @torch.no_grad()
    def vector(self, phrase: str) -> Tensor:
        """The pooled embedding of a phrase alone, `[E]`, by the untrained text encoder; on the CPU."""

        def make() -> Tensor:
            with self.bypassed():
                text = self.host.encode([phrase])
            nothing = Prompt(()).behind(self.host.prefix)
            start = self.family.spans(nothing, self.host.tokenize, self.family.length(text), full=True).end
            return vectors(text, start, [1 + len(self.host.tokenize(phrase))])[0].float().cpu()

        return self._vectors.get_or(phrase, make)
