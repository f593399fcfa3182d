"""A network module for tests: spf_plugin.lora, with each reference prediction compared to an untouched UNet.

Writes `spy.json` into the output folder, an entry for every pair of steps: whether the reference equalled the copy bit
for bit, the largest difference between reference and response, the shape of the noisy latents, and whether the second
step had the first one's noisy latents, timesteps and SDXL's sizes; in the first also the bytes of the UNet before and
now. With `spf_base` the copy is quantised by itself.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spf_plugin import lora
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.hosts.kohya.frames import training_frame
from spf_plugin.hosts.kohya.loop import SIZES


def size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def create_network(
    multiplier: float, dim: int, alpha: float, vae: nn.Module, text_encoder: Any, unet: nn.Module, **kwargs: Any
) -> nn.Module:
    pristine = copy.deepcopy(unet).requires_grad_(False)
    before = size(pristine)
    frame = training_frame()
    assert frame is not None
    trainer, output = frame.f_locals["self"], Path(frame.f_locals["args"].output_dir)
    if kwargs.get("spf_base", "off") != "off":
        QuantisedBase(pristine, kwargs["spf_base"], frame.f_locals["accelerator"].device)
    original, seen = trainer.call_unet, []
    is_sdxl = bool(getattr(trainer, "is_sdxl", False))
    network = lora.create_network(multiplier, dim, alpha, vae, text_encoder, unet, **kwargs)

    def call_unet(args: Any, accelerator: Any, model: nn.Module, *rest: Any, **kw: Any) -> torch.Tensor:
        prediction = original(args, accelerator, model, *rest, **kw)
        shown = [rest[0], rest[1], *(rest[3][name] for name in SIZES if is_sdxl)]
        if torch.is_grad_enabled():
            if seen and "response" not in seen[-1]:
                seen[-1]["response"] = float((prediction.detach() - call_unet.reference).abs().max())
                seen[-1]["shape"] = list(rest[0].shape)
            elif seen:
                seen[-1]["repeats"] = all(torch.equal(a, b) for a, b in zip(shown, call_unet.shown, strict=True))
            call_unet.shown = [tensor.detach().clone() for tensor in shown]
        else:
            like = next(model.parameters())
            pristine.train(model.training).to(like.device, like.dtype)
            base = original(args, accelerator, pristine, *rest, **kw)
            seen.append({"equal": bool(torch.equal(base, prediction))})
            if len(seen) == 1:
                seen[0]["bytes"] = [before, size(model)]
            call_unet.reference = prediction
        (output / "spy.json").write_text(json.dumps(seen))
        return prediction

    trainer.call_unet = call_unet  # below SPF, which wraps it when the network is applied
    return network


create_network_from_weights = lora.create_network_from_weights
