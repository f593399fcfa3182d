"""Kohya naming to diffusers' or peft's, done by the diffusers library. Imports diffusers only when called."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import names
from spf_plugin.lorafile.findings import some
from spf_plugin.lorafile.inspect import describe, gather


def to_diffusers(
    state_dict: Mapping[str, torch.Tensor], *, peft: bool, notes: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """Rename a kohya LoRA to diffusers' keys, alpha multiplied in (those formats store none).

    Args:
        state_dict: A plain LoRA in kohya naming with one alpha per module, e.g. from `normalise`.
        peft: ``unet.<path>.lora_A.weight`` names; else the attention-processor names of diffusers' first LoRAs,
            which ComfyUI reads too.
        notes: Gets one line where multiplying alpha in had to round.

    Returns:
        New state dict for ``pipeline.load_lora_weights``.

    Raises:
        SPFError: diffusers or peft is missing, or the file holds more than plain LoRA for SD1, SD2 or SDXL.
    """
    try:
        from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
        from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
        from diffusers.utils.state_dict_utils import StateDictType, convert_unet_state_dict_to_peft
    except ImportError as error:
        raise SPFError(f"This conversion needs diffusers and peft ({error}): pip install diffusers peft") from None
    description = describe(gather(state_dict.items(), {}))
    odd = [g.name for g in description.groups if g.algorithm != "LoRA" or "dora_scale" in g.keys or not g.resolved]
    if odd or description.base not in ("sd1", "sd2", "sdxl"):
        raise SPFError(f"Only plain LoRA for SD1, SD2 and SDXL can be converted; {some(odd)} is not.")
    plain: dict[str, torch.Tensor] = {}
    rounded = 0
    for group in description.groups:
        assert group.resolved is not None
        module = group.resolved.module
        prefix = names.kohya_prefix("sdxl" if module.component == "te2" else "sd1", module.component)
        name = f"{prefix}_{module.path.replace('.', '_')}"
        down, up = (state_dict[group.keys[s]] for s in ("lora_down.weight", "lora_up.weight"))
        alpha = float(state_dict[group.keys["alpha"]]) if "alpha" in group.keys else float(down.shape[0])
        exact = up.double() * (alpha / down.shape[0])
        plain[f"{name}.lora_down.weight"], plain[f"{name}.lora_up.weight"] = down, exact.to(up.dtype)
        rounded += not bool((plain[f"{name}.lora_up.weight"].double() == exact).all())
    if rounded and notes is not None:
        notes.append(f"alpha / rank multiplied into {rounded} modules, rounded to the file's dtype")
    converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(plain)
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
