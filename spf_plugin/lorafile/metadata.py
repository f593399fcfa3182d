"""Completing the metadata that A1111's and Forge's cards and sd-scripts' own tools read."""

from __future__ import annotations

from collections.abc import Mapping

from spf_plugin.lorafile.findings import wrong_base_metadata
from spf_plugin.lorafile.inspect import Contents, Description
from spf_plugin.lorafile.names import BASE_LABEL

_VERSION = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURE = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}
_IMPLEMENTATION = {
    "sd1": "diffusers",
    "sd2": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}
_RESOLUTION = {"sd1": "512x512", "sd2": "512x512", "sdxl": "1024x1024"}


def as_strings(metadata: Mapping[str, object] | None) -> dict[str, str]:
    """Metadata as safetensors stores it; kohya's spelling of other types, ``str(value)``."""
    return {str(key): value if isinstance(value, str) else str(value) for key, value in (metadata or {}).items()}


def complete(contents: Contents, description: Description) -> tuple[dict[str, str], list[str]]:
    """Fill in what the cards need and correct what contradicts the tensors.

    Nothing already there is replaced unless it is wrong. No date is invented: the result depends on the file alone.

    Args:
        contents: The file as it will be written.
        description: What it is.

    Returns:
        The new metadata and one note per correction of something that was there.
    """
    out = dict(contents.metadata)
    notes = []
    if out.pop("lora_adapter_metadata", None) is not None:
        notes.append("removed lora_adapter_metadata, which diffusers refuses beside alphas")
    title = out.get("ss_output_name", "")
    if title.startswith("{"):
        out["ss_output_name"] = title.strip("{} ") or "lora"
        notes.append("ss_output_name no longer starts with '{', which A1111 would read as JSON")
    base = description.base
    if base not in ("sd1", "sd2", "sdxl"):
        return out, notes
    if wrong_base_metadata(contents, description):
        notes.append(f"the metadata named another base model than {BASE_LABEL[base]}, which the tensors fit")
        for key in ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.implementation"):
            out.pop(key, None)
    velocity = out.get("ss_base_model_version") == "sd_v2_v"
    out.setdefault("ss_base_model_version", _VERSION[base])
    if out.setdefault("ss_v2", str(base == "sd2")) != str(base == "sd2"):
        out["ss_v2"] = str(base == "sd2")
        notes.append(f"ss_v2 is now {out['ss_v2']}")
    out.setdefault("modelspec.sai_model_spec", "1.0.1")
    out.setdefault("modelspec.architecture", "stable-diffusion-v2-768-v/lora" if velocity else _ARCHITECTURE[base])
    out.setdefault("modelspec.implementation", _IMPLEMENTATION[base])
    out.setdefault("modelspec.resolution", "768x768" if velocity else _RESOLUTION[base])
    out.setdefault("modelspec.title", out.get("ss_output_name", "LoRA"))
    rank = next((c.most_common(1)[0][0] for c in description.ranks.values()), None)
    alpha = next((c.most_common(1)[0][0] for c in description.alphas.values()), None)
    if rank is not None:
        out.setdefault("ss_network_dim", str(rank))
        out.setdefault("ss_network_alpha", str(alpha if alpha is not None else float(rank)))
    algorithms = {g.algorithm for g in description.groups}
    out.setdefault("ss_network_module", "networks.lora" if algorithms == {"LoRA"} else "lycoris.kohya")
    return out, notes
