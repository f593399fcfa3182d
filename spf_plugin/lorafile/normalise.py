"""Bringing a LoRA state dict into the subset that every loader reads, without changing any weight delta.

The delta of a LoRA module is ``(alpha / rank) * up @ down``. Everything here either leaves it bit for bit as it was
or moves a factor between alpha, up and down; where that rounds in the file's dtype, a note says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping

import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import dit_names, names
from spf_plugin.lorafile.diffusers_rules import Strength, alphas_for, never_mapped, without_output
from spf_plugin.lorafile.dit_convert import is_split
from spf_plugin.lorafile.factors import ALPHA, DOWN, UP, Modules, Parts, is_lora, plainer
from spf_plugin.lorafile.findings import refuse_damaged, some
from spf_plugin.lorafile.inspect import FP16_MAX, Description, algorithm, describe, dtype_name, gather
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.metadata import as_strings, complete
from spf_plugin.lorafile.musubi_names import MUSUBI_BASES
from spf_plugin.lorafile.names import Base, Module
from spf_plugin.lorafile.record import CONTINUED_WITH, DIM_FROM_WEIGHTS

FLOAT32_MAX = float(torch.finfo(torch.float32).max)

Table = Mapping[str, Module]  # module name -> what it patches


def normalise(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, object] | None,
    *,
    dtype: torch.dtype | None = None,
    one_rank: bool = False,
    judged: bool = True,
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """Make a LoRA state dict fit the safe subset as far as its algorithm allows.

    Names become kohya's (SGM blocks for SDXL, diffusers blocks for SD1/SD2), factors get the shape of the module
    (SD2 `proj_in`/`proj_out` 2-D), Tucker cores are multiplied in, alphas become one float for the UNet and one for
    the text encoders, q/k/v/out groups of fused text encoders are completed with zero deltas, values beyond fp16 are
    balanced between up and down. Plain `networks.lora` files for SD1 and SDXL come back bit for bit. LoKr, LoHa, OFT
    and DoRA pass through with notes on who cannot read them.

    Args:
        state_dict: Tensors of any LoRA dialect (kohya, LyCORIS, diffusers, peft); not modified.
        metadata: Metadata of any value type, or None.
        dtype: Save factors and alphas in this dtype; None keeps each tensor's own where loaders read it.
        one_rank: Pad smaller ranks with zeros to the largest, for diffusers 0.32, which ignores alpha otherwise.
        judged: Note what loaders of SD and SDXL cannot read; of another model's LoRA that would be everything.

    Returns:
        The new state dict, the completed metadata (strings only), and one note per change or remaining limitation.
        Unchanged tensors are the same objects as in `state_dict`.

    Raises:
        SPFError: `findings.refuse_damaged`; values that fit no balance within fp16; two entries for one module.
    """
    strings = as_strings(metadata)
    contents = gather(state_dict.items(), strings)
    description = describe(contents)
    refuse_damaged(contents, description)
    if description.base in names.BASES and any(key.endswith("lora_magnitude_vector") for key in contents.tensors):
        raise SPFError("This is PEFT's DoRA, which diffusers reads as it is and no other program in any form.")
    notes: list[str] = []
    modules, table = _renamed(state_dict, description, notes)
    plainer(modules, notes)
    _adopt_adapter_alpha(modules, strings, description, notes)
    _reshape(modules, table, notes)
    _readable_dtypes(modules, dtype, notes)
    releases = description.base in names.BASES and not one_rank  # of diffusers, whose ways with ranks are known there
    if _one_alpha(modules, table, one_rank, releases, notes):
        strings[CONTINUED_WITH] = DIM_FROM_WEIGHTS
    if description.base in ("sd1", "sd2", "sdxl"):
        _complete_attention(modules, table, description.base, notes)
    _within_range(modules, dtype, notes)
    out = {f"{name}.{suffix}" if suffix else name: t for name, parts in modules.items() for suffix, t in parts.items()}
    contents = gather(out.items(), strings)
    if contents.non_finite:
        raise SPFError(f"Values overflow in {some(contents.non_finite)}. Save in fp32 or bf16.")
    description = describe(contents)
    strings, corrections = complete(contents, description)
    notes += corrections
    contents = gather(out.items(), strings)
    for verdict in verdicts(contents, describe(contents)) if judged else ():
        notes += [f"{verdict.loader}: {f.message}" for f in verdict.findings if f.level != "note"]
    return out, strings, notes


def fitted(state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same deltas for a network whose modules have other alphas, or other shapes of the same factors.

    Args:
        state_dict: a LoRA file's tensors.
        own: the network's tensors by the same names; what it has not stays as it is.

    Returns:
        The tensors; those that need no change are the same objects. Scaled factors are float32.
    """
    out = dict(state_dict)
    for key, tensor in state_dict.items():
        if key in own and tensor.shape != own[key].shape and tensor.numel() == own[key].numel():
            out[key] = tensor.reshape(own[key].shape)
    for key in state_dict:
        name, _, suffix = key.rpartition(".")
        factor = f"{name}.{UP}"
        if suffix != ALPHA or key not in own or factor not in out:
            continue
        theirs, ours = float(state_dict[key]), float(own[key])
        if theirs != ours and ours != 0:
            out[key] = own[key].detach().cpu()
            out[factor] = out[factor].float() * (theirs / ours)
    return out


def _renamed(
    state_dict: Mapping[str, torch.Tensor], description: Description, notes: list[str]
) -> tuple[Modules, dict[str, Module]]:
    """Group by module under kohya's names; file order is kept."""
    base = description.base
    modules: Modules = {}
    table: dict[str, Module] = {}
    renamed = []
    unet = [g.resolved for g in description.groups if g.resolved and g.resolved.module.component == "unet"]
    # SGM names beside conv_in or the time embedding stop diffusers, where its own names leave those out
    outside = base in names.BASES and any(map(never_mapped, unet)) and not any(r.style == "sgm" for r in unet)
    # Names that no other program's can stand for one by one: diffusers' modules; and of what musubi-tuner trains every
    # name is one that some program does not take in place of another.
    split, musubi = is_split(description), base in MUSUBI_BASES
    for group in description.groups:
        name = group.name
        if split or (musubi and not name.startswith("lora_")) or (group.resolved is None and group.format != "kohya"):
            modules |= {key: {"": state_dict[key]} for key in group.keys.values()}  # kept as it is
            continue
        own = base in dit_names.DIT_BASES and name.startswith("lora_")  # ComfyUI's names of HunyuanImage stay
        if group.resolved is not None and not own and not name.startswith("oft_"):
            module = group.resolved.module
            name = dit_names.kohya_name("sd1" if outside and module.component == "unet" else base, module)
            table[name] = module
        if name in modules:
            raise SPFError(f"Two entries for the module {name}. Which is meant cannot be told: save the LoRA again.")
        modules[name] = {suffix: state_dict[key] for suffix, key in group.keys.items()}
        if name != group.name or group.format != "kohya":
            renamed.append(group.name)
    if renamed:
        notes.append(f"{len(renamed)} modules renamed to kohya's names ({some(renamed, 1)})")
    return modules, table


def _adopt_adapter_alpha(
    modules: Modules, metadata: Mapping[str, str], description: Description, notes: list[str]
) -> None:
    """diffusers keeps alpha in the metadata, not in tensors: bring it into the file."""
    if "lora_adapter_metadata" not in metadata or all(g.format == "kohya" for g in description.groups):
        return
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
        assert isinstance(config, dict)
    except (ValueError, RecursionError, AssertionError):
        raise SPFError("lora_adapter_metadata is not JSON, so the alphas are unknown. Save the LoRA again.") from None
    prefixes = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    for component, prefix in prefixes.items():
        patterns = (f"{component}.alpha_pattern", f"{component}.use_rslora", f"{component}.use_dora")
        if any(config.get(key) for key in patterns):
            raise SPFError(f"The adapter of {component} scales its modules one by one. Fuse or save it in diffusers.")
        alpha = config.get(f"{component}.lora_alpha")
        if isinstance(alpha, (int, float)) and abs(alpha) <= FLOAT32_MAX:
            for name, parts in modules.items():
                if name.startswith(prefix) and is_lora(parts) and ALPHA not in parts:
                    parts[ALPHA] = torch.tensor(float(alpha))
            notes.append(f"alpha {alpha:g} of {component} taken from lora_adapter_metadata")


def _reshape(modules: Modules, table: Table, notes: list[str]) -> None:
    """Linear factors 2-D, convolution factors 4-D. Only the view changes."""
    done = 0
    for name, parts in modules.items():
        if name not in table or not is_lora(parts):
            continue
        linear = table[name].kind == "linear"
        for suffix in (DOWN, UP):
            tensor = parts[suffix]
            if linear and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
                parts[suffix] = tensor.reshape(tensor.shape[:2])
                done += 1
            elif not linear and tensor.dim() == 2 and (suffix == UP or table[name].kind == "conv1"):
                parts[suffix] = tensor.reshape(*tensor.shape, 1, 1)
                done += 1
    if done:
        notes.append(f"{done} factors reshaped to their module's shape")


def _readable_dtypes(modules: Modules, dtype: torch.dtype | None, notes: list[str]) -> None:
    """Float factors and float 0-dim alphas; fp64 and fp8 become what every loader reads."""
    done: Counter[str] = Counter()
    for parts in modules.values():
        floats = [t.dtype for suffix, t in parts.items() if suffix != ALPHA and t.dtype.is_floating_point]
        for suffix, tensor in parts.items():
            wanted = tensor.dtype
            if wanted == torch.float64:
                wanted = torch.float32
            elif wanted.is_floating_point and wanted.itemsize == 1:
                wanted = torch.float16
            if suffix == ALPHA and tensor.numel() == 1:
                if not wanted.is_floating_point:
                    wanted = dtype or (floats[0] if floats and floats[0].itemsize in (2, 4) else torch.float32)
                    if float(tensor.to(wanted)) != float(tensor):
                        wanted = torch.float32  # 257 in bf16 would be 256
                if tensor.dim():
                    parts[suffix] = tensor = tensor.reshape(())
                    done["alpha shape"] += 1
            if wanted != tensor.dtype:
                done[f"{dtype_name(tensor.dtype)} to {dtype_name(wanted)}"] += 1
                parts[suffix] = tensor.to(wanted)
    notes += [f"{count} tensors: {what}" for what, count in done.items()]


def _half(name: str) -> str:
    """Alphas must agree within the UNet and within the text encoders."""
    return "text encoders" if name.startswith("lora_te") else "UNet"


def _alpha(parts: Parts) -> float:
    """Stored alpha; the rank where there is none, as every loader reads it."""
    return float(parts[ALPHA]) if ALPHA in parts else float(parts[DOWN].shape[0])


def _one_alpha(modules: Modules, table: Table, one_rank: bool, releases: bool, notes: list[str]) -> bool:
    """One alpha per half of the file, or each module's rank where diffusers takes that better.

    Modules whose alpha changes get the quotient multiplied into a factor. Where every choice would give some release
    of diffusers more modules of the wrong strength than the file as it is, the alphas stay.

    Returns:
        Whether an alpha is another now than the arguments of the training gave it.
    """
    changed = False
    for half in ("UNet", "text encoders"):
        loras = {name: parts for name, parts in modules.items() if _half(name) == half and is_lora(parts)}
        if not loras:
            continue
        counts = Counter(alpha for parts in loras.values() if (alpha := _alpha(parts)) != 0.0)
        if not counts:
            continue  # every alpha is 0: nothing to preserve, and the check says so
        target = _target_alpha(counts)
        rows = [
            Strength(
                name,
                table[name].component if name in table else "unet",
                parts[DOWN].shape[0],
                float(parts[ALPHA]) if ALPHA in parts else None,
            )
            for name, parts in loras.items()
        ]
        plan = alphas_for(rows, target) if releases else dict.fromkeys(loras, target)
        if plan is None:
            notes.append(f"{half}: ranks and alphas differ; they stay, --one-rank makes them one for every diffusers")
            continue
        top = max(parts[DOWN].shape[0] for parts in loras.values())
        added, scaled, rounded, padded = 0, 0, 0, 0
        for name, parts in loras.items():
            down, up, alpha, wanted = parts[DOWN], parts[UP], _alpha(parts), plan[name]
            rank = down.shape[0]
            factor = alpha / wanted
            if one_rank and rank < top:
                parts[DOWN] = torch.cat([down, down.new_zeros(top - rank, *down.shape[1:])])
                parts[UP] = torch.cat([up, up.new_zeros(up.shape[0], top - rank, *up.shape[2:])], dim=1)
                factor *= top / rank
                padded += 1
            if ALPHA not in parts:
                added += 1
                parts[ALPHA] = _alpha_like(up, wanted)
            elif alpha != wanted:
                parts[ALPHA] = _alpha_like(parts[ALPHA], wanted)
                changed = True
            if factor != 1.0:
                exactly = _scale(parts, factor)
                if exactly is None:
                    raise SPFError(
                        f"the alphas of the {half} reach from {min(counts, key=abs):g} to {max(counts, key=abs):g}, "
                        "which no factor can make up for. The file is damaged: download or save it again."
                    )
                rounded += not exactly
                scaled += 1
        constant = set(plan.values()) == {target}
        if added:
            what = f"alpha {target:g}" if constant else "the rank as alpha"
            notes.append(f"{half}: {what} added to {added} modules that had none")
        if padded:
            notes.append(f"{half}: {padded} modules padded with zeros to rank {top}")
        if scaled:
            how = f", {rounded} of them rounded to the file's dtype" if rounded else ", exactly"
            what = f"one alpha, {target:g}" if constant else "every module's rank as its alpha"
            notes.append(f"{half}: {what}; {scaled} modules scaled to keep their delta{how}")
    return changed


def _target_alpha(counts: Counter[float]) -> float:
    """The alpha all modules get: the one that makes scaling exact, else the most common.

    Multiplying by a power of two above 1 is exact in every float format (dividing is not: small fp16 values lose
    digits), so the smallest alpha is taken where all others are it times a power of two.
    """
    smallest = min(counts, key=abs)
    quotients = [alpha / smallest for alpha in counts]
    if all(q > 0 and math.frexp(q)[0] == 0.5 for q in quotients):
        return smallest
    return counts.most_common(1)[0][0]


def _alpha_like(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """0-dim alpha in the dtype of `tensor` where that holds the value exactly, else fp32."""
    wide = torch.tensor(value, dtype=torch.float64)  # a tensor made in fp16 refuses what is beyond it
    out = wide.to(tensor.dtype)
    return out if float(out) == value else wide.to(torch.float32)


def _scale(parts: Parts, factor: float) -> bool | None:
    """Multiply the delta of a module by `factor`; True where no value was rounded, None where nothing is left of them.

    The up factor takes it, or the down factor where only that is exact (fp16 underflow, mostly).
    """
    exact = {suffix: parts[suffix].double() * factor for suffix in (UP, DOWN)}
    stored = {suffix: exact[suffix].to(parts[suffix].dtype) for suffix in (UP, DOWN)}
    for suffix in (UP, DOWN):
        if bool((stored[suffix].double() == exact[suffix]).all()):
            parts[suffix] = stored[suffix]
            return True
    for suffix in (UP, DOWN):
        if bool(stored[suffix].isfinite().all()) and bool(stored[suffix].any()) >= bool(exact[suffix].any()):
            parts[suffix] = stored[suffix]
            return False
    return None


# What to zero for a zero delta; the other factors stay, so that the module can still be trained on.
_ZEROED = {"LoRA": (UP,), "LoHa": ("hada_w2_a",), "LoKr": ("lokr_w2", "lokr_w2_b")}


def _complete_attention(modules: Modules, table: Table, base: Base, notes: list[str]) -> None:
    """Add zero deltas for the missing ones of q, k, v, out where the checkpoint keeps q, k, v in one matrix, and where
    there is no output at all, without which diffusers stops."""
    layers: dict[str, dict[str, str]] = {}
    paths: dict[str, list[str]] = {}
    for module in table.values():
        paths.setdefault(module.component, []).append(module.path)
    incomplete = {c for c in ("te1", "te2") if names.fused_attention(base, c) or without_output(paths.get(c, ()))}
    for name, module in table.items():
        if ".self_attn." in module.path and module.component in incomplete:
            layer, _, part = name.rpartition("_self_attn_")
            layers.setdefault(layer, {})[part] = name
    added = 0
    for layer, present in layers.items():
        if len(present) == 4:
            continue
        sibling = modules[next(iter(present.values()))]
        kind = algorithm(sibling)
        if kind not in _ZEROED or "dora_scale" in sibling:
            continue  # the loaders' notes name what is then lost
        fused = names.fused_attention(base, table[next(iter(present.values()))].component)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj") if fused else ("out_proj",):
            if part not in present:  # all four are square and of one size, so a sibling's shapes fit
                copy = {suffix: t.clone() for suffix, t in sibling.items()}
                copy |= {suffix: torch.zeros_like(t) for suffix, t in copy.items() if suffix in _ZEROED[kind]}
                modules[f"{layer}_self_attn_{part}"] = copy
                added += 1
    if added:
        notes.append(f"{added} text-encoder projections added with a zero delta, which some program asks for")


def _within_range(modules: Modules, dtype: torch.dtype | None, notes: list[str]) -> None:
    """Keep every value within fp16 by moving a power of two from one factor to the other, then cast."""
    balanced = 0
    for name, parts in modules.items():
        peaks = {suffix: float(t.abs().max()) for suffix, t in parts.items() if t.numel() and t.dtype.is_floating_point}
        if is_lora(parts) and max(peaks.get(UP, 0.0), peaks.get(DOWN, 0.0)) > FP16_MAX:
            large, small = (UP, DOWN) if peaks[UP] > peaks[DOWN] else (DOWN, UP)
            shift = 2.0 ** math.ceil(math.log2(peaks[large] / FP16_MAX))
            if peaks[small] * shift > FP16_MAX:
                raise SPFError(f"{name}: values up to {peaks[large]:.3g} fit fp16 in no balance. Train again.")
            parts[large] = parts[large] / shift
            parts[small] = parts[small] * shift
            balanced += 1
        elif dtype == torch.float16 and max(peaks.values(), default=0.0) > FP16_MAX:
            raise SPFError(f"{name}: a value of {max(peaks.values()):.3g} does not fit fp16. Save in bf16 or fp32.")
        if dtype is not None:
            for suffix, tensor in parts.items():
                if suffix == ALPHA and tensor.numel() == 1 and float(tensor.to(dtype)) != float(tensor):
                    continue  # a rounded alpha would change every delta
                if tensor.dtype.is_floating_point and tensor.dtype != dtype:
                    parts[suffix] = tensor.to(dtype)
    if balanced:
        notes.append(f"{balanced} modules had values beyond fp16: a power of two moved between up and down")
