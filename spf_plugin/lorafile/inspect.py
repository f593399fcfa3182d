"""What a LoRA file is: base model, algorithm, ranks, alphas, targets, settings. Decides nothing about loaders."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from spf_plugin.lorafile import dit_names, dit_parts, names, reader
from spf_plugin.lorafile.names import BASES, AnyBase, Base, Resolved
from spf_plugin.lorafile.record import CONTINUED_WITH, KEY, Run

FP16_MAX = 65504.0

Format = Literal["kohya", "diffusers", "peft"]

# Key suffix -> (canonical suffix, format). Longest first, because "lora.up.weight" ends with "up.weight".
_SUFFIXES: tuple[tuple[str, str, Format], ...] = (
    (".lora_linear_layer.down.weight", "lora_down.weight", "diffusers"),
    (".lora_linear_layer.up.weight", "lora_up.weight", "diffusers"),
    ("_lora.down.weight", "lora_down.weight", "diffusers"),
    ("_lora.up.weight", "lora_up.weight", "diffusers"),
    (".lora.down.weight", "lora_down.weight", "diffusers"),
    (".lora.up.weight", "lora_up.weight", "diffusers"),
    (".lora_A.default.weight", "lora_down.weight", "peft"),
    (".lora_B.default.weight", "lora_up.weight", "peft"),
    (".lora_A.weight", "lora_down.weight", "peft"),
    (".lora_B.weight", "lora_up.weight", "peft"),
    (".lora_down.weight", "lora_down.weight", "kohya"),
    (".lora_mid.weight", "lora_mid.weight", "kohya"),
    (".lora_up.weight", "lora_up.weight", "kohya"),
)
# Suffixes of the other algorithms, all directly behind the first dot of a kohya-style key.
_ALGORITHM: tuple[tuple[str, str], ...] = (
    ("lora_up.weight", "LoRA"),
    ("lora_down.weight", "LoRA"),
    ("hada_w1_a", "LoHa"),
    ("lokr_w1", "LoKr"),
    ("lokr_w1_a", "LoKr"),
    ("lokr_w2", "LoKr"),
    ("oft_blocks", "OFT"),
    ("oft_diag", "OFT"),
    ("a1.weight", "GLoRA"),
    ("lambda_layer", "T-LoRA"),
    ("on_input", "IA3"),
    ("diff", "full"),
    ("w_norm", "norm"),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor as far as the rules need it: dtype in safetensors spelling, shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """Everything the rules of `loaders` look at.

    Attributes:
        tensors: Key -> dtype and shape.
        metadata: The metadata strings.
        alphas: Module name -> its stored alpha.
        non_finite: Keys that hold NaN or infinity.
        over_fp16: Keys with a value beyond the fp16 range (65504).
        zero: Keys whose values are all zero.
        opens_with_quote: See `reader.Header`.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    alphas: Mapping[str, float] = field(default_factory=dict)
    non_finite: tuple[str, ...] = ()
    over_fp16: tuple[str, ...] = ()
    zero: frozenset[str] = frozenset()
    opens_with_quote: bool = True


_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors spelling of a torch dtype, e.g. ``F16``; torch's own name where safetensors has none."""
    return _DTYPE_NAMES.get(dtype, str(dtype))


def gather(tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str], quote: bool = True) -> Contents:
    """Collect `Contents` from (key, tensor) pairs, one at a time.

    Args:
        tensors: Pairs; each tensor is looked at once and let go.
        metadata: The file's metadata.
        quote: See `reader.Header.opens_with_quote`.
    """
    infos: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    non_finite: list[str] = []
    over: list[str] = []
    zero: set[str] = set()
    for key, tensor in tensors:
        infos[key] = Tensor(dtype_name(tensor.dtype), tuple(tensor.shape))
        if tensor.numel() == 0:
            continue
        values = tensor.detach()
        if values.dtype.is_floating_point:
            peak = float(values.abs().max() if values.dtype.itemsize > 1 else values.float().abs().max())
            if not math.isfinite(peak):
                non_finite.append(key)
            elif peak > FP16_MAX:
                over.append(key)
            elif peak == 0.0:
                zero.add(key)
        if key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key[: -len(".alpha")]] = float(values.reshape(-1)[0])
    unread = {f"{stem}.alpha" for stem in names.whole_lokr(infos)}
    non_finite, over = ([key for key in keys if key not in unread] for keys in (non_finite, over))
    return Contents(infos, metadata, alphas, tuple(non_finite), tuple(over), frozenset(zero), quote)


def from_file(path: str | Path) -> Contents:
    """Read `Contents` from a safetensors file, tensor by tensor.

    Raises:
        reader.UnreadableFile: See `reader.read_header`.
    """
    header = reader.read_header(path)
    return gather(reader.iter_tensors(path, header), header.metadata, header.opens_with_quote)


def split_key(key: str) -> tuple[str, str, Format]:
    """Split a tensor name into (module name, canonical suffix, format).

    ``lora_unet_mid_block_..._to_q.alpha`` -> (``lora_unet_mid_block_..._to_q``, ``alpha``, ``kohya``).
    The suffix is empty where the key has no dot.
    """
    for suffix, canonical, form in _SUFFIXES:
        if key.endswith(suffix):
            return key[: -len(suffix)], canonical, form
    if key.endswith((".alpha", ".dora_scale")):
        module, _, suffix = key.rpartition(".")
        return module, suffix, "kohya"
    if key.startswith(("unet.", "text_encoder", "base_model.", "transformer.", "diffusion_model.")):
        module, _, suffix = key.rpartition(".")
        return module, suffix, "diffusers"
    module, _, suffix = key.partition(".")
    return module, suffix, "kohya"


def algorithm(suffixes: Iterable[str]) -> str:
    """Name of the algorithm that one module's suffixes belong to; ``unknown`` where none fits."""
    have = set(suffixes)
    for suffix, name in _ALGORITHM:
        if suffix in have:
            if name == "LoRA" and "lora_mid.weight" in have:
                return "LoCon (Tucker)"
            return name
    return "unknown"


@dataclass(frozen=True)
class Group:
    """The tensors of one module: canonical suffix -> key in the file."""

    name: str
    keys: Mapping[str, str]
    resolved: Resolved | None
    algorithm: str
    format: Format


@dataclass(frozen=True)
class Description:
    """What a file is.

    Attributes:
        base: Base model the tensors belong to.
        evidence: Why: ``shapes``, ``names`` or ``metadata``.
        groups: One entry per module name in the file.
        ranks: Rank -> number of modules, per component.
        alphas: Stored alpha -> number of modules, per component; None counts modules without one.
        dtypes: dtype -> number of tensors.
        misshaped: Modules whose shape is not the base model's although most others' is.
    """

    base: AnyBase
    evidence: str
    groups: tuple[Group, ...]
    ranks: Mapping[str, Counter[int]]
    alphas: Mapping[str, Counter[float | None]]
    dtypes: Counter[str]
    misshaped: tuple[str, ...]

    @property
    def algorithms(self) -> Counter[str]:
        """Algorithm -> number of modules; DoRA is counted apart from its carrier."""
        return Counter(f"{g.algorithm} + DoRA" if "dora_scale" in g.keys else g.algorithm for g in self.groups)

    @property
    def components(self) -> Counter[str]:
        """unet (or transformer), te1, te2, te3, other -> number of modules."""
        return Counter(g.resolved.module.component if g.resolved else "other" for g in self.groups)


def rank_of(contents: Contents, group: Group) -> int | None:
    """Rank of a module as the loaders read it (first dimension of the down factor), None where there is none."""
    for suffix in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if suffix in group.keys:
            shape = contents.tensors[group.keys[suffix]].shape
            return shape[0] if shape else None
    return None


def _fans(contents: Contents, group: Group) -> tuple[int, int] | None:
    """(fan_in, fan_out) that the factors of a module imply; None where they do not say."""

    def shape(suffix: str) -> tuple[int, ...] | None:
        key = group.keys.get(suffix)
        found = contents.tensors[key].shape if key else None
        return found if found is not None and len(found) >= 2 else None

    down, up = shape("lora_down.weight"), shape("lora_up.weight")
    if down and up:
        return down[1], up[0]
    a, b = shape("hada_w1_a"), shape("hada_w1_b")
    if a and b and "hada_t1" not in group.keys:
        return b[1], a[0]
    return None


def metadata_base(metadata: Mapping[str, str]) -> AnyBase:
    """Base model that the metadata names; ``unknown`` where it names none."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl_") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if transformer := dit_names.told_by(version, architecture):
        return transformer
    if metadata.get("ss_v2") == "True" or version.startswith("sd_v2") or architecture.startswith("stable-diffusion-v2"):
        return "sd2"
    if version.startswith("sd_v1") or architecture.startswith("stable-diffusion-v1"):
        return "sd1"
    return "unknown"


def _group(contents: Contents) -> dict[str, tuple[dict[str, str], Format]]:
    grouped: dict[str, tuple[dict[str, str], Format]] = {}
    for key in contents.tensors:
        module, suffix, form = split_key(key)
        keys, known = grouped.setdefault(module, ({}, form))
        keys[suffix] = key
        if form != "kohya" and known == "kohya":  # an alpha beside peft factors does not make it kohya
            grouped[module] = (keys, form)
    return grouped


def _detect_base(contents: Contents, grouped: Mapping[str, tuple[dict[str, str], Format]]) -> tuple[AnyBase, str]:
    """Base by shapes, then names, then metadata."""
    told = metadata_base(contents.metadata)
    fans_of = {name: _fans(contents, Group(name, keys, None, "", form)) for name, (keys, form) in grouped.items()}
    transformer = dit_names.detect(fans_of, told)
    if transformer is not None:  # before the others, whose text encoders some of them share
        return transformer
    scores: list[tuple[int, int, bool, Base]] = []
    for base in BASES:
        fitting = known = 0
        for name in grouped:
            found = names.resolve(base, name)
            if found is None:
                continue
            known += 1
            fitting += fans_of[name] == (found.module.fan_in, found.module.fan_out)
        scores.append((fitting, known, told == base, base))
    fitting, known, _, best = max(scores, key=lambda s: s[:3])  # the first, SD1, wins a tie
    if not known:
        return told, "metadata" if told != "unknown" else "nothing"
    rivals = [s for s in scores if s[3] != best]
    if fitting > max(s[0] for s in rivals):
        return best, "shapes"
    return best, "names" if known > max(s[1] for s in rivals) else "metadata" if told == best else "names"


def describe(contents: Contents) -> Description:
    """Say what the file is.

    Args:
        contents: From `from_file` or `gather`.
    """
    grouped = _group(contents)
    base, evidence = _detect_base(contents, grouped)
    groups = []
    ranks: dict[str, Counter[int]] = {}
    alphas: dict[str, Counter[float | None]] = {}
    fits, misfits = 0, []
    for name, (keys, form) in grouped.items():
        resolved = dit_names.resolve(base, name)
        group = Group(name, keys, resolved, algorithm(keys), form)
        groups.append(group)
        component = resolved.module.component if resolved else "other"
        rank = rank_of(contents, group)
        if rank is not None:
            ranks.setdefault(component, Counter())[rank] += 1
            alphas.setdefault(component, Counter())[contents.alphas.get(name)] += 1
        fans = _fans(contents, group)
        if resolved is not None and fans is not None:
            if dit_parts.fits(base, resolved.module, fans):
                fits += 1
            else:
                misfits.append(name)
    # SD3 comes in three sizes, with modules of the same names.
    misshaped = tuple(misfits) if fits > len(misfits) and base != "sd3" else ()
    dtypes = Counter(t.dtype for key, t in contents.tensors.items() if not key.endswith(".alpha"))
    return Description(base, evidence, tuple(groups), ranks, alphas, dtypes, misshaped)


def labels(description: Description) -> dict[str, str]:
    """Component -> what users call it in models of this base, in the order in which they are shown."""
    unet = "transformer" if description.base in dit_names.DIT_BASES else "UNet"
    te1 = "text encoder 1" if description.base in ("sdxl", "sd3", "flux") else "text encoder"
    return {"unet": unet, "te1": te1, "te2": "text encoder 2", "te3": "T5", "other": "other"}


def targets(description: Description) -> str:
    """Which parts were trained, in the words users use, e.g. ``UNet cross-attention (64)``."""
    parts = []
    label = labels(description)
    unet = [g.resolved.module for g in description.groups if g.resolved and g.resolved.module.component == "unet"]
    if unet and description.base in dit_names.DIT_BASES:
        parts.append(f"{label['unet']} ({len(unet)})")
    elif unet:
        full = {m.path for m in names.modules(description.base) if m.group == "attention"}
        paths = {m.path for m in unet}
        if all(".attn2." in p for p in paths):
            only = {p.rsplit(".to_", 1)[1] for p in paths}
            what = "cross-attention k, v" if only <= {"k", "v"} else "cross-attention"
        elif any(m.group in ("conv", "extra") for m in unet):
            what = "attention and convolutions" if full <= paths else "some layers, with convolutions"
        else:
            what = "all attention layers" if full <= paths else "some attention layers"
        parts.append(f"{label['unet']} {what} ({len(unet)})")
    others = [c for c in label if c != "unet"]
    parts += [f"{label[c]} ({count})" for c in others if (count := description.components[c])]
    return ", ".join(parts) or "nothing"


def settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Training settings worth a line: our own targets first, then what A1111's dialog shows.

    Returns:
        Label -> value; only what the file records.
    """
    out: dict[str, str] = {}
    arguments = network_args(metadata)
    run = Run.of(arguments.pop(KEY, None))
    if run is not None:
        out["what SPF did"] = str(run)
        if run.problem:
            out["not as it says"] = run.problem
    out.update({key: str(value) for key, value in sorted(arguments.items()) if key.startswith("spf_")})
    for key, label in (
        ("ss_network_module", "network module"),
        ("ss_sd_model_name", "trained on"),
        ("ss_learning_rate", "learning rate"),
        ("ss_optimizer", "optimizer"),
        ("ss_steps", "steps"),
        ("ss_resolution", "resolution"),
        ("ss_clip_skip", "clip skip"),
        ("ss_seed", "seed"),
    ):
        value = metadata.get(key, "None")
        if value != "None":
            out[label] = value
    rest = {key: value for key, value in arguments.items() if not key.startswith("spf_")}
    if rest:
        out["network args"] = ", ".join(f"{key}={value}" for key, value in sorted(rest.items()))
    if metadata.get(CONTINUED_WITH):
        out["to go on"] = f"without SPF only with {metadata[CONTINUED_WITH]}: its alphas are not those of its arguments"
    return out


def network_args(metadata: Mapping[str, str]) -> dict[str, object]:
    """``ss_network_args`` as a dict; empty where absent or not a JSON object."""
    try:
        value = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
