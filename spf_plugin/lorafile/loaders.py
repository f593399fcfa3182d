"""The documented rules of A1111, Forge and ComfyUI, as pure functions that return findings.

Read in A1111 1.10.1 (extensions-builtin/Lora), Forge dfdcbab6 (sd_forge_lora and comfyui_lora_collection) and
ComfyUI a125cd84 (comfy/lora.py, comfy/weight_adapter); re-stated, not run. The rules of
diffusers and stable-diffusion.cpp have modules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial

from spf_plugin.lorafile import dit_rules, names
from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile.diffusers_rules import diffusers
from spf_plugin.lorafile.findings import FIX, Finding, Verdict, some
from spf_plugin.lorafile.inspect import Contents, Description, Group, rank_of
from spf_plugin.lorafile.names import Base
from spf_plugin.lorafile.sdcpp import sdcpp

FORGE_LEFTOVERS = 12  # one more and Forge refuses the whole file

# Suffix sets that A1111 accepts as one module, tried in any order.
_A1111_TYPES: tuple[tuple[frozenset[str], ...], ...] = (
    (frozenset({"lora_up.weight", "lora_down.weight"}), frozenset({"lora_A.weight", "lora_B.weight"})),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    (frozenset({"weight"}), frozenset({"diff"}), frozenset({"w_norm", "b_norm"})),
    tuple(
        frozenset({*one, *two})
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    (frozenset({"a1.weight", "a2.weight", "alpha", "b1.weight", "b2.weight"}),),
    (frozenset({"oft_blocks"}), frozenset({"oft_diag"})),
)
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
_LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
_FORGE_SUFFIXES = (
    {"alpha", "dora_scale", "lora_up.weight", "lora_down.weight", "lora_mid.weight"}
    | _LOHA
    | _LOKR
    | {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "w_norm", "b_norm", "diff", "diff_b", "set_weight"}
)
_COMFY_SUFFIXES = _FORGE_SUFFIXES | {"reshape_weight", "oft_blocks", "rescale"}


# ---- A1111 ----------------------------------------------------------------------------------------------------------

_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "norm1": "in_layers_0", "norm2": "out_layers_0"}
_RESNET |= {"time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}
_DOWN = re.compile(r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)")
_MID = re.compile(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)")
_UP = re.compile(r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)")
_TE = re.compile(r"lora_(te|te2)_text_model_encoder_layers_(\d+)_(.+)")
_OPEN_CLIP = {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}


def a1111_layer(name: str, is_sd2: bool) -> str:
    """Layer name A1111 looks a module name up under; the name itself where no pattern fits."""

    def suffix(kind: str, rest: str) -> str:
        return _RESNET.get(rest, rest) if kind == "resnets" else rest

    if m := re.match(r"lora_unet_conv_in(.*)", name):
        return f"diffusion_model_input_blocks_0_0{m[1]}"
    if m := re.match(r"lora_unet_conv_out(.*)", name):
        return f"diffusion_model_out_2{m[1]}"
    if m := re.match(r"lora_unet_time_embedding_linear_(\d+)(.*)", name):
        return f"diffusion_model_time_embed_{int(m[1]) * 2 - 2}{m[2]}"
    if m := _DOWN.match(name):
        index = 1 + int(m[1]) * 3 + int(m[3])
        return f"diffusion_model_input_blocks_{index}_{int(m[2] == 'attentions')}_{suffix(m[2], m[4])}"
    if m := _MID.match(name):
        index = 1 if m[1] == "attentions" else int(m[2]) * 2
        return f"diffusion_model_middle_block_{index}_{suffix(m[1], m[3])}"
    if m := _UP.match(name):
        index = int(m[1]) * 3 + int(m[3])
        return f"diffusion_model_output_blocks_{index}_{int(m[2] == 'attentions')}_{suffix(m[2], m[4])}"
    if m := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + int(m[1]) * 3}_0_op"
    if m := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        # Right for SD1; SDXL's first upsampler sits at index 2, and this name is lost there.
        return f"diffusion_model_output_blocks_{2 + int(m[1]) * 3}_{2 if int(m[1]) > 0 else 1}_conv"
    if m := _TE.match(name):
        if m[1] == "te" and not is_sd2:
            return f"transformer_text_model_encoder_layers_{m[2]}_{m[3]}"
        rest = _OPEN_CLIP.get(m[3], m[3].replace("self_attn", "attn"))
        return f"{'1_' if m[1] == 'te2' else ''}model_transformer_resblocks_{m[2]}_{rest}"
    return name


@cache
def _a1111_layers(base: Base) -> frozenset[str]:
    """Layer names of the loaded model, as A1111 spells them."""
    out = set()
    for m in names.modules(base):
        flat = m.sgm.replace(".", "_")
        if m.component == "unet":
            out.add(f"diffusion_model_{flat}")
        elif names.fused_attention(base, m.component):
            layer, _, rest = flat.removeprefix("text_model_encoder_layers_").partition("_")
            rest = _OPEN_CLIP.get(rest, rest.replace("self_attn", "attn"))
            if rest in ("attn_q_proj", "attn_k_proj", "attn_v_proj"):
                rest = "attn"  # q, k and v are one MultiheadAttention there
            out.add(f"{'1_' if m.component == 'te2' else ''}model_transformer_resblocks_{layer}_{rest}")
        else:
            out.add(f"{'0_' if base == 'sdxl' else ''}transformer_{flat}")
    return frozenset(out)


def a1111_match(name: str, base: Base) -> str | None:
    """Layer that A1111 applies a module to, None where it silently drops it."""
    layers = _a1111_layers(base)
    key = a1111_layer(name, is_sd2=base == "sd2")
    if key in layers:
        return key
    if (m := re.fullmatch(r"(.*)_([qkv]_proj)", key)) and m[1] in layers:
        return key
    if "lora_unet" in name:
        key = name.replace("lora_unet", "diffusion_model")
    elif "lora_te1_text_model" in name:
        key = name.replace("lora_te1_text_model", "0_transformer_text_model")
        if key not in layers:
            key = name.replace("lora_te1_text_model", "transformer_text_model")
    elif "oft_unet" in name:
        key = name.replace("oft_unet", "diffusion_model")
    return key if key in layers else None


def _a1111_card_base(metadata: Mapping[str, str]) -> str:
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if metadata else "unknown"


def a1111(contents: Contents, description: Description) -> list[Finding]:
    """What A1111 1.10 does with the file."""
    base = description.base
    if base not in names.BASES:
        return f.unlisted(description) or []
    out = []
    lost: list[str] = []
    matched: dict[str, set[str]] = {}
    for key in contents.tensors:
        module, _, suffix = key.partition(".")
        if module == "bundle_emb":
            continue
        layer = a1111_match(module, base)
        if layer is None:
            lost.append(key)
        else:
            matched.setdefault(layer, set()).add(suffix)
    if not matched:
        return [Finding("fail", "names", "No name is known: it loads without a word and does nothing.", FIX)]
    lost = f.trained(description, lost)
    if lost:
        text = f"{len(lost)} tensors are dropped without a word: {some(lost)}."
        out.append(Finding("warn", "names", text, FIX))
    out += _a1111_factors(contents, description)
    unusable = [n for n, have in matched.items() if not any(t <= have for kind in _A1111_TYPES for t in kind)]
    if unusable:
        text = f"The whole LoRA is skipped: {some(unusable)} has no pair of factors A1111 knows."
        out.append(Finding("fail", "no-pair", text, "save the missing tensors"))
    for component in ("te1", "te2"):
        if names.fused_attention(base, component):
            broken = f.incomplete_attention(description, component)
            if broken:
                text = f"In {len(broken)} text-encoder layers q, k, v and out are not all there: none is applied."
                out.append(Finding("warn", "half-attention", text, FIX))
    if contents.over_fp16:
        text = f"{some(contents.over_fp16)} exceeds 65504 and becomes infinite in fp16: black images."
        out.append(Finding("fail", "fp16-range", text, FIX))
    dora = [g for g in description.groups if "dora_scale" in g.keys]
    column = [g for g in dora if _output_axis(contents, g)]
    if column:
        text = f"DoRA scales per output ({len(column)}) are normalised along the wrong axis: a different image."
        out.append(Finding("warn", "dora", text, "train with wd_on_out=False, or without DoRA"))
    out += f.wrong_shapes(description, "warn", "counted as errors and left out")
    label = "“Always show all networks on the Lora page” off"
    return out + f.card(contents, description, _a1111_card_base(contents.metadata), label, hides=True)


def _a1111_factors(contents: Contents, description: Description) -> list[Finding]:
    """Factors that A1111 reads otherwise than they were trained."""
    out = []
    glora = [g.name for g in description.groups if g.algorithm == "GLoRA"]
    if glora:
        text = f"It knows GLoRA's old order of factors only: {len(glora)} modules are errors and left out."
        level: f.Level = "fail" if len(glora) == len(description.groups) else "warn"
        out.append(Finding(level, "glora", text, "use Forge or ComfyUI"))
    scaled = [g.name for g in description.groups if "scalar" in g.keys]
    if scaled:
        text = f"The scalar of {len(scaled)} modules is ignored, and so their strength wrong: {some(scaled, 1)}."
        out.append(Finding("warn", "scalar", text, FIX))
    crossed = [
        g.name
        for g in description.groups
        if g.format == "peft" and contents.alphas.get(g.name, rank_of(contents, g)) != rank_of(contents, g)
    ]
    if crossed:
        text = f"The alpha beside lora_A and lora_B is dropped ({len(crossed)} modules): {some(crossed, 1)}."
        out.append(Finding("warn", "alpha-dropped", text, FIX))
    summed = ("LoHa", "LoKr", "full")
    coarse = [g for g in description.groups if g.algorithm in summed and _dtype(contents, g) == "BF16"]
    if coarse:
        text = f"It rounds the model's own weights to bf16 in the {len(coarse)} layers of this bf16 file."
        out.append(Finding("note", "bf16-sum", text, f"{FIX} --dtype fp16"))
    return out


def _dtype(contents: Contents, group: Group) -> str:
    """Precision of a module's factors."""
    return next((contents.tensors[key].dtype for suffix, key in group.keys.items() if suffix != "alpha"), "")


def _output_axis(contents: Contents, group: Group) -> bool:
    """Whether a dora_scale has one value per output ([out, 1]) rather than per input ([1, in])."""
    shape = contents.tensors[group.keys["dora_scale"]].shape
    return len(shape) >= 2 and shape[0] > 1 and all(s == 1 for s in shape[1:])


# ---- ComfyUI and Forge ----------------------------------------------------------------------------------------------


@cache
def comfy_ids(base: Base) -> frozenset[str]:
    """Every module name that ComfyUI and Forge map to a layer of `base`."""
    out = set()
    for m in names.modules(base):
        sgm, path = m.sgm.replace(".", "_"), m.path.replace(".", "_")
        if m.component == "unet":
            old = m.path.replace(".to_", ".processor.to_")  # names of diffusers' attention processors
            old = old[:-2] if old.endswith(".to_out.0") else old
            out |= {f"lora_unet_{sgm}", f"lora_unet_{path}", f"lycoris_{path}"}
            out |= {f"diffusion_model.{m.sgm}", old, f"unet.{old}"}
        elif m.component == "te1":
            out |= {f"lora_te_{path}", f"lora_te1_{path}", f"text_encoder.{m.path}"}
        else:
            out |= {f"lora_te2_{path}", f"text_encoder_2.{m.path}"}
    if base == "sdxl":
        out |= {"lora_te1_text_projection", "lora_te2_text_projection"}
    return frozenset(out)


def comfy_leftovers(description: Description, suffixes: set[str]) -> list[str]:
    """Keys that ComfyUI (or Forge, by `suffixes`) does not use."""
    ids = comfy_ids(description.base)
    out = []
    for group in description.groups:
        known = group.name in ids
        alone = f.alone(group)
        out += [key for suffix, key in group.keys.items() if not known or suffix not in suffixes or alone]
    return out


def _known_halves(description: Description) -> list[str]:
    """Modules with half their factors that are looked for at all."""
    ids = comfy_ids(description.base)
    return [name for name in f.half_pairs(description) if name in ids]


def _tucker_lokr(description: Description) -> list[str]:
    """LoKr modules with a Tucker core, whose product cannot be laid out as the weight."""
    return [g.name for g in description.groups if "lokr_t2" in g.keys]


def _comfy_dora(contents: Contents, description: Description) -> list[Finding]:
    dora = [g for g in description.groups if "dora_scale" in g.keys and _output_axis(contents, g)]
    if not dora:
        return []
    text = f"DoRA scales per output ({len(dora)}) are divided by the norm of the unpatched weight: a different image."
    return [Finding("warn", "dora", text, "train with wd_on_out=False, or without DoRA")]


def comfyui(contents: Contents, description: Description) -> list[Finding]:
    """What ComfyUI's LoraLoader does with the file."""
    other = f.unlisted(description)
    if other is not None:
        return other
    out = []
    half = _known_halves(description)
    if half:
        out.append(Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors."))
    lost = comfy_leftovers(description, _COMFY_SUFFIXES)
    if len(lost) == len(contents.tensors):
        return [*out, Finding("fail", "names", f"No tensor is known (“lora key not loaded”): {some(lost)}.", FIX)]
    lost = f.trained(description, lost)
    if lost:
        text = f"“lora key not loaded” for {len(lost)} tensors: {some(lost)}."
        out.append(Finding("warn", "names", text, FIX))
    tucker = _tucker_lokr(description)
    if tucker:
        text = f"Tucker LoKr ({len(tucker)} convolutions) is left out with an ERROR line: {some(tucker, 1)}."
        out.append(Finding("warn", "tucker", text, FIX))
    bounded = [
        g.name
        for g in description.groups
        if g.algorithm == "OFT" and ("rescale" in g.keys or contents.alphas.get(g.name, 0.0) > 0.0)
    ]
    if bounded:
        text = f"OFT with a constraint or rescale ({len(bounded)} modules) is applied wrongly: {some(bounded, 1)}."
        out.append(Finding("warn", "oft", text, "use A1111"))
    out += _comfy_dora(contents, description)
    return out + f.wrong_shapes(description, "warn", "left out with an ERROR line")


def _forge_card_base(metadata: Mapping[str, str]) -> str:
    architecture = metadata.get("modelspec.architecture", "")
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "sdxl"
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if architecture == "stable-diffusion-v1/lora" else "unknown"


def _forge_shapes(contents: Contents, description: Description) -> list[Finding]:
    """Forge fills the missing inputs of a linear layer with zeros; anything else is an error."""
    padded = []
    for group in description.groups:
        down = contents.tensors.get(group.keys.get("lora_down.weight", ""))
        module = group.resolved.module if group.resolved else None
        if group.name in description.misshaped and module and module.kind == "linear" and down and len(down.shape) > 1:
            up = contents.tensors.get(group.keys.get("lora_up.weight", ""))
            if down.shape[1] < module.fan_in and up and up.shape[0] == module.fan_out:
                padded.append(group.name)
    rest = replace(description, misshaped=tuple(n for n in description.misshaped if n not in padded))
    return f.wrong_shapes(replace(description, misshaped=tuple(padded)), "warn", "filled up with zeros") + (
        f.wrong_shapes(rest, "fail", "an error that stops loading")
    )


def forge(contents: Contents, description: Description) -> list[Finding]:
    """What Forge does with the file."""
    other = f.unlisted(description)
    if other is not None:
        return other
    out = []
    half = _known_halves(description)
    if half:
        out.append(Finding("fail", "no-pair", f"Stops with a KeyError: {some(half)} has half its factors."))
    lost = comfy_leftovers(description, _FORGE_SUFFIXES)
    if len(lost) > FORGE_LEFTOVERS:
        text = f"“LoRA version mismatch”: {len(lost)} unknown tensors, more than {FORGE_LEFTOVERS}, "
        out.append(Finding("fail", "names", f"{text}so the whole LoRA is refused: {some(lost)}.", FIX))
    elif len(lost) == len(contents.tensors):
        out.append(Finding("fail", "names", f"No tensor is known: {some(lost)}.", FIX))
    elif lost := f.trained(description, lost):
        out.append(Finding("warn", "names", f"{len(lost)} unknown tensors are left out: {some(lost)}.", FIX))
    tucker = _tucker_lokr(description)
    if tucker:
        text = f"Tucker LoKr ({len(tucker)} convolutions) stops with an error: {some(tucker, 1)}."
        out.append(Finding("fail", "tucker", text, FIX))
    out += _comfy_dora(contents, description) + _forge_shapes(contents, description)
    return out + f.card(contents, description, _forge_card_base(contents.metadata), "the card filter", hides=False)


# ---- all five -------------------------------------------------------------------------------------------------------


def verdicts(contents: Contents, description: Description) -> list[Verdict]:
    """How each of the five loaders takes the file, in the order they are shown."""
    rules: tuple[tuple[str, Callable[[Contents, Description], list[Finding]]], ...] = (
        ("A1111", a1111),
        ("Forge", forge),
        ("ComfyUI", comfyui),
        ("diffusers", diffusers),
        ("sd.cpp", sdcpp),
    )
    shared = f.common(contents, description)
    base = description.base
    if base not in names.BASES and base != "unknown":
        dits: dict[str, Callable[..., list[Finding]]] = dict(dit_rules.RULES)
        rules = tuple((name, partial(dits[name], base=base)) for name, _ in rules)
    if not description.groups or any(finding.code == "factors" for finding in shared):
        return [Verdict(name, tuple(shared)) for name, _ in rules]
    found = ((name, shared + rule(contents, description)) for name, rule in rules)
    return [Verdict(name, f.advised(contents, description, findings)) for name, findings in found]
