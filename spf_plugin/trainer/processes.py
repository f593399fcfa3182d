"""How training makes latents noisy, and what a denoiser is to predict of them.

Symbols: `x0` clean latents, `z_t` noisy ones, `abar` cumulative signal level, `sigma` share of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spf_plugin.core.schedule import Discrete
from spf_plugin.errors import SPFError


class Process(Protocol):
    """Latents and noise are `[B, C, h, w]`; timesteps `[B]`, as the denoiser is called with them."""

    @property
    def prediction(self) -> str:
        """`epsilon`, `v_prediction` or `flow`."""
        ...

    @property
    def timesteps(self) -> int:
        """How many there are; the last is pure noise."""
        ...

    @property
    def schedule(self) -> Discrete | None:
        """The table of noise levels, where there is one to choose."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The timesteps of a step."""
        ...

    def at(self, level: float, count: int) -> Tensor:
        """The same timestep for `count` samples: that at `level` of all timesteps, in [0, 1)."""
        ...

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`z_t`."""
        ...

    def noise(self, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that made `z_t` of the latents."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the prediction is compared with."""
        ...

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """The weights of arXiv 2303.09556, `[B]`.

        Raises:
            SPFError: it is no diffusion of noise.
        """
        ...


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@dataclass
class Diffusion:
    """DDPM: `z_t = sqrt(abar) x0 + sqrt(1 - abar) noise`.

    Attributes:
        alphas_cumprod: `abar` of every timestep, `[1000]`.
        prediction: `epsilon` or `v_prediction`.
    """

    alphas_cumprod: Tensor
    prediction: str

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def schedule(self) -> Discrete:
        return Discrete(self.alphas_cumprod, self.prediction)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.timesteps, (count,), generator=generator)

    def at(self, level: float, count: int) -> Tensor:
        return torch.full((count,), round(level * self.timesteps))

    def _signal(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps]

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        abar = _wide(self._signal(timesteps))
        return abar.sqrt() * latents + (1 - abar).sqrt() * noise

    def noise(self, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        abar = _wide(self._signal(timesteps))
        return (noisy - abar.sqrt() * latents) / (1 - abar).sqrt()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        abar = _wide(self._signal(timesteps))
        return abar.sqrt() * noise - (1 - abar).sqrt() * latents

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        abar = self._signal(timesteps)
        snr = abar / (1 - abar)
        return snr.clamp(max=gamma) / (snr + 1 if self.prediction == "v_prediction" else snr)


@dataclass(frozen=True)
class RectifiedFlow:
    """`z_t = (1 - sigma) x0 + sigma noise`, of which `noise - x0` is predicted, at logit-normal `sigma` (Stable
    Diffusion 3, arXiv 2403.03206, equation 19 with mean 0 and deviation 1).

    Attributes:
        shift: of `sigma` towards noise (there equation 23), the sampler's own.
        timesteps: the timestep that is pure noise.
    """

    shift: float = 1.0
    timesteps: int = 1000
    prediction: str = "flow"

    @property
    def schedule(self) -> None:
        return None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        sigma = torch.randn(count, generator=generator).sigmoid()
        return self.timesteps * self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def at(self, level: float, count: int) -> Tensor:
        return torch.full((count,), level * self.timesteps)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return torch.lerp(latents, noise, _wide(timesteps / self.timesteps).to(latents))

    def noise(self, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        sigma = _wide(timesteps / self.timesteps)
        return (noisy - (1 - sigma) * latents) / sigma

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise SPFError(
            "--min-snr-gamma weighs errors of predicted noise, and this model predicts a flow. Leave the option out."
        )
