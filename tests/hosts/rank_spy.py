"""A network module for tests: spf_plugin.lora, watched at the end of training.

Every process writes its own LoRA; and when the host saves the last file, after training, nothing of SPF may be left on
its trainer, accelerator or UNet (`left.json`: what was).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from spf_plugin import lora
from spf_plugin.hosts.frames import training_frame


def create_network(*args: Any, **kwargs: Any) -> nn.Module:
    return _watched(lora.create_network, *args, **kwargs)


def create_arch_network(*args: Any, **kwargs: Any) -> nn.Module:
    return _watched(lora.create_arch_network, *args, **kwargs)


def _watched(create: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    frame = training_frame()
    assert frame is not None
    trainer, accelerator, unet = frame.f_locals["self"], frame.f_locals["accelerator"], args[5]
    output = Path(frame.f_locals["args"].output_dir)
    before = set(vars(trainer)), set(vars(accelerator))
    network = create(*args, **kwargs)
    end_training, save_weights = accelerator.end_training, network.save_weights

    def ending() -> None:
        tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, output / f"rank{accelerator.process_index}.safetensors")
        end_training()

    def saving(*arguments: Any) -> None:
        left = (set(vars(trainer)) - before[0]) | (set(vars(accelerator)) - before[1])
        hooks = [name for name, module in unet.named_modules() if module._forward_hooks]
        (output / "left.json").write_text(json.dumps(sorted(left) + hooks))
        save_weights(*arguments)

    accelerator.end_training, network.save_weights = ending, saving
    return network
