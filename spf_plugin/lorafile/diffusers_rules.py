"""The rules of diffusers' `load_lora_weights` for SD1, SD2 and SDXL, as one pure function.

Read in 0.32.1 and 0.42.1 (loaders/lora_pipeline.py, lora_conversion_utils.py, utils/peft_utils.py). The tests run the
installed diffusers on the same files and compare.
"""

from __future__ import annotations

from collections import Counter

from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.findings import FIX, Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, Group
from spf_plugin.lorafile.names import Resolved

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
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
    return _text_note(description)


def _kohya(contents: Contents, description: Description) -> list[Finding]:
    out = []
    if "lora_adapter_metadata" in contents.metadata and contents.alphas:
        text = "Recent releases refuse lora_adapter_metadata beside alphas (ValueError)."
        out.append(Finding("fail", "adapter-metadata", text, FIX))
    stray, half = [], f.half_pairs(description)
    for group in description.groups:
        if "lora_down.weight" in group.keys and "lora_up.weight" not in group.keys:
            half.append(group.name)
        allowed = {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"}
        if "lora_down.weight" not in group.keys:
            allowed = set()
        stray += [key for suffix, key in group.keys.items() if suffix not in allowed]
    if half:
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
    out += _alphas(contents, description)
    out += f.wrong_shapes(description, "fail", "a size mismatch that stops loading")
    return out + _text_note(description)


def _never_mapped(resolved: Resolved) -> bool:
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
        text = f"SGM names ({len(sgm)}) are mapped for SDXL only: these modules are left out."
        out.append(Finding("fail" if len(sgm) == styles.total() else "warn", "sgm-names", text, FIX))
    elif outside := [g.name for g in sgm if g.resolved and g.resolved.module.group == "extra"]:
        text = f"{some(outside)} is outside the blocks and stops the SGM conversion with an error."
        out.append(Finding("fail", "sgm-names", text, "train without these layers"))
    flat = [g.name for g in description.groups if g.resolved and "_te" in g.name and "text_model" not in g.name]
    if flat:
        text = f"{len(flat)} text-encoder names lack text_model ({some(flat, 1)}): left out, or an IndexError."
        out.append(Finding("fail", "text-names", text, FIX))
    unknown = [g.name for g in description.groups if g.resolved is None]
    lost = unknown + [g.name for g in description.groups if g.resolved and _never_mapped(g.resolved)]
    if len(lost) == len(description.groups):
        out.append(Finding("fail", "names", "No name is known: nothing is applied.", FIX))
    elif lost:
        fix = FIX if unknown else "train without these layers"
        out.append(Finding("warn", "names", f"“unexpected keys”: {len(lost)} modules left out, {some(lost)}.", fix))
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


def _misread(group: Group) -> bool:
    """Whether diffusers loses the module's own alpha: attention projections of the UNet, all of a text encoder."""
    return _component(group) != "unet" or any(p in group.name for p in ("_to_q", "_to_k", "_to_v", "_to_out_0"))


def _alphas(contents: Contents, description: Description) -> list[Finding]:
    """Modules whose alpha differs from the majority's get the majority's."""
    out = []
    wrong: list[str] = []
    mixed_ranks = []
    for component in ("unet", "te1", "te2"):
        pairs = [g for g in description.groups if {"lora_down.weight", "lora_up.weight"} <= set(g.keys)]
        groups = [g for g in pairs if _component(g) == component]
        ranks = {contents.tensors[g.keys["lora_down.weight"]].shape[0] for g in groups}
        values = Counter(contents.alphas[g.name] for g in groups if g.name in contents.alphas)
        if len(ranks) > 1 and values and any(alpha not in ranks for alpha in values):
            mixed_ranks.append(component)
        if not values:
            continue  # no alpha at all is read as alpha = rank, by everyone
        majority = values.most_common(1)[0][0]
        for group in groups:
            alpha = contents.alphas.get(group.name)
            if alpha is None:
                # taken as the majority's, though everyone else reads it as the rank
                rank = contents.tensors[group.keys["lora_down.weight"]].shape[0]
                if rank != majority:
                    wrong.append(group.name)
            elif alpha != majority and _misread(group):
                wrong.append(group.name)
    if wrong:
        text = f"{len(wrong)} modules get another module's alpha and so the wrong strength: {some(wrong)}."
        out.append(Finding("warn", "mixed-alpha", text, FIX))
    if mixed_ranks:
        text = "Ranks differ between modules: diffusers 0.32 (not 0.33 and later) then ignores alpha."
        out.append(Finding("note", "mixed-rank", text, "upgrade diffusers, or spf lora fix --one-rank"))
    return out


def _text_note(description: Description) -> list[Finding]:
    if any(description.components[c] for c in ("te1", "te2")):
        return []
    return [Finding("note", "unet-only", "UNet only: one harmless “No LoRA keys associated” warning per text encoder.")]
