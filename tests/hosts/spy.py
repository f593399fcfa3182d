"""A network module for tests: spf_plugin.lora, with each reference prediction compared to an untouched denoiser.

Writes `spy.json` into the output folder, an entry for every pair of steps: whether the reference equalled the copy bit
for bit, the largest difference between reference and response, the shape of the noisy latents, and whether the second
step had the first one's noisy latents, timesteps and SDXL's sizes; in the first also the bytes of the UNet before and
now. With `spf_base` the copy is quantised by itself. `encoders` says how many text encoders were still there.
"""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spf_plugin import lora
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.families.known import find
from spf_plugin.families.unet import SIZES, UNet
from spf_plugin.hosts.frames import training_frame
from spf_plugin.seam import Call


def size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def create_network(
    multiplier: float, dim: int, alpha: float, vae: nn.Module, text_encoder: Any, unet: nn.Module, **kwargs: Any
) -> nn.Module:
    pristine = copy.deepcopy(unet).requires_grad_(False)
    before = size(pristine)
    frame = training_frame()
    assert frame is not None
    output = Path(frame.f_locals["args"].output_dir)
    if kwargs.get("spf_base", "off") != "off":
        QuantisedBase(find(pristine).linear_layers(), kwargs["spf_base"], frame.f_locals["accelerator"].device)
    network = lora.create_network(multiplier, dim, alpha, vae, text_encoder, unet, **kwargs)
    host, family = network.spf.host, network.spf.family  # type: ignore[union-attr]
    encoders = [weakref.ref(e) for e in (text_encoder if isinstance(text_encoder, list) else [text_encoder])]
    del text_encoder
    seen: list[dict[str, Any]] = []
    last: dict[str, Any] = {}

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output_: Any) -> None:
        if host.batch is None:
            return
        call = Call(args, kwargs)
        prediction = family.prediction(output_, call)
        noisy = family.noisy_latents(call)
        sizes = [vector[:, -SIZES:] for vector in args[3:4] if isinstance(family, UNet) and torch.is_tensor(vector)]
        shown = [noisy, family.timesteps(call), *sizes]
        if torch.is_grad_enabled():
            if seen and "response" not in seen[-1]:
                seen[-1]["response"] = float((prediction.detach() - last["reference"]).abs().max())
                seen[-1]["shape"] = list(noisy.shape)
            elif seen:
                seen[-1]["repeats"] = all(torch.equal(a, b) for a, b in zip(shown, last["shown"], strict=True))
            last["shown"] = [tensor.detach().clone() for tensor in shown]
        else:
            like = next(model.parameters())
            pristine.train(model.training).to(like.device, like.dtype)
            base = family.prediction(pristine(*args, **kwargs), call)
            there = sum(encoder() is not None for encoder in encoders)
            seen.append({"equal": bool(torch.equal(base.float(), prediction.float())), "encoders": there})
            if len(seen) == 1:
                seen[0]["bytes"] = [before, size(model)]
            last["reference"] = prediction
        (output / "spy.json").write_text(json.dumps(seen))

    unet.register_forward_hook(hook, with_kwargs=True)  # before SPF's, so of what the model itself gives
    return network


create_network_from_weights = lora.create_network_from_weights
