"""What diffusers does with LoRA files of the models that musubi-tuner trains: run in 0.35.2, 0.36.0 and 0.42.1
(`tests/lorafile/musubi_results.json`), read in 58eb52c0 of 2026-08-23 (loaders/lora_pipeline.py,
lora_conversion_utils.py)."""

from __future__ import annotations

from collections.abc import Callable

from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.diffusers_rules import Strength, mixed, wrong_strengths
from spf_plugin.lorafile.findings import Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, Group
from spf_plugin.lorafile.names import BASE_LABEL, DitBase

TO_DIFFUSERS = "spf lora convert --to diffusers"
_HOST = "lora_unet_"
_GENERIC = ("diffusion_model.", "base_model.model.")
_NO_BASE_MODEL = ("zimage", "qwen_image", "wan")  # whose loaders do not know PEFT's prefix
_MISFIT = "a size mismatch that stops loading"


def diffusers(
    contents: Contents, description: Description, base: DitBase, own: Callable[[], list[Finding]]
) -> list[Finding]:
    """`own` is the rule of files under diffusers' names."""
    label = BASE_LABEL[base]
    out = []
    if base not in ("qwen_image", "wan"):
        out.append(Finding("note", "release", f"Releases up to 0.35 have no loader for {label}."))
    other = [g.name for g in description.groups if g.algorithm != "LoRA"]
    if other:
        text = f"{some(other, 1)} is no plain LoRA, which is all that it loads of {label}."
        return [*out, Finding("fail", "algorithm", text, "use ComfyUI")]
    names = [group.name for group in description.groups]
    host = [name for name in names if name.startswith(_HOST)]
    prefix = next((p for p in _GENERIC if all(name.startswith(p) for name in names)), "")
    if not host and not prefix:
        return out + _own(contents, description, base, own)
    foreign = [name for name in names if name not in host] if host else []
    if foreign:
        text = f"The names are of two kinds: {host[0]} and {foreign[0]}."
        return [*out, Finding("fail", "mixed-names", text, TO_DIFFUSERS)]
    if host:
        out += _under_host_names(contents, description, base)
    else:
        out += _generic(contents, description, base, prefix)
    if any(finding.level == "fail" for finding in out):
        return out
    unknown = [g.name for g in description.groups if g.resolved is None]
    if unknown:
        out.append(Finding("warn", "names", f"{len(unknown)} modules are left out: {some(unknown)}.", TO_DIFFUSERS))
    return out + f.wrong_shapes(description, "fail", _MISFIT)


def _own(
    contents: Contents, description: Description, base: DitBase, own: Callable[[], list[Finding]]
) -> list[Finding]:
    converted = [key for key in contents.tensors if key.endswith(".alpha") or ".default." in key]
    if base in ("zimage", "qwen_image") and converted:
        text = f"Stops: because of {some(converted, 1)} it takes the names for another program's and puts a second "
        text += "transformer. before each."
        return [Finding("fail", "prefix", text, TO_DIFFUSERS)]
    return own()


def _under_host_names(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    first = description.groups[0].name
    if base == "krea2":
        text = f"Loads nothing: it converts none of musubi-tuner's names of Krea 2, e.g. {first}."
        return [Finding("fail", "names", text, TO_DIFFUSERS)]
    if base in ("zimage", "flux2"):
        text = f"0.36 loads nothing of musubi-tuner's names, e.g. {first}; 0.42 does."
        return [Finding("fail", "names", text, TO_DIFFUSERS)]
    bare = [g.name for g in description.groups if "alpha" not in g.keys]
    if bare:
        text = f"Stops with a KeyError where an alpha is missing: {some(bare, 1)}."
        return [Finding("fail", "alpha", text, f"{f.FIX}, which adds it")]
    if base == "wan" and (missing := _missing(description.groups)):
        text = f"Stops with a KeyError, as it wants every module of every block from the first on: {some(missing)}."
        return [Finding("fail", "half-block", text, TO_DIFFUSERS)]
    return _ranks(contents, description, base)


def _ranks(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    """Of what it multiplies alphas into, old releases take every rank for the most common one."""
    wrong = wrong_strengths(
        Strength(g.name, "unet", contents.tensors[g.keys["lora_down.weight"]].shape[0], None)
        for g in description.groups
        if {"lora_down.weight", "lora_up.weight"} <= set(g.keys)
    )
    old = wrong.pop("0.35")
    names = "0.36" if base == "zimage" else "0.35 and 0.36"
    return mixed({names: old, "0.42": wrong["0.42"]}, TO_DIFFUSERS)


def _missing(groups: tuple[Group, ...]) -> list[str]:
    """Modules of Wan's blocks, counted from the first, that a file lacks."""
    paths = {g.resolved.module.path for g in groups if g.resolved}
    blocks = {path.split(".")[1] for path in paths}
    attention = [f"{side}.{name}" for side in ("self_attn", "cross_attn") for name in "qkvo"]
    wanted = [f"blocks.{i}.{name}" for i in range(len(blocks)) for name in (*attention, "ffn.0", "ffn.2")]
    return [path for path in wanted if path not in paths]


def _generic(contents: Contents, description: Description, base: DitBase, prefix: str) -> list[Finding]:
    """The checkpoint's paths, behind ``diffusion_model.`` or PEFT's prefix."""
    if prefix == "base_model.model." and base in _NO_BASE_MODEL:
        text = f"Loads nothing: {description.groups[0].name} starts with no component of its pipeline."
        return [Finding("fail", "prefix", text, TO_DIFFUSERS)]
    if base == "qwen_image":
        text = f"0.35 loads nothing behind {prefix}, and 0.36 leaves alphas out; 0.42 is right."
        return [Finding("fail", "prefix", text, TO_DIFFUSERS)]
    odd = [key for key in contents.tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if base in ("flux2", "krea2") and odd:
        text = f"Stops or loads nothing: behind {prefix} it takes lora_A and lora_B alone, without {some(odd, 1)}."
        return [Finding("fail", "crossed-names", text, TO_DIFFUSERS)]
    if base == "flux2":
        return [Finding("fail", "prefix", f"0.36 loads nothing behind {prefix}; 0.42 does.", TO_DIFFUSERS)]
    out = _fused(description) + _ranks(contents, description, base)
    if base == "zimage" and contents.alphas and len(odd) < len(contents.tensors) // 2:
        text = "0.36 leaves alphas out beside lora_A and lora_B; 0.42 is right."
        out.append(Finding("warn", "alpha-dropped", text, TO_DIFFUSERS))
    return out


def _fused(description: Description) -> list[Finding]:
    whole = [
        g.name for g in description.groups if g.resolved and g.resolved.style == "fused" and g.name.endswith("qkv")
    ]
    if not whole:
        return []
    text = f"{len(whole)} modules hold q, k and v in one, which it leaves out: {some(whole, 1)}."
    return [Finding("warn", "fused", text, TO_DIFFUSERS)]
