"""The modules of diffusers' transformers whose layout is not the original checkpoint's, and where each lies in that.

diffusers keeps q, k and v of an attention apart, and FLUX.1's `linear1` as four; a few modules have their two halves in
the other order. Built from diffusers' published classes; a test compares the tables with the classes themselves, others
the places with diffusers' own converters. Modules that are the same in both stand in `dit_names` and `musubi_names`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from spf_plugin.lorafile import musubi_names
from spf_plugin.lorafile.names import AnyBase, DitBase, Module

#: What trainers write before such a path: diffusers' own scripts and ai-toolkit, PEFT, OneTrainer, SimpleTuner.
PREFIXES = ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_")
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_SD3_WIDTHS = (1536, 2432)  # medium, both of them, and 3.5 large


@dataclass(frozen=True)
class Part:
    """A module of diffusers' model.

    Attributes:
        module: diffusers' path is its `path`, the checkpoint's module its `sgm`; features in and out are its own.
        start: the first of its outputs among those of the checkpoint's module.
    """

    module: Module
    start: int = 0


def swapped(path: str, fan_in: int, fan_out: int) -> bool:
    """Whether diffusers has scale and shift in the other order: after the last block, and in SD 3's last block."""
    return path == "norm_out.linear" or (path.endswith(".norm1_context.linear") and fan_out == 2 * fan_in)


Row = tuple[str, str, int, int, int]  # diffusers' path, the checkpoint's, features in, features out, first row there


def _split(path: str, names: tuple[str, ...], whole: str, width: int) -> Iterator[Row]:
    yield from ((f"{path}.{name}", whole, width, width, i * width) for i, name in enumerate(names))


def _feed(path: str, whole: tuple[str, str], width: int) -> Iterator[Row]:
    yield f"{path}.net.0.proj", whole[0], width, 4 * width, 0
    yield f"{path}.net.2", whole[1], 4 * width, width, 0


def _embedders(names: tuple[tuple[str, str, int], ...], ends: tuple[str, str], width: int) -> Iterator[Row]:
    for path, whole, fan_in in names:
        yield f"time_text_embed.{path}.linear_1", f"{whole}.{ends[0]}", fan_in, width, 0
        yield f"time_text_embed.{path}.linear_2", f"{whole}.{ends[1]}", width, width, 0


def _last(width: int) -> Iterator[Row]:
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", width, 2 * width, 0
    yield "proj_out", "final_layer.linear", width, 64, 0


def _sd3() -> Iterator[Row]:
    """SD 3.5 medium's sizes, and the number of 3.5 large's blocks."""
    width = _SD3_WIDTHS[0]
    for i in range(38):
        block, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        image, text = f"{theirs}.x_block", f"{theirs}.context_block"
        yield from _split(f"{block}.attn", _QKV, f"{image}.attn.qkv", width)
        yield from _split(f"{block}.attn", _ADDED, f"{text}.attn.qkv", width)
        yield from _split(f"{block}.attn2", _QKV, f"{image}.attn2.qkv", width)
        yield f"{block}.attn.to_out.0", f"{image}.attn.proj", width, width, 0
        yield f"{block}.attn2.to_out.0", f"{image}.attn2.proj", width, width, 0
        yield f"{block}.attn.to_add_out", f"{text}.attn.proj", width, width, 0
        yield from _feed(f"{block}.ff", (f"{image}.mlp.fc1", f"{image}.mlp.fc2"), width)
        yield from _feed(f"{block}.ff_context", (f"{text}.mlp.fc1", f"{text}.mlp.fc2"), width)
        yield f"{block}.norm1.linear", f"{image}.adaLN_modulation.1", width, 6 * width, 0
        yield f"{block}.norm1_context.linear", f"{text}.adaLN_modulation.1", width, 6 * width, 0
    yield "context_embedder", "context_embedder", 4096, width, 0
    names = (("timestep_embedder", "t_embedder", 256), ("text_embedder", "y_embedder", 2048))
    yield from _embedders(names, ("mlp.0", "mlp.2"), width)
    yield from _last(width)


def _flux(width: int, double: int, single: int, *, modulation: bool) -> Iterator[Row]:
    for i in range(double):
        block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from _split(f"{block}.attn", _QKV, f"{theirs}.img_attn.qkv", width)
        yield from _split(f"{block}.attn", _ADDED, f"{theirs}.txt_attn.qkv", width)
        yield f"{block}.attn.to_out.0", f"{theirs}.img_attn.proj", width, width, 0
        yield f"{block}.attn.to_add_out", f"{theirs}.txt_attn.proj", width, width, 0
        yield from _feed(f"{block}.ff", (f"{theirs}.img_mlp.0", f"{theirs}.img_mlp.2"), width)
        yield from _feed(f"{block}.ff_context", (f"{theirs}.txt_mlp.0", f"{theirs}.txt_mlp.2"), width)
        if modulation:
            yield f"{block}.norm1.linear", f"{theirs}.img_mod.lin", width, 6 * width, 0
            yield f"{block}.norm1_context.linear", f"{theirs}.txt_mod.lin", width, 6 * width, 0
    for i in range(single):
        block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from _split(f"{block}.attn", _QKV, f"{theirs}.linear1", width)
        yield f"{block}.proj_mlp", f"{theirs}.linear1", width, 4 * width, 3 * width
        yield f"{block}.proj_out", f"{theirs}.linear2", 5 * width, width, 0
        if modulation:
            yield f"{block}.norm.linear", f"{theirs}.modulation.lin", width, 3 * width, 0


def _flux_outside(width: int, *, modulation: bool) -> Iterator[Row]:
    yield "x_embedder", "img_in", 64, width, 0
    yield "context_embedder", "txt_in", 4096, width, 0
    if not modulation:
        yield "proj_out", "final_layer.linear", width, 64, 0
        return
    names = (("timestep_embedder", "time_in", 256), ("text_embedder", "vector_in", 768))
    yield from _embedders((*names, ("guidance_embedder", "guidance_in", 256)), ("in_layer", "out_layer"), width)
    yield from _last(width)


def _flux2() -> Iterator[Row]:
    """FLUX.2 dev's sizes; of what lies outside the blocks, where no network of the host reaches, nothing."""
    width = 6144
    for i in range(8):
        block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for names, side, out, feed in ((_QKV, "img", "to_out.0", "ff"), (_ADDED, "txt", "to_add_out", "ff_context")):
            yield from _split(f"{block}.attn", names, f"{theirs}.{side}_attn.qkv", width)
            yield f"{block}.attn.{out}", f"{theirs}.{side}_attn.proj", width, width, 0
            yield f"{block}.{feed}.linear_in", f"{theirs}.{side}_mlp.0", width, 6 * width, 0
            yield f"{block}.{feed}.linear_out", f"{theirs}.{side}_mlp.2", 3 * width, width, 0
    for i in range(48):
        block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield f"{block}.attn.to_qkv_mlp_proj", f"{theirs}.linear1", width, 9 * width, 0
        yield f"{block}.attn.to_out", f"{theirs}.linear2", 4 * width, width, 0


def _lumina() -> Iterator[Row]:
    width, condition, mlp = 2304, 1024, 9216
    for part, count, modulated in (("context_refiner", 2, False), ("noise_refiner", 2, True), ("layers", 26, True)):
        for i in range(count):
            block = f"{part}.{i}"
            for name, start, fan_out in (("to_q", 0, width), ("to_k", width, 768), ("to_v", width + 768, 768)):
                yield f"{block}.attn.{name}", f"{block}.attention.qkv", width, fan_out, start
            yield f"{block}.attn.to_out.0", f"{block}.attention.out", width, width, 0
            yield f"{block}.feed_forward.linear_1", f"{block}.feed_forward.w1", width, mlp, 0
            yield f"{block}.feed_forward.linear_2", f"{block}.feed_forward.w2", mlp, width, 0
            yield f"{block}.feed_forward.linear_3", f"{block}.feed_forward.w3", width, mlp, 0
            if modulated:
                yield f"{block}.norm1.linear", f"{block}.adaLN_modulation.1", condition, 4 * width, 0
    yield "norm_out.linear_1", "final_layer.adaLN_modulation.1", condition, width, 0
    yield "norm_out.linear_2", "final_layer.linear", width, 64, 0


def _rows(base: DitBase) -> Iterator[Row]:
    if base == "sd3":
        yield from _sd3()
    elif base == "lumina":
        yield from _lumina()
    elif base == "hunyuan_image":
        yield from _flux(3584, 20, 40, modulation=True)
    elif base == "flux2":
        yield from _flux2()
    elif base in ("flux", "chroma"):
        yield from _flux(3072, 19, 38, modulation=base == "flux")
        yield from _flux_outside(3072, modulation=base == "flux")


@cache
def parts(base: DitBase) -> dict[str, Part]:
    """diffusers' path -> the part, of every module that diffusers splits, joins or calls otherwise; none of Anima and
    of the models in `musubi_names` but FLUX.2."""
    inside = "blocks", "layers.", "refiner."
    return {
        path: Part(
            Module("unet", path, whole, "linear", i, o, "attention" if any(p in path for p in inside) else "extra"),
            start,
        )
        for path, whole, i, o, start in _rows(base)
    }


@cache
def siblings(base: DitBase) -> dict[str, tuple[Part, ...]]:
    """The checkpoint's path -> the parts of that module, in the order of their rows."""
    out: dict[str, list[Part]] = {}
    for part in parts(base).values():
        out.setdefault(part.module.sgm, []).append(part)
    return {whole: tuple(sorted(found, key=lambda part: part.start)) for whole, found in out.items()}


def fits(base: AnyBase, module: Module, fans: tuple[int, int] | None) -> bool:
    """Whether features in and out are those of the module, in one of the sizes that the model comes in."""
    if fans == (module.fan_in, module.fan_out):
        return True
    if base in musubi_names.MUSUBI_BASES:
        return fans in musubi_names.sizes(base, module)
    if base != "sd3" or fans is None:
        return False
    medium, large = _SD3_WIDTHS
    modulation = (
        "adaLN" in module.sgm
    )  # of the last block and of blocks with two attentions it is other than of the rest
    outs = {module.fan_out} | ({2 * medium, 9 * medium} if modulation else set())
    sizes = {(module.fan_in, out) for out in outs}
    return fans in sizes | {tuple(n // medium * large if n % medium == 0 else n for n in size) for size in sizes}
