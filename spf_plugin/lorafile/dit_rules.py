"""What A1111, Forge and ComfyUI do with LoRA files of diffusion transformers.

Names in the layout of the checkpoint were read in ComfyUI 17358c8f (comfy/lora.py); diffusers' names were run in
ComfyUI a125cd84, Forge dfdcbab6 and A1111 82a973c0 (`tests/lorafile/dit_programs.py`), those of the models that
musubi-tuner trains in ComfyUI v0.19.3 (`tests/lorafile/musubi_programs.py`). diffusers' own rules stand in
`dit_diffusers`, those of stable-diffusion.cpp in `dit_sdcpp`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache

from spf_plugin.lorafile import dit_names, dit_parts, musubi_names
from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.dit_diffusers import TO_COMFYUI, diffusers
from spf_plugin.lorafile.dit_sdcpp import sdcpp
from spf_plugin.lorafile.findings import Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, Group, rank_of
from spf_plugin.lorafile.names import BASE_LABEL, DitBase

FORGE_LEFTOVERS = 12  # one more and Forge refuses the whole file
_FORGE = ("flux", "chroma", "sd3")
# Which of diffusers' names a program maps, by what stands before the path.
_FLUX = ("transformer.", "lora_transformer_", "lycoris_")
_COMFY_SPLIT: Mapping[str, tuple[str, ...]] = {
    "sd3": dit_parts.PREFIXES, "flux": _FLUX, "chroma": _FLUX, "flux2": (*_FLUX, "")
}  # fmt: skip
_FORGE_SPLIT: Mapping[str, tuple[str, ...]] = {"flux": _FLUX}  # SD 3's are switched off there
_A1111_PARTS = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0")


@cache
def _ids(base: DitBase, prefixes: tuple[str, ...]) -> frozenset[str]:
    """Module names of the checkpoint's layout, generic or kohya's, and diffusers' paths behind `prefixes`."""
    out = set()
    for module in dit_names.modules(base):
        out.add(dit_names.kohya_name(base, module, original=True))
        if module.component == "unet":
            out.add(f"diffusion_model.{module.sgm}")
        elif module.sgm.startswith("text_model."):
            out.add(f"{'text_encoder' if module.component == 'te1' else 'text_encoder_2'}.{module.sgm}")
        elif base == "flux":
            out.add(f"lora_te2_{module.sgm.replace('.', '_')}")  # OneTrainer's
    for part in dit_parts.parts(base).values():
        out |= {f"diffusion_model.{part.module.sgm}", f"lora_unet_{part.module.sgm.replace('.', '_')}"}
    for path in dit_parts.parts(base):
        out |= {f"{p}{path.replace('.', '_') if p.endswith('_') else path}" for p in prefixes}
    return frozenset(out)


def comfy_ids(base: DitBase) -> frozenset[str]:
    """Module names that ComfyUI maps."""
    if base in musubi_names.MUSUBI_BASES and base != "flux2":
        return musubi_names.comfy_names(base)
    return _ids(base, _COMFY_SPLIT.get(base, ()))


def comfyui(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    half = f.half_pairs(description)
    if half:
        return [Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors.")]
    ids = comfy_ids(base)
    lost = [group.name for group in description.groups if group.name not in ids or f.alone(group)]
    out = []
    if lost and len(lost) == len(description.groups):
        text = f"No module is known (“lora key not loaded”): {some(lost)}."
        out.append(Finding("fail", "names", text, TO_COMFYUI))
    elif lost:
        text = f"“lora key not loaded” for {len(lost)} of {len(description.groups)} modules: {some(lost)}."
        out.append(Finding("warn", "names", text, TO_COMFYUI))
    out += _beside(contents, description)
    return out + f.wrong_shapes(description, "warn", "left out with an ERROR line")


def _magnitudes(description: Description) -> list[str]:
    return [g.keys["lora_magnitude_vector"] for g in description.groups if "lora_magnitude_vector" in g.keys]


def _beside(contents: Contents, description: Description) -> list[Finding]:
    """What only diffusers reads: PEFT's DoRA, and alphas that stand in the metadata."""
    out = []
    if scales := _magnitudes(description):
        text = f"The scales of PEFT's DoRA ({len(scales)}) are left out and plain LoRA is applied: a different image."
        out.append(Finding("warn", "dora", text, "use diffusers, or train without DoRA"))
    if told := other_alpha(contents.metadata):
        text = f"lora_adapter_metadata asks for {told}, which only diffusers reads: another strength here."
        out.append(Finding("warn", "adapter-metadata", text, "train with alpha = rank"))
    return out


def other_alpha(metadata: Mapping[str, str]) -> str:
    """The alpha that diffusers' metadata of a transformer asks for where it is not the rank; else empty."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return ""
    if not isinstance(config, dict):
        return ""
    alpha, rank = config.get("transformer.lora_alpha"), config.get("transformer.r")
    if config.get("transformer.alpha_pattern") or config.get("transformer.use_rslora"):
        return "alphas of their own"
    return f"alpha {alpha} at rank {rank}" if alpha != rank else ""


def forge(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base not in _FORGE:
        return [Finding("fail", "base", f"Forge has no {BASE_LABEL[base]}.", "use ComfyUI")]
    half = f.half_pairs(description)
    if half:
        return [Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors.")]
    known = _ids(base, _FORGE_SPLIT.get(base, ()))
    lost = [
        key
        for g in description.groups
        for key in g.keys.values()
        if g.name not in known or f.alone(g) or ".default." in key
    ]
    unread = lost + _magnitudes(description)
    if lost and len(lost) == len(contents.tensors):
        text = f"No tensor is known: {some(lost)}."
        return [Finding("fail", "names", text, "spf lora convert --to kohya")]
    if len(unread) > FORGE_LEFTOVERS:
        text = f"“LoRA version mismatch”: {len(unread)} unknown tensors, more than {FORGE_LEFTOVERS}, "
        return [Finding("fail", "names", f"{text}so the whole LoRA is refused: {some(unread)}.")]
    out = []
    if lost:
        out.append(Finding("warn", "names", f"{len(lost)} unknown tensors are left out: {some(lost)}."))
    out += _beside(contents, description)
    return out + f.wrong_shapes(description, "fail", "an error that stops loading")


def a1111(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base != "sd3":
        return [Finding("fail", "base", f"A1111 has no {BASE_LABEL[base]}.", "use ComfyUI")]
    if contents.alphas and (short := [key for key in contents.tensors if key.count(".") < 2]):
        text = f"A1111's SD3 loader stops at every kohya alpha and skips the whole LoRA: {some(short, 1)}."
        return [Finding("fail", "sd3-alpha", text, "use ComfyUI")]
    applied = [group for group in description.groups if _a1111_applies(description, group)]
    lost = [group.name for group in description.groups if group not in applied]
    if not applied:
        return [Finding("fail", "names", f"No module is known: it does nothing. {some(lost)}.", "use ComfyUI")]
    out = []
    if lost:
        text = (
            f"{len(lost)} of {len(description.groups)} modules are dropped without a word: {some(lost)}. Of diffusers' "
        )
        text += "names it knows the image's to_q, to_k, to_v (all three) and to_out.0."
        out.append(Finding("warn", "names", text, "use ComfyUI"))
    dropped = [g.name for g in applied if contents.alphas.get(g.name, rank_of(contents, g)) != rank_of(contents, g)]
    if dropped:
        text = f"The alpha of {len(dropped)} modules is dropped, and so their strength wrong: {some(dropped, 1)}."
        out.append(Finding("warn", "alpha-dropped", text, "use ComfyUI"))
    out.append(Finding("note", "base", "A1111 has SD 3 medium, not 3.5."))
    return out + _beside(contents, description)


def _a1111_applies(description: Description, group: Group) -> bool:
    """Whether A1111 applies a module of SD 3: kohya's without alpha, of diffusers' parts of the image's attention."""
    factors = {group.keys.get("lora_down.weight", ""), group.keys.get("lora_up.weight", "")}
    spelled = [{f"{group.name}.lora_{a}.weight", f"{group.name}.lora_{b}.weight"} for a, b in (("down", "up"), "AB")]
    if factors not in spelled:
        return False
    if group.name.startswith("lora_unet_"):
        return group.resolved is not None
    if not group.name.startswith("transformer.") or not group.name.endswith(_A1111_PARTS):
        return False
    if group.name.endswith(_A1111_PARTS[3]):
        return True
    names = {g.name for g in description.groups}
    stem = group.name.rpartition(".")[0]
    return {f"{stem}.to_q", f"{stem}.to_k", f"{stem}.to_v"} <= names


RULES: tuple[tuple[str, Callable[[Contents, Description, DitBase], list[Finding]]], ...] = (
    ("A1111", a1111),
    ("Forge", forge),
    ("ComfyUI", comfyui),
    ("diffusers", diffusers),
    ("sd.cpp", sdcpp),
)
