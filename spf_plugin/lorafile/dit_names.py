"""Fixed tables of every module that a LoRA can patch in the diffusion transformers that sd-scripts trains, and what is
asked of any transformer's names; those that musubi-tuner trains stand in `musubi_names`.

As in `names`, they are built from the published layouts, and a test compares them with what the host's own networks
make of its models. Each model has three styles: ``dit``, the paths of the original checkpoint, ``host``, where
sd-scripts calls a module otherwise (HunyuanImage), and diffusers' paths: ``diffusers`` for Anima, whose modules are the
same there, ``split`` for the others, whose modules it splits (`dit_parts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import cast

from spf_plugin.lorafile import dit_parts, musubi_names, names
from spf_plugin.lorafile.musubi_names import MUSUBI_BASES
from spf_plugin.lorafile.names import AnyBase, Base, Component, DitBase, Module, Resolved, text_modules

SD_SCRIPTS_BASES: tuple[DitBase, ...] = ("anima", "sd3", "flux", "chroma", "lumina", "hunyuan_image")
DIT_BASES = SD_SCRIPTS_BASES + MUSUBI_BASES
#: Prefix of sd-scripts for each part of the text side. T5 is the third of FLUX.1 too, which has two.
_TEXT: dict[DitBase, tuple[tuple[str, Component, str], ...]] = {
    "anima": (("lora_te", "te1", "qwen3"),),
    "sd3": (("lora_te1", "te1", "clip_l"), ("lora_te2", "te2", "clip_g"), ("lora_te3", "te3", "t5")),
    "flux": (("lora_te1", "te1", "clip_l"), ("lora_te3", "te3", "t5")),
    "chroma": (("lora_te3", "te3", "t5"),),
    "lumina": (("lora_te", "te1", "gemma2"),),
    "hunyuan_image": (),
}
_METADATA: tuple[tuple[DitBase, str], ...] = (
    *musubi_names.METADATA,  # flux_2 before flux
    ("anima", "anima"),
    ("sd3", "stable-diffusion-3"),
    ("sd3", "sd3"),
    ("flux", "flux"),
    ("chroma", "chroma"),
    ("lumina", "lumina"),
    ("hunyuan_image", "hunyuan-image"),
)
_GENERIC = "diffusion_model"  # prefix of a path with dots: ComfyUI's, and diffusers' for Anima and Lumina 2
_HOST_NAMES = (("_mlp.0", "_mlp.fc1"), ("_mlp.2", "_mlp.fc2"), ("_mod.lin", "_mod.linear"))
# diffusers 58eb52c0, `_convert_non_diffusers_anima_lora_to_diffusers`, in its order.
_ANIMA_DIFFUSERS = (
    (r"^blocks\.", "transformer_blocks."),
    (r"adaln_modulation_self_attn\.(\d)", r"norm1.linear_\1"),
    (r"adaln_modulation_cross_attn\.(\d)", r"norm2.linear_\1"),
    (r"adaln_modulation_mlp\.(\d)", r"norm3.linear_\1"),
    (r"self_attn\.([qkv])_proj", r"attn1.to_\1"),
    (r"self_attn\.output_proj", "attn1.to_out.0"),
    (r"cross_attn\.([qkv])_proj", r"attn2.to_\1"),
    (r"cross_attn\.output_proj", "attn2.to_out.0"),
    (r"mlp\.layer1", "ff.net.0.proj"),
    (r"mlp\.layer2", "ff.net.2"),
)

Row = tuple[str, int, int]  # path, features in, features out


def _anima() -> Iterator[Row]:
    width, text, mlp = 2048, 1024, 8192
    for i in range(28):
        for name, source in (("self_attn", width), ("cross_attn", text)):
            yield from ((f"blocks.{i}.{name}.{p}_proj", s, width) for p, s in (("q", width), ("k", source)))
            yield from ((f"blocks.{i}.{name}.{p}_proj", s, width) for p, s in (("v", source), ("output", width)))
        yield f"blocks.{i}.mlp.layer1", width, mlp
        yield f"blocks.{i}.mlp.layer2", mlp, width
        for name in ("self_attn", "cross_attn", "mlp"):  # with include_patterns only
            yield f"blocks.{i}.adaln_modulation_{name}.1", width, 256
            yield f"blocks.{i}.adaln_modulation_{name}.2", 256, 3 * width
    for i in range(6):  # with train_llm_adapter only
        for name in ("self_attn", "cross_attn"):
            yield from ((f"llm_adapter.blocks.{i}.{name}.{p}_proj", text, text) for p in "qkvo")
        yield f"llm_adapter.blocks.{i}.mlp.0", text, 4 * text
        yield f"llm_adapter.blocks.{i}.mlp.2", 4 * text, text


def _flux(width: int, double: int, single: int, *, modulation: bool) -> Iterator[Row]:
    mlp = 4 * width
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            if modulation:
                yield f"{block}_mod.lin", width, 6 * width
            yield f"{block}_attn.qkv", width, 3 * width
            yield f"{block}_attn.proj", width, width
            yield f"{block}_mlp.0", width, mlp
            yield f"{block}_mlp.2", mlp, width
    for i in range(single):
        yield f"single_blocks.{i}.linear1", width, 3 * width + mlp
        yield f"single_blocks.{i}.linear2", width + mlp, width
        if modulation:
            yield f"single_blocks.{i}.modulation.lin", width, 3 * width


def _sd3() -> Iterator[Row]:
    """SD3.5 medium's names, which hold those of SD3 medium; of SD3.5 large there are more blocks, of the same names."""
    width = 1536
    for i in range(38):
        for side in ("context_block", "x_block"):
            block = f"joint_blocks.{i}.{side}"
            rows = [("attn.qkv", width, 3 * width), ("attn.proj", width, width), ("mlp.fc1", width, 4 * width)]
            rows += [("mlp.fc2", 4 * width, width), ("adaLN_modulation.1", width, 6 * width)]
            rows += [("attn2.qkv", width, 3 * width), ("attn2.proj", width, width)] if side == "x_block" else []
            yield from ((f"{block}.{name}", fan_in, fan_out) for name, fan_in, fan_out in rows)


def _lumina() -> Iterator[Row]:
    width, condition, mlp = 2304, 1024, 9216
    for part, count, modulated in (("context_refiner", 2, False), ("noise_refiner", 2, True), ("layers", 26, True)):
        for i in range(count):
            yield f"{part}.{i}.attention.qkv", width, 3840  # 24 heads of queries, 8 of keys and values, 96 wide
            yield f"{part}.{i}.attention.out", width, width
            yield f"{part}.{i}.feed_forward.w1", width, mlp
            yield f"{part}.{i}.feed_forward.w2", mlp, width
            yield f"{part}.{i}.feed_forward.w3", width, mlp
            if modulated:
                yield f"{part}.{i}.adaLN_modulation.1", condition, 4 * width
    yield "final_layer.linear", width, 64
    yield "final_layer.adaLN_modulation.1", condition, width


def _text(kind: str) -> Iterator[Row]:
    """A language model's linear layers: Qwen3 0.6B, Gemma 2 2B, T5-XXL's encoder."""
    if kind == "t5":
        for i in range(24):
            block = f"encoder.block.{i}.layer"
            yield from ((f"{block}.0.SelfAttention.{p}", 4096, 4096) for p in "qkvo")
            yield from ((f"{block}.1.DenseReluDense.{p}", 4096, 10240) for p in ("wi_0", "wi_1"))
            yield f"{block}.1.DenseReluDense.wo", 10240, 4096
        return
    layers, width, keys, mlp = (28, 1024, 1024, 3072) if kind == "qwen3" else (26, 2304, 1024, 9216)
    for i in range(layers):
        yield from ((f"layers.{i}.self_attn.{p}_proj", width, out) for p, out in zip("qkv", (2048, keys, keys)))  # noqa: B905
        yield f"layers.{i}.self_attn.o_proj", 2048, width
        yield from ((f"layers.{i}.mlp.{p}_proj", width, mlp) for p in ("gate", "up"))
        yield f"layers.{i}.mlp.down_proj", mlp, width


def _rows(base: DitBase) -> Iterator[Row]:
    if base == "anima":
        yield from _anima()
    elif base == "sd3":
        yield from _sd3()
    elif base == "lumina":
        yield from _lumina()
    elif base == "hunyuan_image":
        yield from _flux(3584, 20, 40, modulation=True)
    else:
        yield from _flux(3072, 19, 38, modulation=base == "flux")


def host_path(base: DitBase, path: str) -> str:
    """What sd-scripts calls a module of the original checkpoint."""
    if base == "hunyuan_image":
        for original, theirs in _HOST_NAMES:
            path = path.replace(original, theirs)
        path = path.replace("modulation.lin", "modulation.linear")
    return path


@cache
def modules(base: DitBase) -> tuple[Module, ...]:
    """Every module of `base` that the host can train: `path` as the host calls it, `sgm` as the checkpoint does."""
    if base in MUSUBI_BASES:
        return musubi_names.modules(base)
    out = [Module("unet", host_path(base, path), path, "linear", i, o, "attention") for path, i, o in _rows(base)]
    for _, component, kind in _TEXT[base]:
        if kind.startswith("clip"):
            out += text_modules("te1" if kind == "clip_l" else "te2")
        else:
            out += [Module(component, path, path, "linear", i, o, "text") for path, i, o in _text(kind)]
    return tuple(out)


def told_by(version: str, architecture: str) -> DitBase | None:
    """The model that the host's metadata names: `ss_base_model_version`, `modelspec.architecture`."""
    return next(
        (base for base, start in _METADATA if version.startswith(start) or architecture.startswith(start)), None
    )


def _prefix(base: DitBase, component: Component) -> str:
    return next((prefix for prefix, part, _ in _TEXT.get(base, ()) if part == component), "lora_unet")


def kohya_name(base: AnyBase, module: Module, *, original: bool = False) -> str:
    """Name of a module in a file that the host writes, of SD and SDXL too.

    Args:
        base: base model, not ``unknown``.
        module: of its table.
        original: with the checkpoint's path, which ComfyUI maps.
    """
    if base not in DIT_BASES:
        return names.kohya_name(cast(Base, base), module)
    path = module.sgm if original else module.path
    return f"{_prefix(base, module.component)}_{path.replace('.', '_')}"


def diffusers_name(base: DitBase, module: Module) -> str | None:
    """Path in diffusers' pipeline; None where diffusers joins or splits it, or it is not known here."""
    if base in MUSUBI_BASES and base != "flux2":
        return f"transformer.{musubi_names.diffusers_path(base, module.path)}"
    if base != "anima" or module.component != "unet":
        return None
    if module.path.startswith("llm_adapter."):
        return f"text_conditioner.{module.path.removeprefix('llm_adapter.')}"
    path = module.path
    for pattern, theirs in _ANIMA_DIFFUSERS:
        path = re.sub(pattern, theirs, path)
    return f"transformer.{path}"


@cache
def _index(base: DitBase) -> dict[str, Resolved]:
    """Underscored name -> module, for every style."""
    musubi = base in MUSUBI_BASES
    out: dict[str, Resolved] = dict(musubi_names.index(base)) if musubi else {}
    for module in () if musubi else modules(base):
        generic = [module.sgm, module.path] if module.component == "unet" else []
        for name in [kohya_name(base, module), kohya_name(base, module, original=True)]:
            out[name] = Resolved(module, "host" if name == kohya_name(base, module) else "dit")
        for path in generic:
            out[f"{_GENERIC}_{path.replace('.', '_')}"] = Resolved(module, "dit")
        theirs = diffusers_name(base, module)
        if theirs:
            out[theirs.replace(".", "_")] = Resolved(module, "diffusers")
        if module.group == "text":
            for name in _text_names(base, module):
                out.setdefault(name, Resolved(module, "text"))
    for path, part in dit_parts.parts(base).items():
        for prefix in (*dit_parts.PREFIXES, *([""] if musubi else [])):
            out[f"{prefix}{path}".replace(".", "_")] = Resolved(part.module, "split")
    return out


def _text_names(base: DitBase, module: Module) -> Iterator[str]:
    """What others call a text encoder's module: diffusers CLIP's, OneTrainer T5's of FLUX.1."""
    flat = module.path.replace(".", "_")
    if module.path.startswith("text_model."):
        yield f"{'text_encoder' if module.component == 'te1' else 'text_encoder_2'}_{flat}"
    elif base == "flux":
        yield f"lora_te2_{flat}"


def resolve(base: AnyBase, name: str) -> Resolved | None:
    """Find the module of `base` that `name` means: the host's name, ``diffusion_model.PATH``, or diffusers' path
    behind what trainers write before it. Of SD and SDXL what `names` finds; None where no table has it."""
    if base in DIT_BASES:
        return _index(base).get(name.replace(".", "_"))
    return None if base == "unknown" else names.resolve(cast(Base, base), name)


def detect(found: Mapping[str, tuple[int, int] | None], told: str) -> tuple[DitBase, str] | None:
    """The model whose names these are, and why: ``shapes`` or ``names``; None where they are of none of these, or of
    text encoders only.

    Args:
        found: module name -> (fan_in, fan_out), or None where its factors do not say it.
        told: what the metadata says; decides between FLUX.1 and Chroma where no module tells.
    """
    scores = []
    for base in DIT_BASES:
        pairs = [(resolve(base, name), fans) for name, fans in found.items()]
        mine = [(r.module, fans) for r, fans in pairs if r is not None and r.module.component == "unet"]
        fitting = sum(dit_parts.fits(base, module, fans) for module, fans in mine)
        scores.append((fitting, len(mine), base == told, base))
    fitting, known, _, best = max(scores, key=lambda score: score[:3])  # of a tie the first
    if not known:
        return None
    rivals = [score for score in scores if score[1] >= known and score[3] != best and score[0] < fitting]
    return best, "shapes" if rivals else "names"
