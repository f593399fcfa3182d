"""The rules of stable-diffusion.cpp, re-stated from name_conversion.cpp and adapter/lora.hpp (97d29908); not run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from spf_plugin.lorafile import findings as f
from spf_plugin.lorafile import names
from spf_plugin.lorafile.findings import FIX, Finding, some
from spf_plugin.lorafile.inspect import Contents, Description, rank_of
from spf_plugin.lorafile.names import Base

# Underscores inside these words stay; every other one becomes a dot.
_PROTECTED = [
    "self_attn",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "to_k",
    "to_q",
    "to_v",
    "to_out",
    "text_model",
    "down_blocks",
    "mid_block",
    "up_block",
    "proj_in",
    "proj_out",
    "transformer_blocks",
    "diffusion_model",
    "cond_stage_model",
    "conv_in",
    "conv_out",
    "lora_down",
    "lora_mid",
    "lora_up",
    "diff_b",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    "time_emb_proj",
    "conv_shortcut",
    "time_embedding",
    "conv_norm_out",
    "input_blocks",
    "output_blocks",
    "middle_block",
    "skip_connection",
    "emb_layers",
    "in_layers",
    "out_layers",
]
_PLAIN = [
    "alpha",
    "scale",
    "diff",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
]
_PLAIN += ["lokr_w2", "lokr_w2_a", "lokr_w2_b"]
_SUFFIXES = {f".{s}": f".weight.{s}" for s in _PLAIN} | {".diff_b": ".bias.diff"}
for _part, _letter in (("down", "A"), ("up", "B")):
    _SUFFIXES |= {f".lora_{_part}.weight": f".weight.lora_{_part}", f".lora.{_part}.weight": f".weight.lora_{_part}"}
    _SUFFIXES |= {f"_lora.{_part}.weight": f".weight.lora_{_part}", f".lora_{_letter}": f".weight.lora_{_part}"}
    _SUFFIXES |= {f".lora_{_letter}{tail}": f".weight.lora_{_part}" for tail in (".weight", ".default.weight")}
_SUFFIXES[".lora_mid.weight"] = ".weight.lora_mid"
_PREFIXES = {
    "diffusion_model.": "model.diffusion_model.",
    "unet.": "model.diffusion_model.",
    "text_encoder.": "cond_stage_model.transformer.",
    "te.": "cond_stage_model.transformer.",
    "te1.": "cond_stage_model.transformer.",
    "te2.": "cond_stage_model.1.transformer.",
    "clip_l.": "cond_stage_model.transformer.",
    "clip_g.": "cond_stage_model.1.transformer.",
}
# Factor sets that give a weight difference.
_USABLE = (
    {"lora_down", "lora_up"},
    {"diff"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


def separate(name: str, words: Iterable[str] = ()) -> str:
    """Underscores to dots, except inside protected words and `words`."""
    kept = set()
    for word in (*_PROTECTED, *words):
        start = name.find(word)
        while start >= 0:
            kept |= {start + i for i, char in enumerate(word) if char == "_"}
            start = name.find(word, start + len(word))
    return "".join("." if c == "_" and i not in kept else c for i, c in enumerate(name))


def renamed_suffix(name: str) -> str:
    """A LoRA tensor's name with the factor behind the model's tensor."""
    for suffix in sorted(_SUFFIXES):
        if name.endswith(suffix):
            name = name[: -len(suffix)] + _SUFFIXES[suffix]
            break
    return name.replace(".processor", "", 1)


@cache
def _unet_map(base: Base) -> tuple[tuple[str, str], ...]:
    """(diffusers prefix, original prefix), in the order they are tried."""
    out = []
    blocks = 3 if base == "sdxl" else 4
    for i in range(blocks):
        for j in range(2):
            out.append((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0."))
            if (i > 0) if base == "sdxl" else (i < 3):
                out.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1."))
        for j in range(4 if base == "sdxl" else 3):
            out.append((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0."))
            if base != "sdxl" or i < 2:
                out.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1."))
        if i < 3:
            out.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * (i + 1)}.0.op."))
            out.append((f"up_blocks.{i}.upsamplers.0.", f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}."))
    if base == "sdxl":
        out.append(("output_blocks.2.1.conv.", "output_blocks.2.2.conv."))
    out.append(("mid_block.attentions.0.", "middle_block.1."))
    out += [(f"mid_block.resnets.{j}.", f"middle_block.{2 * j}.") for j in range(2)]
    return tuple(out)


_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)


def convert(key: str, base: Base) -> str:
    """Name under which stable-diffusion.cpp files a LoRA tensor: model tensor, dot, factor."""
    name = f"lora.{key}"
    for prefix in ("lora.lora.", "lora.lora_", "lora.lycoris_", "lora.lycoris.", "lora."):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    name = separate(renamed_suffix(name))
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    if name.startswith("model.diffusion_model.") or name.startswith(("down_blocks.", "up_blocks.", "mid_block.")):
        rest = name.removeprefix("model.diffusion_model.")
        if "resnets" in rest:
            for old, new in _RESNET:
                rest = rest.replace(old, new, 1)
        for old, new in _unet_map(base):
            rest = rest.replace(old, new, 1)
        rest = rest.replace("to_out.weight", "to_out.0.weight", 1)
        name = f"model.diffusion_model.{rest}"
    return name


@cache
def _model_tensors(base: Base) -> frozenset[str]:
    """Weight and bias names of an original checkpoint of `base`, as stable-diffusion.cpp keeps them."""
    out = set()
    for m in names.modules(base):
        if m.component == "unet":
            out |= {f"model.diffusion_model.{m.sgm}.{kind}" for kind in ("weight", "bias")}
        else:
            encoder = "cond_stage_model.1" if m.component == "te2" else "cond_stage_model"
            out |= {f"{encoder}.transformer.{m.path}.{kind}" for kind in ("weight", "bias")}
    return frozenset(out)


def sdcpp(contents: Contents, description: Description) -> list[Finding]:
    """What stable-diffusion.cpp does with the file, on a checkpoint in the original layout."""
    other = f.unlisted(description)
    if other is not None:
        return other
    base: Base = description.base  # type: ignore[assignment]
    out = []
    model = _model_tensors(base)
    filed: dict[str, dict[str, str]] = {}
    for key in contents.tensors:
        tensor, _, factor = convert(key, base).rpartition(".")
        filed.setdefault(tensor, {})[factor] = key
    unused = []
    for tensor, factors in filed.items():
        good = next((u for u in _USABLE if u <= set(factors)), None)
        if tensor not in model or good is None:
            unused += list(factors.values())
        else:
            used = good | {"alpha", "scale", "lora_mid", "hada_t1", "hada_t2"}
            unused += [key for factor, key in factors.items() if factor not in used]
    dora = [key for key in unused if key.endswith(".dora_scale")]
    unused = [key for key in unused if not key.endswith(".dora_scale")]
    if dora:
        text = f"DoRA scales ({len(dora)}) are unused and plain LoRA is applied: a different image."
        out.append(Finding("warn", "dora", text, "train without DoRA"))
    if len(unused) + len(dora) == len(contents.tensors):
        out.append(Finding("fail", "names", f"Every tensor is an “unused lora tensor”: {some(unused)}.", FIX))
        return out
    if unused:
        text = f"“unused lora tensor” for {len(unused)} tensors: {some(unused)}."
        out.append(Finding("warn", "names", text, FIX))
    out += _convolutions(contents, description) + _fused(description) + _rank_one(contents, description)
    if contents.over_fp16:
        text = "Values above 65504 overflow in at_runtime mode."
        out.append(Finding("warn", "fp16-range", text, FIX))
    return out + f.wrong_shapes(description, "warn", "skipped as incompatible")


def _convolutions(contents: Contents, description: Description) -> list[Finding]:
    """Factors of convolutions that are multiplied in another order than they were trained."""
    out = []
    stopped = [g.name for g in description.groups if "lokr_t2" in g.keys]
    if stopped:
        out.append(Finding("fail", "tucker", f"Tucker LoKr stops the program: {some(stopped, 1)}.", FIX))
    cores = [g.name for g in description.groups if {"lora_mid.weight", "hada_t1"} & set(g.keys)]
    if cores:
        text = f"Tucker cores ({len(cores)} convolutions) are multiplied in the wrong order: {some(cores, 1)}."
        out.append(Finding("warn", "tucker", text, FIX))
    whole = [
        g.name
        for g in description.groups
        if "lokr_w2" in g.keys and len(contents.tensors[g.keys["lokr_w2"]].shape) == 4
    ]
    if whole:
        text = f"LoKr with a whole second factor is permuted in {len(whole)} convolutions: {some(whole, 1)}."
        out.append(Finding("warn", "lokr-whole", text, "use ComfyUI"))
    return out


def _fused(description: Description) -> list[Finding]:
    """q, k, v of an OpenCLIP text encoder live in one in_proj, filled in order until the first gap."""
    out = []
    if description.base == "sdxl" and (broken := f.incomplete_attention(description, "te2")):
        text = f"In {len(broken)} layers of text encoder 2 q, k, v are not all there: those after the gap are lost."
        out.append(Finding("warn", "half-attention", text, FIX))
    if description.base == "sd2":
        paths = [g.resolved.module.path for g in description.groups if g.resolved]
        fused = [p for p in paths if p.endswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))]
        if fused:
            text = f"The SD2 text encoder's q, k, v ({len(fused)}) are unused on original checkpoints."
            out.append(Finding("warn", "sd2-attention", text, "use SD2 weights in diffusers layout"))
    return out


def _rank_one(contents: Contents, description: Description) -> list[Finding]:
    """LoKr factors of rank 1 get the scale 1 whatever their alpha."""
    odd = [
        g.name
        for g in description.groups
        if g.algorithm == "LoKr" and rank_of(contents, g) == 1 and contents.alphas.get(g.name, 1.0) != 1.0
    ]
    if not odd:
        return []
    return [Finding("warn", "lokr-rank-one", f"LoKr of rank 1 ignores alpha ({len(odd)}): {some(odd)}.", "use ComfyUI")]
