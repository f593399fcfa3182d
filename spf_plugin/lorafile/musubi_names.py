"""Fixed tables of every module that a LoRA can patch in the models that musubi-tuner trains: Z-Image, Qwen-Image,
FLUX.2, Krea 2 and Wan.

As in `dit_names`, they are built from the published layouts, and a test compares them with what the host's own networks
make of its models in full size. A module's `path` and `sgm` are the host's path; it is the checkpoint's too, but for
Z-Image, whose checkpoint for ComfyUI keeps q, k and v in one. diffusers calls the modules of Z-Image and Qwen-Image the
same, those of Wan and Krea 2 otherwise, one by one, and splits q, k and v of FLUX.2 (`dit_parts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from spf_plugin.lorafile.names import DitBase, Module, Resolved

MUSUBI_BASES: tuple[DitBase, ...] = ("zimage", "qwen_image", "flux2", "krea2", "wan")
#: What its metadata names: `ss_base_model_version`, `modelspec.architecture`.
METADATA: tuple[tuple[DitBase, str], ...] = (
    ("zimage", "z_image"), ("zimage", "Z-Image"), ("qwen_image", "qwen_image"), ("qwen_image", "Qwen-Image"),
    ("flux2", "flux_2"), ("flux2", "Flux.2"), ("krea2", "krea2"), ("krea2", "Krea-2"), ("wan", "wan"),
)  # fmt: skip
#: What others write before diffusers' path: `dit_parts.PREFIXES`, and nothing.
_PREFIXES = ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_", "")
# diffusers 0.42.1, `_convert_musubi_wan_lora_to_diffusers`, `_convert_non_diffusers_krea2_lora_to_diffusers`.
_DIFFUSERS: Mapping[DitBase, tuple[tuple[str, str], ...]] = {
    "wan": (
        (r"self_attn\.([qkv])$", r"attn1.to_\1"),
        (r"self_attn\.o$", "attn1.to_out.0"),
        (r"cross_attn\.([qkv])$", r"attn2.to_\1"),
        (r"cross_attn\.o$", "attn2.to_out.0"),
        (r"cross_attn\.([kv])_img$", r"attn2.add_\1_proj"),
        (r"ffn\.0$", "ffn.net.0.proj"),
        (r"ffn\.2$", "ffn.net.2"),
    ),
    "krea2": (
        (r"^blocks\.", "transformer_blocks."),
        (r"^txtfusion\.", "text_fusion."),
        (r"attn\.w([qkv])$", r"attn.to_\1"),
        (r"attn\.wo$", "attn.to_out.0"),
        (r"attn\.gate$", "attn.to_gate"),
        (r"\.mlp\.", ".ff."),
        (r"^first$", "img_in"),
        (r"^last\.", "final_layer."),
        (r"^tmlp\.0$", "time_embed.linear_1"),
        (r"^tmlp\.2$", "time_embed.linear_2"),
        (r"^tproj\.1$", "time_mod_proj"),
        (r"^txtmlp\.1$", "txt_in.linear_1"),
        (r"^txtmlp\.3$", "txt_in.linear_2"),
    ),
}
_WIDTHS = (6144, 4096, 3072)  # FLUX.2 dev, klein 9B and 4B, all other sizes in proportion
_WAN = ((5120, 13824), (1536, 8960), (3072, 14336))  # width, feed-forward: 14B, 1.3B, and 2.2's 5B

Row = tuple[str, int, int]  # path, features in, features out


def _zimage() -> Iterator[Row]:
    width, mlp = 3840, 10240
    for part, count, modulated in (("layers", 30, True), ("noise_refiner", 2, True), ("context_refiner", 2, False)):
        for i in range(count):
            block = f"{part}.{i}"
            yield from ((f"{block}.attention.{name}", width, width) for name in ("to_q", "to_k", "to_v", "to_out.0"))
            yield f"{block}.feed_forward.w1", width, mlp
            yield f"{block}.feed_forward.w2", mlp, width
            yield f"{block}.feed_forward.w3", width, mlp
            if modulated:  # with include_patterns only
                yield f"{block}.adaLN_modulation.0", 256, 4 * width


def _qwen_image() -> Iterator[Row]:
    width = 3072
    inner = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    for i in range(60):
        block = f"transformer_blocks.{i}"
        yield from ((f"{block}.attn.{name}", width, width) for name in inner)
        for side in ("img", "txt"):
            yield f"{block}.{side}_mlp.net.0.proj", width, 4 * width
            yield f"{block}.{side}_mlp.net.2", 4 * width, width
            yield f"{block}.{side}_mod.1", width, 6 * width  # with include_patterns only


def _flux2() -> Iterator[Row]:
    """The gate doubles what goes into a feed-forward."""
    width = _WIDTHS[0]
    for i in range(8):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            yield f"{block}_attn.qkv", width, 3 * width
            yield f"{block}_attn.proj", width, width
            yield f"{block}_mlp.0", width, 6 * width
            yield f"{block}_mlp.2", 3 * width, width
    for i in range(48):
        yield f"single_blocks.{i}.linear1", width, 9 * width
        yield f"single_blocks.{i}.linear2", 4 * width, width


def _krea2() -> Iterator[Row]:
    """All of the model, as its network takes it."""
    width, text = 6144, 2560
    for part, count, size, groups, mlp in (
        ("blocks", 28, width, 4, 16384), ("txtfusion.layerwise_blocks", 2, text, 1, 6912),
        ("txtfusion.refiner_blocks", 2, text, 1, 6912),
    ):  # fmt: skip
        for i in range(count):
            block = f"{part}.{i}"
            yield from ((f"{block}.attn.{name}", size, size) for name in ("wq", "gate", "wo"))
            yield from ((f"{block}.attn.{name}", size, size // groups) for name in ("wk", "wv"))
            yield from ((f"{block}.mlp.{name}", size, mlp) for name in ("gate", "up"))
            yield f"{block}.mlp.down", mlp, size
    yield from (("first", 64, width), ("last.linear", width, 64), ("tmlp.0", 256, width), ("tmlp.2", width, width))
    yield from (("tproj.1", width, 6 * width), ("txtmlp.1", text, width), ("txtmlp.3", width, width))
    yield "txtfusion.projector", 12, 1


def _wan() -> Iterator[Row]:
    width, mlp = _WAN[0]
    for i in range(40):
        for side, names in (("self_attn", "q k v o"), ("cross_attn", "q k v o k_img v_img")):  # img: image to video
            yield from ((f"blocks.{i}.{side}.{name}", width, width) for name in names.split())
        yield f"blocks.{i}.ffn.0", width, mlp
        yield f"blocks.{i}.ffn.2", mlp, width


_ROWS = {"zimage": _zimage, "qwen_image": _qwen_image, "flux2": _flux2, "krea2": _krea2, "wan": _wan}


@cache
def modules(base: DitBase) -> tuple[Module, ...]:
    """Every module of `base` that the host can train."""
    return tuple(Module("unet", path, path, "linear", i, o, "attention") for path, i, o in _ROWS[base]())


@cache
def fused(base: DitBase) -> dict[str, Module]:
    """Path in Z-Image's checkpoint for ComfyUI -> the module, where it is not the host's: q, k and v in one, and what
    comes out of it; of the other models none."""
    if base != "zimage":
        return {}
    out = {}
    for module in modules(base):
        block, _, name = module.path.rpartition(".attention.")
        for whole, part, size in (("qkv", "to_q", 3), ("out", "to_out.0", 1)):
            if name == part:
                path = f"{block}.attention.{whole}"
                out[path] = Module("unet", path, path, "linear", module.fan_in, size * module.fan_out, "attention")
    return out


def unfused(path: str) -> tuple[str, ...]:
    """The host's modules in one of `fused`, in the order of their rows."""
    block, _, name = path.rpartition(".")
    return tuple(f"{block}.{part}" for part in (("to_q", "to_k", "to_v") if name == "qkv" else ("to_out.0",)))


def sizes(base: DitBase, module: Module) -> set[tuple[int, int]]:
    """Features in and out of a module, in each size that the model comes in."""
    pair = module.fan_in, module.fan_out
    if base == "flux2":
        return {(pair[0] * width // _WIDTHS[0], pair[1] * width // _WIDTHS[0]) for width in _WIDTHS}
    if base == "wan":
        return {tuple(size[_WAN[0].index(n)] for n in pair) for size in _WAN}  # type: ignore[misc]
    return {pair}


def diffusers_path(base: DitBase, path: str) -> str:
    """What diffusers calls a module, of models whose modules it does not split."""
    for pattern, theirs in _DIFFUSERS.get(base, ()):
        path = re.sub(pattern, theirs, path)
    return path


@cache
def index(base: DitBase) -> dict[str, Resolved]:
    """Underscored name -> module, for every style: ``host`` as the host writes it, ``dit`` its path, ``diffusers``,
    ``fused``."""
    out: dict[str, Resolved] = {}
    if base != "flux2":
        for module in modules(base):
            theirs = diffusers_path(base, module.path)
            for prefix in (*_PREFIXES, "diffusion_model."):
                out[f"{prefix}{theirs}".replace(".", "_")] = Resolved(module, "diffusers")
    for module in (*modules(base), *fused(base).values()):
        flat = module.path.replace(".", "_")
        own = module.path in fused(base)
        for prefix in ("diffusion_model_", "base_model_model_"):
            out[f"{prefix}{flat}"] = Resolved(module, "fused" if own else "dit")
        out[f"lora_unet_{flat}"] = Resolved(module, "fused" if own else "host")
    return out


@cache
def comfy_names(base: DitBase) -> frozenset[str]:
    """Module names that ComfyUI maps: run in v0.19.3; of Krea 2 read in 17358c8f."""
    out = set()
    for module in (*modules(base), *fused(base).values()):
        split = base == "zimage" and ".attention.to_" in module.path
        out |= {f"diffusion_model.{module.path}"}
        out |= set() if split else {f"lora_unet_{module.path.replace('.', '_')}"}
        if base in ("zimage", "qwen_image", "krea2") and module.path not in fused(base):
            theirs = diffusers_path(base, module.path)
            out |= {theirs, f"transformer.{theirs}", f"lycoris_{theirs.replace('.', '_')}"}
            out |= set() if base == "qwen_image" else {f"diffusion_model.{theirs}"}
    return frozenset(out)
