"""Kohya naming to diffusers' or peft's, done by the diffusers library (imported only when called), or, of the
transformers, by the tables of `dit_names`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import dit_convert, dit_names, musubi_convert, names, plain
from spf_plugin.lorafile.dit_rules import other_alpha
from spf_plugin.lorafile.findings import some
from spf_plugin.lorafile.inspect import Description, describe, gather
from spf_plugin.lorafile.musubi_names import MUSUBI_BASES


def to_diffusers(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    peft: bool,
    notes: list[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Rename a kohya LoRA to diffusers' keys, alpha multiplied in (those formats store none).

    Args:
        state_dict: A plain LoRA in kohya naming with one alpha per module, e.g. from `normalise`.
        metadata: Tells models apart where names and shapes do not.
        peft: ``unet.<path>.lora_A.weight`` names; else the attention-processor names of diffusers' first LoRAs,
            which ComfyUI reads too. Of transformers (but Anima) both are ``transformer.<path>.lora_A.weight``.
        notes: Gets one line where alpha was multiplied in.

    Returns:
        New state dict for ``pipeline.load_lora_weights``.

    Raises:
        SPFError: diffusers or peft is missing, or the file holds more than plain LoRA, or is for another model.
    """
    notes = [] if notes is None else notes
    description = describe(gather(state_dict.items(), metadata or {}))
    if description.base == "anima":
        return _anima(state_dict, description, peft=peft, notes=notes)
    if description.base in dit_convert.SPLIT:
        return dit_convert.split(state_dict, description, notes)
    if description.base in MUSUBI_BASES:
        return musubi_convert.to_diffusers(state_dict, description, notes)
    try:
        from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
        from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
        from diffusers.utils.state_dict_utils import StateDictType, convert_unet_state_dict_to_peft
    except ImportError as error:
        raise SPFError(f"This conversion needs diffusers and peft ({error}): pip install diffusers peft") from None
    odd = plain.odd(description)
    if odd or description.base not in ("sd1", "sd2", "sdxl"):
        what = some(odd) or names.BASE_LABEL[description.base]
        raise SPFError(
            "Only plain LoRA of SD, SDXL, Anima, SD 3, FLUX.1, Chroma, Lumina 2 and of what musubi-tuner trains can be "
            f"converted; {what} is not."
        )
    kohya: dict[str, torch.Tensor] = {}
    alphas: list[bool] = []
    for group in description.groups:
        assert group.resolved is not None
        module = group.resolved.module
        prefix = names.kohya_prefix("sdxl" if module.component == "te2" else "sd1", module.component)
        name = f"{prefix}_{module.path.replace('.', '_')}"
        down, up = (state_dict[group.keys[s]] for s in ("lora_down.weight", "lora_up.weight"))
        scaled, exact = plain.times(up, plain.scale(state_dict, group))
        kohya[f"{name}.lora_down.weight"], kohya[f"{name}.lora_up.weight"] = down, scaled
        alphas += [exact] if scaled is not up else []
    plain.say_alphas(alphas, notes)
    converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(kohya)
    unet = {key: t for key, t in converted.items() if key.startswith("unet.")}
    text = {key: t for key, t in converted.items() if not key.startswith("unet.")}
    if peft:
        kind = StateDictType.DIFFUSERS_OLD if any("_lora." in key for key in text) else None
        text = convert_state_dict_to_peft(text, original_type=kind) if text else {}
        return {**convert_unet_state_dict_to_peft(unet), **text}
    attention = {key: t for key, t in text.items() if "_lora." in key}  # to_q_lora: names nobody else reads
    if attention:
        text = {key: t for key, t in text.items() if key not in attention}
        attention = convert_state_dict_to_peft(attention, original_type=StateDictType.DIFFUSERS_OLD)
        text |= convert_state_dict_to_diffusers(attention, original_type=StateDictType.PEFT)
    return {**unet, **text}


def to_kohya(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str], notes: list[str]
) -> dict[str, torch.Tensor]:
    """A LoRA in diffusers' names of a transformer whose modules it splits, put together under kohya's names; one of a
    model that musubi-tuner trains under its names; any other as it is.

    Args:
        state_dict: from `normalise`, which gives every other file kohya's names.
        metadata: tells models apart where names and shapes do not, and may hold an alpha.
        notes: see `dit_convert.join`, `musubi_convert.to_host`.

    Raises:
        SPFError: see `dit_convert.join`, `musubi_convert.to_host`; alphas in the metadata.
    """
    description = describe(gather(state_dict.items(), metadata))
    joined, musubi = dit_convert.is_split(description), description.base in MUSUBI_BASES
    if not joined and not musubi:
        return dict(state_dict)
    told = other_alpha(metadata)
    if told:
        raise SPFError(
            f"lora_adapter_metadata asks for {told}, which cannot be kept here. Save the LoRA again in diffusers."
        )
    if joined:
        return dit_convert.join(state_dict, description, notes)
    return musubi_convert.to_host(state_dict, description, notes)


def to_comfyui(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Rename a kohya LoRA of a transformer to the names that ComfyUI maps for every model, ``diffusion_model.PATH``;
    alphas and text encoders stay. `metadata` tells models apart where names and shapes do not.

    Raises:
        SPFError: a module that the model's table does not have, or a LoRA for SD1, SD2 or SDXL, which needs none of it.
    """
    description = describe(gather(state_dict.items(), metadata or {}))
    if description.base not in dit_names.DIT_BASES:
        raise SPFError("ComfyUI reads kohya's names of this model: spf lora convert --to kohya is what you want.")
    out: dict[str, torch.Tensor] = {}
    for group in description.groups:
        if group.resolved is None:
            raise SPFError(f"{group.name} is no module of {names.BASE_LABEL[description.base]} that is known here.")
        module = group.resolved.module
        name = f"diffusion_model.{module.sgm}" if module.component == "unet" else group.name
        out |= {f"{name}.{suffix}": state_dict[key] for suffix, key in group.keys.items()}
    return out


def _anima(
    state_dict: Mapping[str, torch.Tensor], description: Description, *, peft: bool, notes: list[str]
) -> dict[str, torch.Tensor]:
    """With `peft` the checkpoint's paths, which ComfyUI reads too, else those of diffusers' pipeline."""
    odd = plain.odd(description) + [
        g.name for g in description.groups if g.resolved and g.resolved.module.group == "text"
    ]
    if odd:
        raise SPFError(f"diffusers loads plain LoRA of Anima's transformer only; {some(odd)} is not.")
    out: dict[str, torch.Tensor] = {}
    alphas: list[bool] = []
    for group in description.groups:
        assert group.resolved is not None
        module = group.resolved.module
        name = f"diffusion_model.{module.sgm}" if peft else dit_names.diffusers_name("anima", module)
        down, up = (state_dict[group.keys[s]] for s in ("lora_down.weight", "lora_up.weight"))
        scaled, exact = plain.times(up, plain.scale(state_dict, group))
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = down, scaled
        alphas += [exact] if scaled is not up else []
    plain.say_alphas(alphas, notes)
    return out
