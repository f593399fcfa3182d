"""Noise schedules: what a prediction at a timestep says of the clean image. Pure but for the tables they hold.

Symbols: `z_t` noisy latents, `abar` cumulative signal level, `sigma` share of the noise, `x0` the clean latents that
one prediction stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

MIN_SIGNAL = 1e-3  # a zero-terminal-SNR schedule ends at 0; the weight of such a sample is 0, this keeps it finite


class Schedule(Protocol):
    """What the losses and pictures ask of a schedule. Timesteps `[B]` are in its own units, on any device."""

    def level(self, timesteps: Tensor) -> Tensor:
        """How noisy, in [0, 1], `[B]`: the place among all timesteps."""
        ...

    def signal(self, timesteps: Tensor) -> Tensor:
        """`abar`, the signal's share of the variance, `[B]`, float32."""
        ...

    def clean(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """`x0` from one prediction, both `[B, C, h, w]`; float32."""
        ...


def one_step_prediction(noisy_latents: Tensor, prediction: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """`x0` from one prediction of a discrete schedule.

    `epsilon`: `(z_t - sqrt(1 - abar) eps) / sqrt(abar)`; `v_prediction`: `sqrt(abar) z_t - sqrt(1 - abar) v`.

    Args:
        noisy_latents: `z_t`, `[B, C, h, w]`.
        prediction: the denoiser's output, same shape.
        abar: `[B]`.
        prediction_type: `epsilon` or `v_prediction`.

    Returns:
        `[B, C, h, w]`, float32.

    Raises:
        ValueError: another prediction type.
    """
    signal = abar.float().view(-1, 1, 1, 1)
    z, p = noisy_latents.float(), prediction.float()
    if prediction_type == "epsilon":
        signal = signal.clamp_min(MIN_SIGNAL)
        return (z - (1 - signal).sqrt() * p) / signal.sqrt()
    if prediction_type == "v_prediction":
        return signal.sqrt() * z - (1 - signal).sqrt() * p
    raise ValueError(f"unknown prediction type {prediction_type!r}")


@dataclass
class Discrete:
    """A table of signal levels, as DDPM has it (SD1.x, SD2.x, SDXL).

    Attributes:
        alphas_cumprod: `abar` of every timestep, `[1000]`.
        prediction_type: `epsilon` or `v_prediction`.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def level(self, timesteps: Tensor) -> Tensor:
        return timesteps / len(self.alphas_cumprod)

    def signal(self, timesteps: Tensor) -> Tensor:
        device = timesteps.device
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device][timesteps.long()].float()

    def clean(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        return one_step_prediction(noisy_latents, prediction, self.signal(timesteps), self.prediction_type)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: `z_t = (1 - sigma) x0 + sigma noise`, and the denoiser predicts `noise - x0`.

    Attributes:
        scale: the timestep that is pure noise; `sigma` is the timestep divided by it.
    """

    scale: float = 1.0

    def level(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / self.scale

    def signal(self, timesteps: Tensor) -> Tensor:
        sigma = self.level(timesteps)
        return (1 - sigma).square() / ((1 - sigma).square() + sigma.square())

    def clean(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self.level(timesteps).view(-1, *[1] * (noisy_latents.dim() - 1))
        return noisy_latents.float() - sigma * prediction.float()
