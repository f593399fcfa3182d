"""Writing the trained LoRA: kohya's names, kohya's metadata, its WebUI card, and never half a file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn

from spf_plugin.errors import SPFError
from spf_plugin.files import NAME_BYTES, impossible, name_length
from spf_plugin.lorafile import inspect, plain, sidecars, writer
from spf_plugin.lorafile.normalise import normalise

PREFIX = "lora_unet"  # of LyCORIS's names for the denoiser's modules


def check_output(path: Path) -> None:
    """Make the folder, before any time is spent on training.

    Raises:
        SPFError: not a .safetensors name, a folder of that name exists, or nothing can be written there.
    """
    if path.suffix != ".safetensors":
        raise SPFError(f"--out {path}: the name must end in .safetensors, the only format that is written.")
    if os.path.isdir(path):
        raise SPFError(f"--out {path} is a folder. Give a file name in it.")
    reason = impossible(path.name)
    if reason:
        raise SPFError(f"--out {path}: {reason}. Give another name.")
    length = name_length(path.name)
    if length > NAME_BYTES:  # found when it is saved, otherwise; all other names are cut
        raise SPFError(
            f"--out: the name of the file has {length} bytes, and {NAME_BYTES} is the most (a letter beyond "
            "ASCII has two to four). Give a shorter one."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SPFError(f"--out {path}: nothing can be written there: {why}.") from error


def check_space(path: Path, network: nn.Module, dtype: torch.dtype) -> None:
    """Whether the file will fit on its disk.

    Raises:
        SPFError: it will not.
    """
    size = sum(p.numel() for p in network.parameters()) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if free < 1.1 * size + (1 << 20):
        raise SPFError(
            f"--out {path}: the LoRA needs {size / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left. Make "
            "room, or choose another folder. Nothing was changed."
        )


def named(denoiser: nn.Module, network: nn.Module) -> dict[str, str]:
    """The name of each module of a network -> its path in diffusers' model, for models that diffusers alone names so.

    Raises:
        SPFError: a module is no plain LoRA, for which diffusers has names.
    """
    odd = [lora.lora_name for lora in network.unet_loras if not hasattr(lora, "lora_down")]  # type: ignore[union-attr]
    if odd:
        raise SPFError(
            f"of this model diffusers loads plain LoRA only, and {odd[0]} is none. Leave out --network and its algo."
        )
    return {f"{PREFIX}_{name.replace('.', '_')}": name for name, _ in denoiser.named_modules() if name}


def renamed(tensors: Mapping[str, torch.Tensor], paths: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A plain LoRA in kohya's names as PEFT has it, `transformer.PATH.lora_A.weight`, alpha multiplied in.

    Args:
        tensors: as `networks.lora` saves them.
        paths: as `named` gives them.
    """
    out = {}
    for key, down in tensors.items():
        module, _, factor = key.partition(".")
        if factor != "lora_down.weight":
            continue
        up, rank = tensors[f"{module}.lora_up.weight"], len(down)
        alpha = float(tensors.get(f"{module}.alpha", torch.tensor(rank)))
        name = f"transformer.{paths[module]}"
        out[f"{name}.lora_A.weight"] = down.contiguous()
        out[f"{name}.lora_B.weight"] = plain.times(up, alpha / rank)[0].contiguous()
    return out


def save(
    path: Path,
    network: nn.Module,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    *,
    paths: Mapping[str, str] | None = None,
    card: bool = False,
) -> list[str]:
    """Write the network's weights; the old file stays until the new one is complete.

    The network's own `save_weights` decides what is in the file, so any inner network works.

    Args:
        path: the file.
        network: the trained network.
        metadata: kohya's.
        dtype: of the factors in the file.
        paths: write diffusers' names, see `named`; None: kohya's.
        card: also write the WebUI card beside it; if that is impossible, a note says so.

    Returns:
        What a loader may stumble over in this file, one sentence each (for plain LoRA nothing).

    Raises:
        SPFError: the weights are not finite, or the disk is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "lora.safetensors"
        network.save_weights(str(aside), dtype, {})  # type: ignore[operator]
        tensors = load(aside.read_bytes())  # not mapped: Windows would not let the folder go
    if paths is None:
        tensors, strings, notes = normalise(tensors, metadata)
    else:
        tensors, strings, notes = renamed(tensors, paths), dict(metadata), []
    writer.save(path, tensors, strings)
    if card:
        notes += sidecars.write_training_card(path, inspect.gather(tensors.items(), strings))
    return notes


def kohya_metadata(
    *, out: Path, model_name: str, family: str, prediction: str, network: str, network_args: Mapping[str, object],
    rank: int, alpha: float, learning_rate: float, steps: int, planned_steps: int, batch_size: int, resolution: int,
    seed: int, images: int, mixed_precision: str, gradient_checkpointing: bool, min_snr_gamma: float,
) -> dict[str, str]:  # fmt: skip
    """Metadata in kohya's keys, as WebUIs show it. No dates: the same run gives the same bytes."""
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "stable-diffusion-3"}[family]
    if prediction == "v_prediction" and family == "sd2":
        version += "_v"
    kind = {"v_prediction": "v", "epsilon": "epsilon"}.get(prediction)  # of a flow the standard says nothing
    return {
        "ss_network_module": network,
        "ss_network_args": json.dumps(dict(network_args)),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        "ss_sd_model_name": Path(model_name).name,
        "ss_output_name": out.stem,
        "ss_learning_rate": str(learning_rate),
        "ss_unet_lr": str(learning_rate),
        "ss_text_encoder_lr": "None",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "0",
        "ss_steps": str(steps),
        "ss_max_train_steps": str(planned_steps),
        "ss_total_batch_size": str(batch_size),
        "ss_batch_size_per_device": str(batch_size),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_seed": str(seed),
        "ss_num_train_images": str(images),
        "ss_mixed_precision": mixed_precision,
        "ss_gradient_checkpointing": str(gradient_checkpointing),
        "ss_min_snr_gamma": str(min_snr_gamma) if min_snr_gamma else "None",
        "ss_cache_latents": "True",
        "ss_clip_skip": "None",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.title": out.stem,
        **({} if kind is None else {"modelspec.prediction_type": kind}),
    }
