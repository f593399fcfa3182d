"""The steps of a run of the reference trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.errors import SPFError
from spf_plugin.families.base import unwrapped
from spf_plugin.trainer.cache import Cached, Progress
from spf_plugin.trainer.data import endless_batches
from spf_plugin.trainer.models import BaseModel
from spf_plugin.trainer.settings import DTYPES, Settings


class Trainer:
    """The steps of a run.

    Args:
        settings: the run.
        model: the base model, on its device.
        accelerator: accelerate's.
    """

    def __init__(self, settings: Settings, model: BaseModel, accelerator: Any):
        self.settings, self.model, self.accelerator = settings, model, accelerator
        self.shown: dict[str, float] = {}
        self.batch: Mapping[str, Any] | None = None
        self.weight_dtype = DTYPES[settings.mixed_precision]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's prediction for the present batch, `[B, C, h, w]`."""
        assert self.batch is not None
        call = self.model.call(noisy_latents.to(self.weight_dtype), timesteps, self.batch["text"], self.batch["sizes"])
        with self.accelerator.autocast():
            return unwrapped(call.on(self.model.denoiser))

    def generate_step_logs(self, loss: float, learning_rate: float) -> dict[str, float]:
        """The numbers of a step."""
        return {"loss": loss, "lr": learning_rate}

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The diffusion loss, min-SNR weighted if asked for; a scalar."""
        process = self.model.process
        target = process.target(latents, noise, timesteps)
        per_sample = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
        if self.settings.min_snr_gamma:
            per_sample = per_sample * process.min_snr(timesteps, self.settings.min_snr_gamma)
        return per_sample.mean()

    def run(
        self,
        network: nn.Module,
        cache: Cached,
        progress: Progress,
        every: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> tuple[int, list[dict[str, float]]]:
        """All steps, or as many as were made until `stopped()`. Returns their number and the history."""
        from diffusers.optimization import get_cosine_schedule_with_warmup

        settings, accelerator = self.settings, self.accelerator
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
        optimizer = accelerator.prepare(optimizer)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, settings.steps)
        random = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same on every device
        batches = endless_batches(cache.repeats, settings.batch_size, random)
        process = self.model.process
        history: list[dict[str, float]] = []
        log_every = settings.spf.log_every if settings.spf else 10
        for step in range(settings.steps):
            if stopped():
                return step, history
            batch = cache.batch(next(batches), accelerator.device)
            latents = batch["latents"]
            noise = torch.randn(latents.shape, generator=random).to(latents.device)
            timesteps = process.draw(len(latents), random).to(latents.device)
            noisy = process.noisy(latents, noise, timesteps)

            self.batch = batch
            prediction = self.predict(noisy, timesteps)
            loss = self.loss(prediction, latents, noise, timesteps)
            accelerator.backward(loss)
            value = float(loss.detach())  # after SPF, whose second step of a pair has no loss of its own to show
            if not math.isfinite(value):
                raise SPFError(
                    f"the loss is {value} at step {step + 1}: training has diverged. Use a lower --lr"
                    + (" or --mixed-precision bf16." if settings.mixed_precision == "fp16" else ".")
                )
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            if step % log_every == 0 or step == settings.steps - 1:
                logs = self.generate_step_logs(value, float(schedule.get_last_lr()[0]))
                history.append({"step": step, **logs})
                accelerator.log(logs, step=step)
            progress("training", step + 1, settings.steps, {"loss": value, **self.shown})
            every(step + 1)
        return settings.steps, history
