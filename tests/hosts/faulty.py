"""A network module for tests: spf_plugin.lora in a run that something happens to.

`--network_args fault=NAME@N ...`: at the N-th training step, or the N-th saving, counted from 1.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spf_plugin import lora
from spf_plugin.hosts.frames import training_frame


def _killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def create_network(
    multiplier: float, dim: int, alpha: float, vae: nn.Module, text_encoder: Any, unet: nn.Module, fault: str, **kw: Any
) -> nn.Module:
    frame = training_frame()
    assert frame is not None
    args = frame.f_locals["args"]
    name, _, number = fault.partition("@")
    at = int(number or 1)
    network = lora.create_network(multiplier, dim, alpha, vae, text_encoder, unet, **kw)
    counted = {"steps": 0, "files": 0}

    if name == "kill_resuming":
        frame.f_locals["accelerator"].register_load_state_pre_hook(_killed)

    def before(_: nn.Module, call: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        counted["steps"] += 1
        if counted["steps"] == at:
            if name == "kill_step":
                _killed()
            elif name == "nan":
                return (call[0] * float("nan"), *call[1:])
            elif name == "spoil_image":
                for image in Path(args.train_data_dir).rglob("*.png"):
                    image.write_bytes(b"no image any more")
            elif name == "delete_captions":
                for caption in Path(args.train_data_dir).rglob("*.txt"):
                    caption.unlink()
        return None

    unet.register_forward_pre_hook(before)

    replace: Callable[..., None] = os.replace

    def moved(source: Any, target: Any, *rest: Any, **k: Any) -> None:
        if str(target).endswith(".safetensors"):
            counted["files"] += 1
            if counted["files"] == at:
                _killed()
        replace(source, target, *rest, **k)

    if name == "kill_saving":
        os.replace = moved

    save = network.save_weights

    def save_weights(*arguments: Any) -> None:
        counted["files"] += 1
        if counted["files"] == at:
            if name == "disk_full":  # for the inner network's file: the first that is written
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            elif name == "disk_full_at_last":

                def refuse(_: int) -> None:
                    raise OSError(errno.ENOSPC, "No space left on device")

                os.fsync = refuse
        try:
            save(*arguments)
        finally:
            if name == "disk_full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    if name.startswith("disk_full"):
        network.save_weights = save_weights
    return network


create_network_from_weights = lora.create_network_from_weights
