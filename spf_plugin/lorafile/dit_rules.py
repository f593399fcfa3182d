"""What each loader does with LoRA files of diffusion transformers.

Read in ComfyUI 17358c8f (comfy/lora.py), diffusers 58eb52c0 of 2026-08-23 (loaders/lora_pipeline.py,
lora_conversion_utils.py), Forge dfdcbab6 (backend/diffusion_engine), stable-diffusion.cpp 97d29908 (src/model.h),
A1111 1.10.1; re-stated, not run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from spf_plugin.lorafile import dit_names
from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.findings import Finding, some
from spf_plugin.lorafile.inspect import Contents, Description
from spf_plugin.lorafile.names import BASE_LABEL, DitBase

TO_PEFT, TO_COMFYUI = "spf lora convert --to peft", "spf lora convert --to comfyui"
_FORGE = ("flux", "chroma", "sd3")
_SDCPP = ("flux", "chroma", "sd3", "anima")


@cache
def comfy_ids(base: DitBase) -> frozenset[str]:
    """Module names that ComfyUI maps, by its rules for every model: the checkpoint's paths, generic or kohya's."""
    out = set()
    for module in dit_names.modules(base):
        out.add(dit_names.kohya_name(base, module, original=True))
        if module.component == "unet":
            out.add(f"diffusion_model.{module.sgm}")
        elif module.sgm.startswith("text_model."):
            out.add(f"{'text_encoder' if module.component == 'te1' else 'text_encoder_2'}.{module.sgm}")
    return frozenset(out)


def comfyui(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    half = f.half_pairs(description)
    if half:
        return [Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors.")]
    groups = [group for group in description.groups if group.name not in comfy_ids(base)]
    # Models whose modules diffusers splits or joins have a table of diffusers' names, which is not known here.
    theirs = [group for group in groups if base not in ("anima", "hunyuan_image") and _is_diffusers(group.name)]
    lost = [group.name for group in groups if group not in theirs]
    out = []
    if theirs:
        text = f"{len(theirs)} modules have diffusers' names, which it maps for {BASE_LABEL[base]}; not checked here."
        out.append(Finding("note", "base", text))
    if lost and len(lost) == len(description.groups):
        text = f"No module is known (“lora key not loaded”): {some(lost)}."
        out.append(Finding("fail", "names", text, TO_COMFYUI))
    elif lost:
        text = f"“lora key not loaded” for {len(lost)} of {len(description.groups)} modules: {some(lost)}."
        out.append(Finding("warn", "names", text, TO_COMFYUI))
    return out + f.wrong_shapes(description, "warn", "left out with an ERROR line")


def _is_diffusers(name: str) -> bool:
    return name.startswith("transformer.")


def diffusers(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    label = BASE_LABEL[base]
    if base == "hunyuan_image":
        return [Finding("fail", "base", f"Its pipeline of {label} loads no LoRA.", "use ComfyUI")]
    kohya = [g.name for g in description.groups if g.name.startswith("lora_")]
    generic = [g.name for g in description.groups if g.name.startswith("diffusion_model.")]
    if base in ("flux", "chroma"):
        if kohya and any("lora_down.weight" in group.keys for group in description.groups):
            return f.wrong_shapes(description, "fail", "a size mismatch that stops loading")
        return [Finding("note", "base", f"Other names than sd-scripts' for {label} are not checked here.")]
    if kohya:
        fix = TO_PEFT if base == "anima" else "use ComfyUI"
        text = f"Loads nothing, with at most a warning: it converts no kohya names for {label}, e.g. {some(kohya, 1)}."
        return [Finding("fail", "names", text, fix)]
    if generic and base == "sd3":
        return [
            Finding("fail", "names", f"Loads nothing: no {label} module begins with diffusion_model.", "use ComfyUI")
        ]
    alphas = [key for key in contents.tensors if "lora" not in key]
    if alphas and base == "anima":
        text = f"“Invalid LoRA checkpoint”: {some(alphas)} does not say lora in its name."
        return [Finding("fail", "prefix", text, TO_PEFT)]
    if base != "anima":
        return [Finding("note", "base", f"diffusers' own names for {label} are not checked here.")]
    unknown = [group.name for group in description.groups if group.resolved is None]
    out = [Finding("note", "release", "Releases before June 2026 have no loader for Anima.")]
    if unknown:
        out.append(Finding("warn", "names", f"{len(unknown)} modules are left out: {some(unknown)}."))
    return out + f.wrong_shapes(description, "fail", "a size mismatch that stops loading")


def a1111(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base != "sd3":
        return [Finding("fail", "base", f"A1111 has no {BASE_LABEL[base]}.", "use ComfyUI")]
    if contents.alphas:
        text = "A1111's SD3 loader stops at every kohya alpha and skips the whole LoRA."
        return [Finding("fail", "sd3-alpha", text, "use ComfyUI")]
    return [Finding("note", "base", "SD3 names are not checked here.")]


def forge(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base not in _FORGE:
        return [Finding("fail", "base", f"Forge has no {BASE_LABEL[base]}.", "use ComfyUI")]
    if base == "sd3":
        return [Finding("note", "base", "Forge's diffusers names for SD3 are switched off; kohya's apply.")]
    half = f.half_pairs(description)
    if half:
        return [Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors.")]
    lost = [group.name for group in description.groups if group.name not in comfy_ids(base)]
    if lost:
        return [Finding("note", "base", f"Other names than sd-scripts' are not checked here: {some(lost)}.")]
    return f.wrong_shapes(description, "fail", "an error that stops loading")


def sdcpp(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base not in _SDCPP:
        return [Finding("fail", "base", f"stable-diffusion.cpp has no {BASE_LABEL[base]}.", "use ComfyUI")]
    return [Finding("note", "base", f"{BASE_LABEL[base]} names are not checked here.")]


RULES: tuple[tuple[str, Callable[[Contents, Description, DitBase], list[Finding]]], ...] = (
    ("A1111", a1111),
    ("Forge", forge),
    ("ComfyUI", comfyui),
    ("diffusers", diffusers),
    ("sd.cpp", sdcpp),
)
