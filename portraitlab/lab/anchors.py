"""The `self` anchor: SPF aligns on pictures that the base model drew itself, as in the paper's figure.

The plugin's own anchor is `train`: both paths see the training picture's noisy latent. Here an aligned step replaces it
by a latent of the picture that the base model draws for the sample's base prompt, with the same noise and timestep. The
diffusion loss then has nothing to say in that step; it acts in the steps that are not aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portraitlab.autoencoder import to_tensor
from portraitlab.lab.tasks import Task
from portraitlab.model_files import load_pipeline, sample
from spf_plugin import lora, patching
from spf_plugin.attachment import Attachment
from spf_plugin.config import SPFConfig
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.trainer.loop import Objective, Trainer

DRAWING_SEED, SAMPLER_STEPS = 7000, 12


def moved(noisy: Tensor, latents: Tensor, others: Tensor, alpha_bar: Tensor) -> Tensor:
    """`z_t` of `others`, with the noise that `noisy = sqrt(a) latents + sqrt(1 - a) noise` has; all `[B, 4, h, w]`.

    Args:
        noisy: `z_t` of the training pictures.
        latents: their clean latents.
        others: clean latents of the pictures to align on.
        alpha_bar: `[B]`.
    """
    return noisy + alpha_bar.view(-1, 1, 1, 1).sqrt() * (others - latents)


def drawn_latents(task: Task, seed: int, trainer: Trainer) -> Tensor:
    """What the base model draws for the base prompt of each training picture, `[N, 4, h, w]`, in the files' order."""
    prompts = [example.base_caption for example in task.examples(seed)]
    seeds = range(DRAWING_SEED, DRAWING_SEED + len(prompts))
    pictures = sample(load_pipeline(Path(trainer.settings.model)), prompts, seeds, steps=SAMPLER_STEPS)
    random = torch.Generator().manual_seed(seed)
    return torch.stack([trainer.model.to_latents(picture, random) for picture in to_tensor(pictures)])


def objective(task: Task, seed: int, config: SPFConfig) -> Objective:
    """SPF with the `self` anchor, as an objective of the reference trainer."""

    def attach(network: nn.Module, trainer: Trainer) -> Callable[[], None]:
        own = drawn_latents(task, seed, trainer)
        lora.attach(network, ReferenceHost(trainer), config, trainer.model.unet)
        attachment: Attachment = network.spf  # type: ignore[assignment]
        original, loss = trainer.call_unet, trainer.loss

        def call_unet(
            args: Any, accelerator: Any, unet: Any, noisy: Tensor, timesteps: Tensor, conds: Any, batch: Any, dtype: Any
        ) -> Tensor:
            if attachment.aligns_now:
                alpha_bar = trainer.model.alphas_cumprod.to(noisy.device)[timesteps]
                noisy = moved(noisy, batch["latents"], own[batch["indices"]].to(noisy), alpha_bar)
            return original(args, accelerator, unet, noisy, timesteps, conds, batch, dtype)

        def diffusion_loss(prediction: Tensor, *rest: Tensor) -> Tensor:
            return loss(prediction.detach() if attachment.aligns_now else prediction, *rest)

        patches = ExitStack()  # below SPF's own patches, which the end of training takes away first
        patches.enter_context(patching.patched(trainer, "call_unet", call_unet))
        patches.enter_context(patching.patched(trainer, "loss", diffusion_loss))

        def detach() -> None:
            attachment.close()
            patches.close()

        return detach

    return attach
