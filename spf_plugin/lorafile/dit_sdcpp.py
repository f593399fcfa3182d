"""The rules of stable-diffusion.cpp for diffusion transformers, re-stated from name_conversion.cpp and adapter/lora.hpp
(97d29908); not run."""

from __future__ import annotations

from functools import cache

from spf_plugin.lorafile import dit_names, dit_parts, musubi_names
from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.findings import Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, Group
from spf_plugin.lorafile.names import BASE_LABEL, DitBase, Module
from spf_plugin.lorafile.sdcpp import renamed_suffix, separate

TO_DIFFUSERS, TO_COMFYUI, TO_KOHYA = (f"spf lora convert --to {name}" for name in ("diffusers", "comfyui", "kohya"))
_MODELS = ("flux", "chroma", "sd3", "anima", *musubi_names.MUSUBI_BASES)
_FLUX2_UNKNOWN = ("linear_in", "linear_out", "to_qkv_mlp_proj", ".attn.to_out")  # it has FLUX.1's names there
_ROOT = "model.diffusion_model."
_PREFIXES = ("lora.lora.", "lora.lora_", "lora.lycoris_", "lora.lycoris.", "lora.")
_UNDERLINED = ("unet_", "te_", "te1_", "te2_", "te3_", "vae_")
# Words of transformers whose underscores stay, beside those of the UNets.
_WORDS = (
    "single_transformer_blocks", "single_blocks", "double_blocks", "txt_attn", "img_attn", "add_q_proj", "add_k_proj",
    "add_v_proj", "add_out_proj", "ff_context", "to_add_out", "txt_mod", "img_mod", "txt_mlp", "img_mlp", "proj_mlp",
    "wi_0", "wi_1", "norm1_context", "x_embedder", "cross_attn", "output_proj",
)  # fmt: skip


@cache
def _theirs(base: DitBase) -> dict[str, tuple[str, int]]:
    """diffusers' path -> the tensor of the checkpoint and which of its parts; of Anima and Wan none."""
    out = {}
    for path in musubi_names.fused(base):  # of Z-Image, whose checkpoint this is
        for i, own in enumerate(musubi_names.unfused(path)):
            out[own] = (f"{path}.weight", i)
    if base == "krea2":
        for module in dit_names.modules(base):
            out[musubi_names.diffusers_path(base, module.path)] = (f"{module.path}.weight", 0)
    for whole, parts in dit_parts.siblings(base).items():
        for i, part in enumerate(parts):
            if base != "flux2" or not part.module.path.endswith(_FLUX2_UNKNOWN):
                out[part.module.path] = (f"{whole}.weight", i)
    return out


def place(key: str, base: DitBase) -> tuple[str, int, str]:
    """Tensor of the model that a LoRA tensor is filed under, which part of it, and which factor it is."""
    name, underlined = f"lora.{key}", False
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            underlined = prefix == "lora.lycoris_" or name.startswith(_UNDERLINED)
            break
    name = renamed_suffix(name)
    if name.startswith(("transformer_blocks", "single_transformer_blocks")):
        name = f"transformer.{name}"
    if underlined:
        name = separate(name, _WORDS)
    for prefix in ("diffusion_model.", "unet.", "transformer."):
        if name.startswith(prefix):
            name = _ROOT + name[len(prefix) :]
            break
    tensor, _, factor = name.rpartition(".")
    path = tensor.removeprefix(_ROOT)
    if path == tensor:
        return tensor, 0, factor
    whole, part = _theirs(base).get(path.removesuffix(".weight"), (path, 0))
    return whole, part, factor


def sdcpp(contents: Contents, description: Description, base: DitBase) -> list[Finding]:
    if base not in _MODELS:
        return [Finding("fail", "base", f"stable-diffusion.cpp has no {BASE_LABEL[base]}.", "use ComfyUI")]
    known = {f"{m.sgm}.weight" for m in dit_names.modules(base) if m.component == "unet"}
    known -= {f"{path}.weight" for whole in musubi_names.fused(base) for path in musubi_names.unfused(whole)}
    known |= {whole for whole, _ in _theirs(base).values()}
    filed: dict[str, set[int]] = {}
    for key in contents.tensors:
        tensor, part, factor = place(key, base)
        if tensor in known and factor != "lora_magnitude_vector":
            filed.setdefault(tensor, set()).add(part)
    lost, turned = [], []
    text = [g for g in description.groups if g.resolved and g.resolved.module.group == "text"]
    for group in description.groups:
        if group in text:
            continue
        tensor, part, _ = place(next(iter(group.keys.values())), base)
        later = part > 0 and group.algorithm != "LoRA"  # of other algorithms no later part is looked for
        if tensor not in known or later or f.alone(group) or not set(range(part)) <= filed.get(tensor, set()):
            lost.append(group.name)
        elif group.resolved and group.resolved.style == "split" and _swapped(contents, group, group.resolved.module):
            turned.append(group.name)
    return _said(contents, description, base, lost, turned, text=len(text))


def _swapped(contents: Contents, group: Group, module: Module) -> bool:
    up = contents.tensors.get(group.keys.get("lora_up.weight", ""))
    down = contents.tensors.get(group.keys.get("lora_down.weight", ""))
    return up is not None and down is not None and dit_parts.swapped(module.path, down.shape[-1], up.shape[0])


def _fix(description: Description, base: DitBase, lost: list[str]) -> str:
    """What makes names that it takes of those that it does not."""
    if base in musubi_names.MUSUBI_BASES:
        if base in ("flux2", "wan"):  # of diffusers' names it splits FLUX.2's, and has none of Wan
            return TO_COMFYUI
        if all(group.algorithm == "LoRA" for group in description.groups):
            return f"{TO_DIFFUSERS} or --to comfyui"
        return "use ComfyUI" if base == "zimage" else TO_COMFYUI  # whose q, k and v it finds in one
    split = any(g.name in lost and g.resolved and g.resolved.style == "split" for g in description.groups)
    return TO_COMFYUI if base == "anima" else f"{TO_KOHYA}, and that --to diffusers" if split else TO_DIFFUSERS


def _said(
    contents: Contents, description: Description, base: DitBase, lost: list[str], turned: list[str], *, text: int
) -> list[Finding]:
    fix = _fix(description, base, lost)
    if lost and len(lost) == len(description.groups) - text:
        return [Finding("fail", "names", f"Every tensor is an “unused lora tensor”: {some(lost)}.", fix)]
    out = []
    if lost:
        said = f"“unused lora tensor” for {len(lost)} modules: {some(lost)}."
        if base != "anima":
            said += " Of a matrix that diffusers splits it takes the parts in order, up to the first that is missing."
        out.append(Finding("warn", "names", said, fix))
    if turned:
        said = (
            f"Scale and shift of {len(turned)} modules change places, as diffusers' order is other: {some(turned, 1)}."
        )
        out.append(Finding("warn", "halves", said, "train without them"))
    if scales := [g.name for g in description.groups if "lora_magnitude_vector" in g.keys]:
        said = f"DoRA scales ({len(scales)}) are unused and plain LoRA is applied: a different image."
        out.append(Finding("warn", "dora", said, "train without DoRA"))
    if text:
        out.append(Finding("note", "text", f"{text} modules of text encoders are not checked here."))
    return out + f.wrong_shapes(description, "warn", "skipped as incompatible")
