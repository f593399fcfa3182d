"""Findings of the loader rules and the checks that are the same for every loader."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import names
from spf_plugin.lorafile.inspect import Contents, Description, Group, metadata_base
from spf_plugin.lorafile.names import BASE_LABEL

Level = Literal["note", "warn", "fail"]
Status = Literal["loads", "differs", "fails"]

FIX = "spf lora fix"

_OTHER_KINDS = (
    ("an embedding (textual inversion)", "use it as an embedding", r"emb_params|string_to_param\b.*|clip_[lg]"),
    (
        "a whole model",
        "use it as the base model",
        r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|model_ema)\..*",
    ),
    ("a ControlNet", "use it as a ControlNet", r"(control_model|controlnet_\w+)\..*"),
)
# Factors of which one is nothing without the others.
_TOGETHER = (
    {"lora_up.weight", "lora_down.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1_a", "lokr_w1_b"},
    {"lokr_w2_a", "lokr_w2_b"},
)
LOHA_FACTORS = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


@dataclass(frozen=True)
class Finding:
    """One thing a loader does with a file that its author did not mean.

    Attributes:
        level: ``note`` harmless; ``warn`` part of the LoRA is lost or weighted wrongly; ``fail`` nothing is applied,
            or an error.
        code: Short stable name, for scripts.
        message: What happens, for people.
        fix: What to do; empty where nothing can be done to the file.
    """

    level: Level
    code: str
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Verdict:
    """How one loader takes a file."""

    loader: str
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """``fails`` with any failing finding, ``differs`` with any warning, else ``loads``."""
        levels = {f.level for f in self.findings}
        return "fails" if "fail" in levels else "differs" if "warn" in levels else "loads"

    def worse_than(self, other: Verdict) -> bool:
        """Whether this status is worse than the other's."""
        order = ("loads", "differs", "fails")
        return order.index(self.status) > order.index(other.status)


def taken(results: Sequence[Verdict]) -> str:
    """Which programs take a file as it is, and which do not, in a sentence or two."""
    good = [verdict.loader for verdict in results if verdict.status == "loads"]
    bad = [verdict.loader for verdict in results if verdict.status != "loads"]
    out = f"Loads as it is in {', '.join(good)}." if good else ""
    return f"{out} Not as meant in {', '.join(bad)}: spf lora check says why.".strip() if bad else out


def some(items: Sequence[str], limit: int = 2) -> str:
    """The first few of a list of names and how many more there are."""
    shown = ", ".join(f"{i[:77]}..." if len(i) > 80 else i for i in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def unmatched(contents: Contents, group: Group) -> bool:
    """Whether the factors of a LoRA module fit no product: up [o, r, ...], down [r, i, ...], core [r, r, h, w]."""
    if not {"lora_up.weight", "lora_down.weight"} <= set(group.keys):
        return False
    up, down = (contents.tensors[group.keys[s]].shape for s in ("lora_up.weight", "lora_down.weight"))
    if len(up) not in (2, 4) or len(down) not in (2, 4) or 0 in up + down:
        return True
    if "lora_mid.weight" in group.keys:
        mid = contents.tensors[group.keys["lora_mid.weight"]].shape
        return len(mid) != 4 or mid[:2] != (up[1], down[0]) or (len(down) == 4 and down[2:] != (1, 1))
    return up[1] != down[0]


def odd_alphas(contents: Contents) -> list[str]:
    """Alphas that are not one number."""
    return [key for key, info in contents.tensors.items() if key.endswith(".alpha") and math.prod(info.shape) != 1]


def _incomplete(description: Description) -> list[str]:
    """Modules that lack one of their factors."""
    return [
        group.name
        for group in description.groups
        if any(0 < len(factors & set(group.keys)) < len(factors) for factors in _TOGETHER)
        or ("lora_mid.weight" in group.keys and "lora_up.weight" not in group.keys)
    ]


def refuse_damaged(contents: Contents, description: Description) -> None:
    """Stop at what no mending could make a LoRA of.

    Raises:
        SPFError: NaN or infinity, factors that are missing or do not multiply, or an alpha that is not one number.
    """
    if contents.non_finite:
        raise SPFError(
            f"NaN or infinity in {len(contents.non_finite)} tensors ({some(contents.non_finite)}): this LoRA would "
            "give black images. Nothing was saved; train again at a lower learning rate or in bf16."
        )
    broken = [g.name for g in description.groups if unmatched(contents, g)]
    if broken:
        raise SPFError(f"lora_up and lora_down do not multiply in {some(broken)}. The file is damaged: save it again.")
    missing = _incomplete(description)
    if missing:
        raise SPFError(f"a factor is missing in {some(missing)}. The file is damaged: download or save it again.")
    odd = odd_alphas(contents)
    if odd:
        raise SPFError(f"the alpha is not one number in {some(odd)}. The file is damaged: download or save it again.")


def advised(contents: Contents, description: Description, findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings, with `spf lora fix` advised only where it mends something."""
    try:
        refuse_damaged(contents, description)
    except SPFError:
        return tuple(replace(finding, fix="") if finding.fix == FIX else finding for finding in findings)
    base = description.base
    if base not in ("sd1", "sd2", "sdxl"):
        return tuple(findings)
    unknown = [group for group in description.groups if group.resolved is None]
    renamed = any(
        group.format != "kohya" or group.name != names.kohya_name(base, group.resolved.module)
        for group in description.groups
        if group.resolved is not None
    )
    if not unknown or renamed:
        return tuple(findings)
    bundled = any(group.name == "bundle_emb" for group in unknown)
    instead = "keep the embedding in a file of its own" if bundled else ""
    unmended = ("names", "prefix")
    return tuple(replace(f, fix=instead) if f.fix == FIX and f.code in unmended else f for f in findings)


def incomplete_attention(description: Description, component: str) -> list[str]:
    """Text-encoder layers of `component` whose q, k, v, out are neither all present nor all absent."""
    layers: dict[str, set[str]] = {}
    for group in description.groups:
        module = group.resolved.module if group.resolved else None
        if module is not None and module.component == component and ".self_attn." in module.path:
            layer, _, part = module.path.rpartition(".")
            layers.setdefault(layer, set()).add(part)
    return [layer for layer, parts in layers.items() if len(parts) < 4]


def common(contents: Contents, description: Description) -> list[Finding]:
    """Findings that hold for every loader."""
    out = []
    if not description.groups:
        return [Finding("fail", "empty", "The file holds no tensors.")]
    if contents.non_finite:
        keys = some(contents.non_finite)
        out.append(
            Finding("fail", "non-finite", f"NaN or infinity in {keys}: black images.", "train again at a lower rate")
        )
    broken = [g.name for g in description.groups if unmatched(contents, g)]
    if broken:
        text = f"lora_up and lora_down do not multiply in {some(broken)}."
        out.append(Finding("fail", "factors", text, "download or save it again"))
    odd = odd_alphas(contents)
    if odd:
        out.append(
            Finding("fail", "alpha", f"The alpha is not one number in {some(odd)}.", "download or save it again")
        )
    # OFT keeps its constraint in alpha, where 0 means none.
    scaled = [g.name for g in description.groups if g.algorithm not in ("OFT", "unknown") and g.name in contents.alphas]
    zero = [name for name in scaled if contents.alphas[name] == 0.0]
    if zero and len(zero) == len(scaled):
        out.append(Finding("fail", "alpha-zero", "Every alpha is 0, so every delta is 0.", "train again, alpha > 0"))
    elif zero:
        out.append(Finding("warn", "alpha-zero", f"Alpha is 0 in {len(zero)} modules, which then do nothing."))
    ups = [g.keys["lora_up.weight"] for g in description.groups if "lora_up.weight" in g.keys]
    if ups and len(ups) == len(description.groups) and contents.zero.issuperset(ups):
        out.append(Finding("fail", "all-zero", "Every lora_up is zero: it was never trained.", "train it"))
    return out


def card(contents: Contents, description: Description, shown: str, label: str, hides: bool) -> list[Finding]:
    """Findings about the WebUI card.

    Args:
        contents: The file.
        description: What it is.
        shown: Base that the WebUI reads from the metadata; ``unknown`` is never hidden.
        label: What the filter is called.
        hides: Whether that filter is on by default.
    """
    out = []
    if not contents.opens_with_quote:
        text = 'The header does not start with {", so the metadata is not read.'
        out.append(Finding("warn", "header-start", text, FIX))
    if contents.metadata.get("ss_output_name", "").startswith("{"):
        text = "ss_output_name starts with '{' and is read as JSON: listing the LoRA folder stops with an error."
        out.append(Finding("fail", "output-name", text, FIX))
    if not _counts(contents.metadata.get("ss_tag_frequency", "")):
        text = "ss_tag_frequency is not {dataset: {tag: count}}: the card's edit dialog stops with an error."
        out.append(Finding("note", "tags", text, "remove ss_tag_frequency"))
    base = description.base
    if shown not in ("unknown", base) and base in ("sd1", "sd2", "sdxl"):
        text = f"Its card is filed under {BASE_LABEL[shown]} although the tensors are {BASE_LABEL[base]}"
        text += f"; {label} hides it." if hides else "."
        out.append(Finding("warn" if hides else "note", "card", text, FIX))
    return out


@lru_cache(maxsize=1)  # two loaders ask, and the text may have megabytes
def _counts(text: str) -> bool:
    """Whether the WebUI can add up the tags: it decodes what starts with a brace and calls int on every count."""
    if not text.startswith("{"):
        return True
    try:
        return all(int(n) >= 0 for tags in json.loads(text).values() for n in tags.values())
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # int() of an infinite number too
        return False


def wrong_base_metadata(contents: Contents, description: Description) -> bool:
    """Whether the metadata names another base than the tensors show."""
    told = metadata_base(contents.metadata)
    return description.evidence in ("shapes", "names") and told not in ("unknown", description.base)


def wrong_shapes(description: Description, level: Level, consequence: str) -> list[Finding]:
    """Modules whose shape is not the base model's, with what the loader then does."""
    if not description.misshaped:
        return []
    text = f"{len(description.misshaped)} modules do not fit {BASE_LABEL[description.base]} and are {consequence}: "
    return [Finding(level, "shapes", text + some(description.misshaped) + ".", "train for one base model")]


def trained(description: Description, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that some algorithm trained: the others (notes, counters) are missed by nobody."""
    idle = {k for g in description.groups if g.algorithm == "unknown" and not g.resolved for k in g.keys.values()}
    return [key for key in keys if key not in idle]


def alone(group: Group) -> bool:
    """Whether a module has a down but no up factor: no program applies it."""
    return "lora_down.weight" in group.keys and "lora_up.weight" not in group.keys


def half_pairs(description: Description) -> list[str]:
    """Modules with an up but no down factor: a KeyError in ComfyUI, Forge and diffusers."""
    return [g.name for g in description.groups if "lora_up.weight" in g.keys and "lora_down.weight" not in g.keys] + [
        g.name for g in description.groups if "hada_w1_a" in g.keys and not set(g.keys) >= LOHA_FACTORS
    ]


def other_kind(description: Description) -> tuple[str, str]:
    """What a file is that holds no LoRA module of any kind, and what it is good for; empty where it holds one."""
    if any(group.algorithm != "unknown" for group in description.groups):
        return "", ""
    keys = [key for group in description.groups for key in group.keys.values()]
    for kind, use, pattern in _OTHER_KINDS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return kind, use
    return "no LoRA", ""


def unlisted(description: Description) -> list[Finding] | None:
    """Answer where no table has the names."""
    if description.base == "unknown":
        kind, use = other_kind(description)
        if kind:
            return [Finding("fail", "no-lora", f"This is {kind}: nothing is applied.", use)]
        return [
            Finding("fail", "names", "No name in the file belongs to a model that is known here: nothing is applied.")
        ]
    return None
