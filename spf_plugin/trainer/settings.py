"""What a run of the reference trainer is told, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spf_plugin.config import SPFConfig
from spf_plugin.lorafile.record import Run

DEFAULT_NETWORK = "lycoris.kohya"
# The linear layers of every transformer, as networks.lora has them. `bypass_mode` adds the low-rank path to the layer's
# output, as networks.lora does, instead of rebuilding its weight.
PLAIN_LORA = {"algo": "lora", "preset": "attn-mlp", "bypass_mode": "True"}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """A training run. `spf=None` trains a plain LoRA; everything else is then the same, random numbers included.

    Attributes:
        model: diffusers folder, hub name or single .safetensors file.
        data: folder of images with captions (`data.read_folder`).
        out: the .safetensors file to write.
        spf: SPF's settings, or None.
        steps: optimiser steps.
        rank: LoRA rank.
        alpha: LoRA alpha; the rank if None.
        learning_rate: peak of the cosine schedule (AdamW).
        batch_size: images per step.
        resolution: side length in pixels; the model's own if None.
        seed: everything random follows from it.
        mixed_precision: `no`, `fp16` or `bf16`.
        save_precision: `fp16`, `bf16` or `fp32`.
        gradient_checkpointing: less memory, more time.
        min_snr_gamma: min-SNR loss weighting; 0 is off.
        network: inner network module with kohya's `create_network`.
        network_args: its arguments; for the default module, they change a plain LoRA.
        save_every: also save every so many steps; 0 does not.
        log_dir: folder for TensorBoard, or None.
        device: `cpu`, `cuda`, or None for the best there is.
    """

    model: str
    data: Path
    out: Path
    spf: SPFConfig | None = None
    steps: int = 1000
    rank: int = 16
    alpha: float | None = None
    learning_rate: float = 1e-4
    batch_size: int = 1
    resolution: int | None = None
    seed: int = 0
    mixed_precision: str = "no"
    save_precision: str = "fp16"
    gradient_checkpointing: bool = False
    min_snr_gamma: float = 0.0
    network: str = DEFAULT_NETWORK
    network_args: Mapping[str, str] = field(default_factory=dict)
    save_every: int = 0
    log_dir: Path | None = None
    device: str | None = None

    @property
    def full_network_args(self) -> dict[str, str]:
        """The inner network's arguments with the defaults that make it a plain LoRA."""
        return {**(PLAIN_LORA if self.network == DEFAULT_NETWORK else {}), **self.network_args}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: the LoRA file.
        steps: optimiser steps that were made; fewer than planned after Ctrl-C.
        history: one row of numbers every few steps (`step`, `loss`, `lr`, and SPF's).
        notes: what a loader may stumble over in the file.
        run: what SPF did; None for a plain LoRA.
    """

    path: Path
    steps: int
    history: list[dict[str, float]]
    notes: list[str]
    run: Run | None = None
