"""Fixed tables of every module a LoRA can patch in SD1.x, SD2.x and SDXL, in each naming style.

The tables are built from the published block layouts, never from a live model: `named_modules()` of a text
encoder changed with transformers 5.6 (`text_model.` disappeared), and names taken from it load nowhere.

Three styles exist for UNet modules:

* ``diffusers``: ``down_blocks.1.attentions.0.proj_in`` (kohya's SD1/SD2 files),
* ``sgm``: ``input_blocks.4.1.proj_in``, the names of the original checkpoints (kohya's SDXL files),
* text encoders have one style, ``text_model.encoder.layers.0.mlp.fc1``.

In a kohya file every dot of the path becomes an underscore behind a prefix (``lora_unet_``, ``lora_te_`` ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Base = Literal["sd1", "sd2", "sdxl"]
Kind = Literal["linear", "conv1", "conv3", "norm"]
Component = Literal["unet", "te1", "te2", "te3"]
Style = Literal["diffusers", "sgm", "text", "host", "dit", "split", "fused"]
DitBase = Literal[  # `dit_names`, `musubi_names`
    "anima", "sd3", "flux", "chroma", "lumina", "hunyuan_image", "zimage", "qwen_image", "flux2", "krea2", "wan"
]
AnyBase = Base | DitBase | Literal["unknown"]

BASES: tuple[Base, ...] = ("sd1", "sd2", "sdxl")
BASE_LABEL = {
    "sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "anima": "Anima", "sd3": "SD 3", "flux": "FLUX.1",
    "chroma": "Chroma", "lumina": "Lumina 2", "hunyuan_image": "HunyuanImage-2.1", "zimage": "Z-Image",
    "qwen_image": "Qwen-Image", "flux2": "FLUX.2", "krea2": "Krea 2", "wan": "Wan", "unknown": "unknown",
}  # fmt: skip

# Channels per block, transformer depth per down block, width of the text condition, proj_in/proj_out are Linear.
_UNETS: dict[Base, tuple[tuple[int, ...], tuple[int, ...], int, bool]] = {
    "sd1": ((320, 640, 1280, 1280), (1, 1, 1, 0), 768, False),
    "sd2": ((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, True),
    "sdxl": ((320, 640, 1280), (0, 2, 10), 2048, True),
}
# Layers that kohya trains, width, MLP width.
_TEXT_ENCODERS: dict[Base, tuple[tuple[Component, int, int, int], ...]] = {
    "sd1": (("te1", 12, 768, 3072),),
    "sd2": (("te1", 23, 1024, 4096),),
    "sdxl": (("te1", 12, 768, 3072), ("te2", 32, 1280, 5120)),
}
_RESNET_SGM = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}


@dataclass(frozen=True)
class Module:
    """One patchable module of a base model.

    Attributes:
        component: Which network it belongs to. ``te1`` is the only text encoder of SD1/SD2.
        path: Dotted path in the diffusers model.
        sgm: Dotted path in the original (SGM) UNet; equals `path` for text encoders.
        kind: Layer type in the diffusers model; decides 2-D or 4-D factors.
        fan_in: Input features or channels of the released base model.
        fan_out: Output features or channels of the released base model.
        group: ``attention`` (UNet default targets), ``conv`` (added by ``conv_dim``), ``text`` or ``extra``
            (never trained by kohya, but LyCORIS presets reach it).
    """

    component: Component
    path: str
    sgm: str
    kind: Kind
    fan_in: int
    fan_out: int
    group: Literal["attention", "conv", "text", "extra"]


def _transformer(path: str, sgm: str, width: int, depth: int, context: int, linear: bool) -> list[Module]:
    """Modules of one Transformer2DModel of `depth` blocks."""
    proj: Kind = "linear" if linear else "conv1"
    rows: list[tuple[str, Kind, int, int]] = [("proj_in", proj, width, width)]
    for k in range(depth):
        block = f"transformer_blocks.{k}"
        for name, source in (("attn1", width), ("attn2", context)):
            rows.append((f"{block}.{name}.to_q", "linear", width, width))
            rows.append((f"{block}.{name}.to_k", "linear", source, width))
            rows.append((f"{block}.{name}.to_v", "linear", source, width))
            rows.append((f"{block}.{name}.to_out.0", "linear", width, width))
        rows.append((f"{block}.ff.net.0.proj", "linear", width, 8 * width))  # GEGLU: value and gate
        rows.append((f"{block}.ff.net.2", "linear", 4 * width, width))
    rows.append(("proj_out", proj, width, width))
    modules = [Module("unet", f"{path}.{n}", f"{sgm}.{n}", kind, i, o, "attention") for n, kind, i, o in rows]
    norms = ["norm"] + [f"transformer_blocks.{k}.norm{n}" for k in range(depth) for n in (1, 2, 3)]
    return modules + [Module("unet", f"{path}.{n}", f"{sgm}.{n}", "norm", width, width, "extra") for n in norms]


def _resnet(path: str, sgm: str, fan_in: int, fan_out: int, embedding: int) -> list[Module]:
    """Modules of one ResnetBlock2D."""
    rows: list[tuple[str, Kind, int, int]] = [
        ("conv1", "conv3", fan_in, fan_out),
        ("time_emb_proj", "linear", embedding, fan_out),
        ("conv2", "conv3", fan_out, fan_out),
    ]
    if fan_in != fan_out:
        rows.append(("conv_shortcut", "conv1", fan_in, fan_out))
    modules = [Module("unet", f"{path}.{n}", f"{sgm}.{_RESNET_SGM[n]}", kind, i, o, "conv") for n, kind, i, o in rows]
    norms = [("norm1", fan_in), ("norm2", fan_out)]
    return modules + [Module("unet", f"{path}.{n}", f"{sgm}.{_RESNET_SGM[n]}", "norm", w, w, "extra") for n, w in norms]


def _unet(base: Base) -> list[Module]:
    """Every module of the UNet of `base`, in forward order."""
    channels, depths, context, linear = _UNETS[base]
    embedding = 4 * channels[0]
    last = len(channels) - 1
    out: list[Module] = []

    def conv(path: str, sgm: str, width: int) -> Module:
        return Module("unet", path, sgm, "conv3", width, width, "conv")

    def extra(path: str, sgm: str, kind: Kind, fan_in: int, fan_out: int) -> Module:
        return Module("unet", path, sgm, kind, fan_in, fan_out, "extra")

    out.append(extra("conv_in", "input_blocks.0.0", "conv3", 4, channels[0]))
    out.append(extra("time_embedding.linear_1", "time_embed.0", "linear", channels[0], embedding))
    out.append(extra("time_embedding.linear_2", "time_embed.2", "linear", embedding, embedding))
    if base == "sdxl":
        out.append(extra("add_embedding.linear_1", "label_emb.0.0", "linear", 2816, embedding))
        out.append(extra("add_embedding.linear_2", "label_emb.0.2", "linear", embedding, embedding))
    width = channels[0]
    for i, channel in enumerate(channels):
        for j in range(2):
            down, sgm = f"down_blocks.{i}", f"input_blocks.{1 + 3 * i + j}"
            out += _resnet(f"{down}.resnets.{j}", f"{sgm}.0", width, channel, embedding)
            width = channel
            if depths[i]:
                out += _transformer(f"{down}.attentions.{j}", f"{sgm}.1", channel, depths[i], context, linear)
        if i < last:
            out.append(conv(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 + 3 * i}.0.op", channel))
    middle_depth = max(depths[last], 1)  # SD1/SD2 have one block there although their last down block has none
    out += _resnet("mid_block.resnets.0", "middle_block.0", width, width, embedding)
    out += _transformer("mid_block.attentions.0", "middle_block.1", width, middle_depth, context, linear)
    out += _resnet("mid_block.resnets.1", "middle_block.2", width, width, embedding)
    for i in range(len(channels)):
        channel = channels[last - i]
        depth = depths[last - i]
        lower = channels[max(last - i - 1, 0)]
        for j in range(3):
            up, sgm = f"up_blocks.{i}", f"output_blocks.{3 * i + j}"
            skip = lower if j == 2 else channel
            out += _resnet(f"{up}.resnets.{j}", f"{sgm}.0", width + skip, channel, embedding)
            width = channel
            if depth:
                out += _transformer(f"{up}.attentions.{j}", f"{sgm}.1", channel, depth, context, linear)
        if i < last:
            index = 2 if depth else 1  # the upsampler comes after the attention where there is one
            out.append(conv(f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{2 + 3 * i}.{index}.conv", channel))
    out.append(extra("conv_norm_out", "out.0", "norm", channels[0], channels[0]))
    out.append(extra("conv_out", "out.2", "conv3", channels[0], 4))
    return out


def _text_encoder(component: Component, layers: int, width: int, mlp: int) -> list[Module]:
    """Every Linear of a CLIP text encoder that kohya trains."""
    out: list[Module] = []
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        rows = [(f"self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")]
        rows += [("mlp.fc1", width, mlp), ("mlp.fc2", mlp, width)]
        out += [Module(component, f"{layer}.{n}", f"{layer}.{n}", "linear", i_, o_, "text") for n, i_, o_ in rows]
    return out


@cache
def text_modules(component: Component) -> tuple[Module, ...]:
    """Of SDXL's text encoders, which other models have too: CLIP-L is `te1`, OpenCLIP bigG `te2`."""
    return tuple(module for module in modules("sdxl") if module.component == component)


@cache
def modules(base: Base) -> tuple[Module, ...]:
    """Every patchable module of `base`: UNet in forward order, then the text encoders."""
    out = _unet(base)
    for component, layers, width, mlp in _TEXT_ENCODERS[base]:
        out += _text_encoder(component, layers, width, mlp)
    return tuple(out)


def kohya_prefix(base: Base, component: Component) -> str:
    """Prefix kohya gives to modules of `component`: ``lora_te`` on SD1/SD2, ``lora_te1``/``lora_te2`` on SDXL."""
    if component == "unet":
        return "lora_unet"
    return f"lora_{component}" if base == "sdxl" else "lora_te"


def kohya_name(base: Base, module: Module) -> str:
    """Name of `module` in a file written by kohya for `base` (the name every loader understands)."""
    path = module.sgm if base == "sdxl" and module.component == "unet" else module.path
    return f"{kohya_prefix(base, module.component)}_{path.replace('.', '_')}"


def expected_names(base: Base, *, conv: bool = False, text: bool = True) -> list[str]:
    """Names `networks.lora` writes for a complete LoRA.

    Args:
        base: Base model.
        conv: Also the modules added by ``conv_dim``.
        text: Also the text encoder(s).
    """
    groups = {"attention"} | ({"conv"} if conv else set()) | ({"text"} if text else set())
    return [kohya_name(base, m) for m in modules(base) if m.group in groups]


@cache
def _index(base: Base) -> dict[tuple[str, str], tuple[Module, Style]]:
    """(component, underscored path) -> module, for every style."""
    out: dict[tuple[str, str], tuple[Module, Style]] = {}
    for m in modules(base):
        if m.component == "unet":
            out[("unet", m.sgm.replace(".", "_"))] = (m, "sgm")
            out[("unet", m.path.replace(".", "_"))] = (m, "diffusers")
        else:
            out[(m.component, m.path.replace(".", "_"))] = (m, "text")
    return out


# Longest first: lora_te1_ must not be read as lora_te_ with a path starting in "1_".
_PREFIXES: tuple[tuple[str, Component], ...] = (
    ("base_model_model_unet_", "unet"),
    ("base_model_model_", "unet"),
    ("model_diffusion_model_", "unet"),
    ("lora_diffusion_model_", "unet"),
    ("diffusion_model_", "unet"),
    ("lycoris_unet_", "unet"),
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("unet_", "unet"),
    ("text_encoder_2_", "te2"),
    ("lycoris_te2_", "te2"),
    ("lora_te2_", "te2"),
    ("text_encoder_", "te1"),
    ("lycoris_te1_", "te1"),
    ("lora_te1_", "te1"),
    ("lycoris_te_", "te1"),
    ("lora_te_", "te1"),
    ("lycoris_", "unet"),
)


# Text-encoder projections in the first diffusers format: self_attn.to_q_lora.
_OLD_TEXT = re.compile(r"_self_attn_to_(q|k|v|out)$")


@dataclass(frozen=True)
class Resolved:
    """What a module name in a file stands for."""

    module: Module
    style: Style


def resolve(base: Base, name: str) -> Resolved | None:
    """Find the module of `base` that `name` means, in any style seen in the wild.

    Args:
        base: Base model.
        name: Module part of a key, dots or underscores, e.g. ``lora_te_text_model_encoder_layers_0_mlp_fc1`` or
            ``unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q``.

    Returns:
        The module and the style of its path, or None where the table has no such module.
    """
    flat = name.replace(".", "_").replace("_processor_", "_")
    for prefix, component in _PREFIXES:
        if not flat.startswith(prefix):
            continue
        path = flat[len(prefix) :]
        if component != "unet" and path.startswith("encoder_layers_"):
            path = f"text_model_{path}"  # transformers >= 5.6 dropped text_model from the live names
        if component != "unet":
            path = _OLD_TEXT.sub(r"_self_attn_\1_proj", path)
        elif path.endswith("_to_out"):
            path += "_0"  # diffusers' attention processors
        found = _index(base).get((component, path))
        if found is not None:
            return Resolved(*found)
    return None


def fused_attention(base: Base, component: Component) -> bool:
    """Whether the text encoder keeps q, k and v in one `in_proj` in the original checkpoint (OpenCLIP)."""
    return (base == "sdxl" and component == "te2") or (base == "sd2" and component == "te1")


def whole_lokr(keys: Iterable[str]) -> list[str]:
    """LoKr modules whose two factors are whole matrices. They have no rank, and every loader ignores their alpha:
    LyCORIS writes the rank that was asked for, which fp16 may store as infinity."""
    stems: dict[str, set[str]] = {}
    for key in keys:
        stem, _, suffix = key.rpartition(".")
        if suffix in ("lokr_w1", "lokr_w2"):
            stems.setdefault(stem, set()).add(suffix)
    return [stem for stem, found in stems.items() if len(found) == 2]
