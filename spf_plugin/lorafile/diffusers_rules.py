"""The rules of diffusers' `load_lora_weights` for SD1, SD2 and SDXL, as one pure function.

Read in 0.32.1 and 0.42.1 (loaders/lora_pipeline.py, lora_conversion_utils.py, utils/peft_utils.py). The tests run the
installed diffusers on the same files and compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.findings import FIX, Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, Group
from spf_plugin.lorafile.names import Resolved

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
PROJECTION = "lora_te2_text_projection"  # OneTrainer's; of SDXL, whose second text encoder has that layer
_MERGE = "use A1111, Forge or ComfyUI, or convert it to a LoRA with LyCORIS"


def diffusers(contents: Contents, description: Description) -> list[Finding]:
    """What diffusers does with the file."""
    other = f.unlisted(description)
    if other is not None:
        return other
    foreign = [key for key in contents.tensors if not key.startswith(_PREFIXES)]
    if len(foreign) == len(contents.tensors):
        return _own_format(contents, description)
    if foreign:
        if all("lora" in key for key in contents.tensors):
            text = f"Loads nothing at all, with only warnings: {some(foreign)} has a foreign prefix."
        else:
            text = f"“Invalid LoRA checkpoint”: {some(foreign)} has a foreign prefix."
        return [Finding("fail", "prefix", text, FIX)]
    return _kohya(contents, description)


def _own_format(contents: Contents, description: Description) -> list[Finding]:
    """Files in diffusers' own or peft's naming."""
    first = next(iter(contents.tensors))
    if not all("lora" in key for key in contents.tensors):
        odd = [key for key in contents.tensors if "lora" not in key]
        return [Finding("fail", "prefix", f"“Invalid LoRA checkpoint”: {some(odd)}.", FIX)]
    if not all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in contents.tensors):
        return [Finding("fail", "prefix", f"Loads nothing: {first} starts with no known component.", FIX)]
    named = [key for key in contents.tensors if ".lora_A.default." in key or ".lora_B.default." in key]
    if named:
        return [Finding("fail", "prefix", f"The adapter's name inside {some(named, 1)} stops loading.", FIX)]
    return _alphas(contents, description) + _text_note(description)


def _kohya(contents: Contents, description: Description) -> list[Finding]:
    out = []
    if "lora_adapter_metadata" in contents.metadata and contents.alphas:
        text = "Recent releases refuse lora_adapter_metadata beside alphas (ValueError)."
        out.append(Finding("fail", "adapter-metadata", text, FIX))
    stray, half = [], f.half_pairs(description)
    for group in description.groups:
        if f.alone(group):
            half.append(group.name)
        allowed = {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"}
        if "lora_down.weight" not in group.keys:
            allowed = set()
        stray += [key for suffix, key in group.keys.items() if suffix not in allowed]
    crossed = [g.name for g in description.groups if g.format == "peft"]
    if crossed:
        text = f"lora_A and lora_B under kohya's names stop loading: {some(crossed)}."
        out.append(Finding("fail", "crossed-names", text, FIX))
    elif half:
        text = f"Stops with a KeyError: {some(half)} has half its factors."
        out.append(Finding("fail", "no-pair", text, "save the missing tensors"))
    elif stray:
        tucker = all(key.endswith((".lora_mid.weight", "lora_down.weight", "lora_up.weight")) for key in stray)
        text = f"“keys have not been correctly renamed”: {len(stray)} tensors it cannot read, {some(stray)}."
        out.append(Finding("fail", "algorithm", text, FIX if tucker else _MERGE))
    out += _names(description)
    out += _shapes(contents, description)
    if any("dora_scale" in g.keys for g in description.groups):
        text = "DoRA scales are dropped with a warning and plain LoRA is loaded: a different image."
        out.append(Finding("warn", "dora", text, "train without DoRA for diffusers"))
    out += _alphas(contents, description) + _half_encoders(description)
    out += f.wrong_shapes(description, "fail", "a size mismatch that stops loading")
    return out + _text_note(description)


def never_mapped(resolved: Resolved) -> bool:
    """conv_in, conv_out, time_embedding ...: kohya never writes them, LyCORIS does, diffusers maps none."""
    return resolved.style == "diffusers" and resolved.module.group == "extra"


def _names(description: Description) -> list[Finding]:
    out = []
    styles = Counter(g.resolved.style for g in description.groups if g.resolved)
    sgm = [g for g in description.groups if g.resolved and g.resolved.style == "sgm"]
    if styles["sgm"] and styles["diffusers"]:
        text = f"Two naming styles are mixed: the {styles['sgm']} modules with original (SGM) names are dropped in "
        text += "silence, and 0.32 stops with an error."
        out.append(Finding("fail", "mixed-names", text, FIX))
    elif sgm and description.base != "sdxl":
        text = f"SGM names ({len(sgm)}) are mapped for SDXL only and stop loading."
        out.append(Finding("fail", "sgm-names", text, FIX))
    elif outside := [g.name for g in sgm if g.resolved and g.resolved.module.group == "extra"]:
        text = f"{some(outside)} is outside the blocks and stops the SGM conversion with an error."
        out.append(Finding("fail", "sgm-names", text, "train without these layers"))
    flat = [g.name for g in description.groups if g.resolved and "_te" in g.name and "text_model" not in g.name]
    if flat:
        text = f"{len(flat)} text-encoder names lack text_model ({some(flat, 1)}): left out, or an IndexError."
        out.append(Finding("fail", "text-names", text, FIX))
    unknown = [g.name for g in description.groups if g.resolved is None and g.name != PROJECTION]
    lost = unknown + [g.name for g in description.groups if g.resolved and never_mapped(g.resolved)]
    if len(lost) == len(description.groups):
        out.append(Finding("fail", "names", "No name is known: nothing is applied.", FIX))
    elif lost:
        fix = FIX if unknown else "train without these layers"
        out.append(Finding("warn", "names", f"“unexpected keys”: {len(lost)} modules left out, {some(lost)}.", fix))
    return out


def without_output(paths: Iterable[str]) -> bool:
    """Whether a text encoder's modules hold attention but no `out_proj`, by which diffusers knows kohya's names."""
    ends = {path.rpartition(".")[2] for path in paths if ".self_attn." in path}
    return bool(ends) and "out_proj" not in ends


def _half_encoders(description: Description) -> list[Finding]:
    out = []
    for component in ("te1", "te2"):
        groups = [g.resolved.module for g in description.groups if g.resolved]
        paths = [m.path for m in groups if m.component == component]
        if not without_output(paths):
            continue
        if any(".mlp." in path for path in paths):
            text = "A text encoder's q, k, v are left out, as no out_proj is there."
            out.append(Finding("warn", "half-attention", text, FIX))
        else:
            text = "A text encoder with attention but no out_proj stops loading."
            out.append(Finding("fail", "half-attention", text, FIX))
    return out


def _shapes(contents: Contents, description: Description) -> list[Finding]:
    """Linear needs 2-D factors, Conv2d 4-D ones; everyone else reshapes."""
    wrong = []
    for group in description.groups:
        if group.resolved is None or not {"lora_down.weight", "lora_up.weight"} <= set(group.keys):
            continue
        wanted = 2 if group.resolved.module.kind == "linear" else 4
        if any(len(contents.tensors[group.keys[s]].shape) != wanted for s in ("lora_down.weight", "lora_up.weight")):
            wrong.append(group.name)
    if not wrong:
        return []
    text = (
        f"Size mismatch in {len(wrong)} modules, nothing loads: {some(wrong)} (Linear needs 2-D factors, Conv2d 4-D)."
    )
    return [Finding("fail", "dimensions", text, FIX)]


def _component(group: Group) -> str:
    return group.resolved.module.component if group.resolved else "unet"


def misread(component: str, name: str) -> bool:
    """Whether diffusers loses the module's own alpha: attention projections of the UNet, all of a text encoder."""
    return component != "unet" or any(p in name for p in ("_to_q", "_to_k", "_to_v", "_to_out_0"))


@dataclass(frozen=True)
class Strength:
    """What diffusers takes a module's strength from.

    Attributes:
        name: of the module.
        component: ``unet``, ``te1`` or ``te2``.
        rank: of its factors.
        alpha: as stored, None where there is none.
    """

    name: str
    component: str
    rank: int
    alpha: float | None


def wrong_strengths(modules: Iterable[Strength]) -> dict[str, list[str]]:
    """Release of diffusers -> names of the modules to which it gives another strength than (alpha or rank) / rank."""
    out: dict[str, list[str]] = {"0.32": [], "0.35": [], "0.42": []}
    parts: dict[str, list[Strength]] = {}
    for module in modules:
        parts.setdefault(module.component, []).append(module)
    for component, group in parts.items():
        ranks = Counter(m.rank for m in group)
        alphas = Counter(m.alpha for m in group if m.alpha is not None)
        if alphas:
            majority = alphas.most_common(1)[0][0]
            wrong = [
                m.name
                for m in group
                if (m.rank != majority if m.alpha is None else m.alpha != majority and misread(component, m.name))
            ]
            out["0.35"] += wrong
            out["0.42"] += wrong
            # that release leaves every alpha out once ranks differ
            differ = [m.name for m in group if m.alpha is not None and m.alpha != m.rank]
            out["0.32"] += differ if len(ranks) > 1 else wrong
        else:
            out["0.35"] += [m.name for m in group if m.rank != ranks.most_common(1)[0][0]]
    return out


def alphas_for(modules: Sequence[Strength], target: float) -> dict[str, float] | None:
    """The alphas that all modules of a file shall get: `target`, or all their ranks.

    Returns:
        Module -> alpha; None where either would give some release more modules of the wrong strength than the stored.
    """

    def wrong(alphas: Mapping[str, float]) -> dict[str, int]:
        found = wrong_strengths(replace(m, alpha=alphas[m.name]) for m in modules)
        return {release: len(names) for release, names in found.items()}

    constant = {m.name: target for m in modules}
    if len({m.rank for m in modules}) == 1:
        return constant
    before = {release: len(names) for release, names in wrong_strengths(modules).items()}
    own = {m.name: float(m.rank) for m in modules}
    good = [plan for plan in (constant, own) if all(n <= before[release] for release, n in wrong(plan).items())]
    return min(good, key=lambda plan: sum(wrong(plan).values()), default=None)


def _alphas(contents: Contents, description: Description) -> list[Finding]:
    """Modules that get another strength than their own, and in which release."""
    factors = {"lora_down.weight", "lora_up.weight"}
    wrong = wrong_strengths(
        Strength(
            g.name,
            _component(g),
            contents.tensors[g.keys["lora_down.weight"]].shape[0],
            contents.alphas.get(g.name),
        )
        for g in description.groups
        if g.resolved and factors <= set(g.keys) and contents.tensors[g.keys["lora_down.weight"]].shape
    )
    return mixed(wrong, FIX)


def mixed(wrong: Mapping[str, Sequence[str]], fix: str) -> list[Finding]:
    """What is said of `wrong_strengths`; `fix` mends it."""
    always = [name for name in wrong["0.42"] if all(name in set(names) for names in wrong.values())]
    out = []
    if always:
        text = f"{len(always)} modules get another module's alpha and so the wrong strength: {some(always)}."
        out.append(Finding("warn", "mixed-alpha", text, fix))
    releases: dict[tuple[str, ...], list[str]] = {}
    for release, names in wrong.items():
        releases.setdefault(tuple(name for name in names if name not in set(always)), []).append(release)
    right = " and ".join(releases.pop((), []))
    for only, named in releases.items():
        text = f"Ranks differ between modules: diffusers {' and '.join(named)} give {len(only)} modules the wrong "
        text += f"strength ({some(only, 1)})" + (f"; right in {right}." if right else ".")
        more = f"{fix} --one-rank" if fix == FIX else fix
        out.append(Finding("warn", "mixed-rank", text, f"{more}, or another diffusers"))
    return out


def _text_note(description: Description) -> list[Finding]:
    if any(description.components[c] for c in ("te1", "te2")):
        return []
    return [Finding("note", "unet-only", "UNet only: one harmless “No LoRA keys associated” warning per text encoder.")]
