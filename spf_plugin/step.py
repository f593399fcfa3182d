"""An aligned step, as the response term and the pictures see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spf_plugin.core.objective import Alignment, Pass
from spf_plugin.core.schedule import Schedule
from spf_plugin.text import BatchText


@dataclass(frozen=True)
class Step:
    """Both passes of a step and what came of them.

    Attributes:
        number: finished optimiser steps.
        text: the batch's captions.
        shown: `[B]` bool, the samples with a target in the response prompt.
        timesteps: `[B]`.
        noisy_latents: `z_t`, `[B, C, h, w]`.
        schedule: of the noise.
        reference: frozen model, base prompts.
        response: trained model, full prompts; with its graph.
        result: losses, map and drift.
    """

    number: int
    text: BatchText
    shown: Tensor
    timesteps: Tensor
    noisy_latents: Tensor
    schedule: Schedule
    reference: Pass
    response: Pass
    result: Alignment
