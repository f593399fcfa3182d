"""A network module for tests: spf_plugin.lora, and every process writes its own LoRA when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from spf_plugin import lora
from spf_plugin.hosts.kohya import training_frame


def create_network(*args: Any, **kwargs: Any) -> nn.Module:
    frame = training_frame()
    assert frame is not None
    accelerator, output = frame.f_locals["accelerator"], Path(frame.f_locals["args"].output_dir)
    network = lora.create_network(*args, **kwargs)
    original = accelerator.end_training

    def end_training() -> None:
        tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, output / f"rank{accelerator.process_index}.safetensors")
        original()

    accelerator.end_training = end_training
    return network
