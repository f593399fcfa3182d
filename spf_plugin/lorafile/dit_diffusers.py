"""The rules of diffusers' `load_lora_weights` for diffusion transformers.

Run in 0.32.1 and 0.35.2 (`tests/lorafile/dit_programs.py`), read in 58eb52c0 of 2026-08-23 (loaders/lora_pipeline.py,
lora_conversion_utils.py).
"""

from __future__ import annotations

from spf_plugin.lorafile import diffusers_rules, musubi_rules
from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.diffusers_rules import Strength, wrong_strengths
from spf_plugin.lorafile.findings import Finding, some
from spf_plugin.lorafile.inspect import Contents, Description
from spf_plugin.lorafile.musubi_names import MUSUBI_BASES
from spf_plugin.lorafile.names import BASE_LABEL, DitBase

TO_PEFT, TO_COMFYUI, TO_DIFFUSERS = (f"spf lora convert --to {name}" for name in ("peft", "comfyui", "diffusers"))
_FLUX = ("flux", "chroma")  # both through FLUX.1's loader
_SINCE = {"anima": "June 2026", "lumina": "0.33 (2025)", "chroma": "0.34 (2025)"}
_MISFIT = "a size mismatch that stops loading"


def diffusers(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    label = BASE_LABEL[base]
    if base == "hunyuan_image":
        return [Finding("fail", "base", f"Its pipeline of {label} loads no LoRA.", "use ComfyUI")]
    if base in MUSUBI_BASES:
        return musubi_rules.diffusers(contents, description, base, lambda: _own(contents, description, base))
    out = []
    if base in _SINCE:
        out.append(Finding("note", "release", f"Releases before {_SINCE[base]} have no loader for {label}."))
    kohya = [g.name for g in description.groups if g.name.startswith(("lora_unet_", "lora_te"))]
    if base in _FLUX and any(key.endswith(".lora_down.weight") for key in contents.tensors):
        return out + _flux_of_others(contents, description, base, kohya)
    if kohya:
        text = f"Loads nothing, with at most a warning: it converts no kohya names for {label}, e.g. {some(kohya, 1)}."
        return [*out, Finding("fail", "names", text, TO_PEFT if base == "anima" else TO_DIFFUSERS)]
    if base == "anima":
        return out + _anima(contents, description)
    if base == "lumina" and all(key.startswith("diffusion_model.") for key in contents.tensors):
        return out + _lumina(description)
    return out + _own(contents, description, base)


def _own(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    """diffusers' names, or what it does not know."""
    nameless = [key for key in contents.tensors if "lora" not in key]
    if nameless and (base not in _FLUX or len(nameless) == len(contents.tensors)):
        text = f"“Invalid LoRA checkpoint”: {some(nameless)} does not say lora in its name."
        fix = "" if any(group.algorithm != "LoRA" for group in description.groups) else TO_DIFFUSERS
        return [Finding("fail", "prefix", text, fix)]
    parts = ("transformer.", "text_encoder.") + (("text_encoder_2.",) if base == "sd3" else ())
    foreign = [key for key in contents.tensors if not key.startswith(parts)]
    if len(foreign) == len(contents.tensors):
        text = f"Loads nothing: {some(foreign, 1)} starts with no component of its pipeline."
        return [Finding("fail", "prefix", text, TO_DIFFUSERS)]
    if named := [key for key in contents.tensors if ".default." in key]:
        text = f"The adapter's name inside {some(named, 1)} is taken for a module's: nothing is applied."
        return [Finding("fail", "prefix", text, TO_DIFFUSERS)]
    if mixed := [key for key in contents.tensors if key.endswith((".lora_down.weight", ".lora_up.weight"))]:
        text = f"lora_down and lora_up under its own names stop loading: {some(mixed, 1)}."
        return [Finding("fail", "crossed-names", text, TO_DIFFUSERS)]
    out = []
    lost = foreign + [k for g in description.groups if g.resolved is None for k in g.keys.values() if k not in foreign]
    if lost:
        out.append(Finding("warn", "names", f"{len(lost)} tensors are left out: {some(lost)}."))
    out += _strengths(contents, description, base)
    return out + f.wrong_shapes(description, "fail", _MISFIT)


def _strengths(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    wrong = wrong_strengths(
        Strength(
            g.name,
            "unet",  # alphas of their own are right here, in every component
            contents.tensors[g.keys["lora_down.weight"]].shape[0],
            contents.alphas.get(g.name),
        )
        for g in description.groups
        if g.resolved and {"lora_down.weight", "lora_up.weight"} <= set(g.keys)
    )
    if base in _SINCE or base in MUSUBI_BASES:
        wrong["0.32"] = []  # no loader there
    if base in ("zimage", "flux2"):  # of which 0.36 is the first, and does as 0.35 does with others
        wrong["0.36"] = wrong.pop("0.35")
    elif base == "krea2":
        wrong["0.35"] = []
    return diffusers_rules.mixed(wrong, TO_DIFFUSERS)


def _flux_of_others(contents: Contents, description: Description, base: DitBase, kohya: list[str]) -> list[Finding]:
    """What FLUX.1's loader takes for kohya's because one key ends in lora_down.weight."""
    if len(kohya) == len(description.groups) and base == "flux":
        t5 = [g.name for g in description.groups if g.resolved and g.resolved.module.component == "te3"]
        if t5:
            text = f"0.32 stops at modules of T5 ({some(t5, 1)}), later releases leave them out."
            return [Finding("fail", "text-encoder", text, "train without T5, or use ComfyUI")]
        bare = [g.name for g in description.groups if "lora_down.weight" in g.keys and "alpha" not in g.keys]
        if bare:
            text = f"0.32 stops where an alpha is missing: {some(bare, 1)}."
            return [Finding("fail", "alpha", text, f"{f.FIX}, which adds it")]
    if len(kohya) == len(description.groups):
        return f.wrong_shapes(description, "fail", _MISFIT)
    odd = [group.name for group in description.groups if group.name not in kohya]
    never = ""  # what no release does
    if odd[0].startswith("lora_transformer_"):
        if rest := [name for name in odd if "_attn_" not in name]:
            never = f"OneTrainer's names outside attention stop with a KeyError: {some(rest, 1)}."
    elif not odd[0].startswith(("transformer.", "diffusion_model.")):
        never = f"{odd[0]} is taken for kohya's, as its factors are lora_down and lora_up, and stops loading."
    if never:
        return [Finding("fail", "names", never, TO_DIFFUSERS)]
    if base == "flux":
        text = f"0.32 stops: {odd[0]} is taken for kohya's, as its factors are lora_down and lora_up."
        return [Finding("fail", "names", text, TO_DIFFUSERS)]
    if odd[0].startswith("transformer.") and contents.alphas:
        text = "Every alpha is left out, as lora_down and lora_up under its own names are taken for PEFT's factors."
        return [Finding("warn", "alpha-dropped", text, TO_DIFFUSERS)]
    return []


def _lumina(description: Description) -> list[Finding]:
    """ComfyUI's names, which its loader converts block by block."""
    blocks: dict[str, set[str]] = {}
    for group in description.groups:
        part, number, rest = (*group.name.removeprefix("diffusion_model.").split(".", 2), "", "")[:3]
        blocks.setdefault(f"{part}.{number}", set()).add(rest)
    wanted = {"attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    odd = [g.name for g in description.groups if not g.resolved or g.format != "peft" or "alpha" in g.keys]
    for block, have in blocks.items():
        if have != (wanted if block.startswith("context") else wanted | {"adaLN_modulation.1"}):
            odd.append(block)
    if not odd:
        return f.wrong_shapes(description, "fail", _MISFIT)
    text = f"Its conversion of ComfyUI's names wants every module of a block, as lora_A and lora_B: {some(odd)}."
    return [Finding("fail", "names", text, TO_DIFFUSERS)]


def _anima(contents: Contents, description: Description) -> list[Finding]:
    alphas = [key for key in contents.tensors if "lora" not in key]
    if alphas:
        text = f"“Invalid LoRA checkpoint”: {some(alphas)} does not say lora in its name."
        return [Finding("fail", "prefix", text, TO_PEFT)]
    unknown = [group.name for group in description.groups if group.resolved is None]
    out = [Finding("warn", "names", f"{len(unknown)} modules are left out: {some(unknown)}.")] if unknown else []
    return out + f.wrong_shapes(description, "fail", _MISFIT)
