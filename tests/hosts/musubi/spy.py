"""A network module for tests: spf_plugin.lora, with each reference prediction compared to an untouched transformer.

Writes `spy.json` into the output folder, an entry for every pair of steps: whether the reference equalled the copy bit
for bit, the largest difference between reference and response, the shape of the noisy latents, whether a caption had
the target, without which there is no second step, and whether that had the first one's noisy latents and timesteps.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spf_plugin import lora
from spf_plugin.hosts.frames import training_frame
from spf_plugin.seam import Call

create_arch_network_from_weights = lora.create_arch_network_from_weights


def create_arch_network(
    multiplier: float, dim: int, alpha: float, vae: nn.Module, text_encoder: Any, unet: nn.Module, **kwargs: Any
) -> nn.Module:
    network = lora.create_arch_network(multiplier, dim, alpha, vae, text_encoder, unet, **kwargs)
    return watched(network, unet)


def watched(network: nn.Module, unet: nn.Module) -> nn.Module:
    offloaders = [part for name, part in vars(unet).items() if name.startswith("offloader") and part is not None]
    # These have threads, which cannot be copied.
    pristine = copy.deepcopy(unet, {id(part): None for part in offloaders}).requires_grad_(False)
    pristine.blocks_to_swap = None  # type: ignore[assignment]
    frame = training_frame()
    assert frame is not None
    output = Path(frame.f_locals["args"].output_dir)
    accelerator = frame.f_locals["accelerator"]
    host, family = network.spf.host, network.spf.family  # type: ignore[union-attr]
    seen: list[dict[str, Any]] = []
    last: dict[str, Any] = {}

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output_: Any) -> None:
        if host.batch is None:
            return
        call = Call(args, kwargs)
        prediction = family.prediction(output_, call).detach()
        shown = [family.noisy_latents(call).detach().clone(), family.timesteps(call).detach().clone()]
        if torch.is_grad_enabled():
            if seen and "response" not in seen[-1]:
                seen[-1]["response"] = float((prediction - last["reference"]).abs().max())
                seen[-1]["shape"] = list(shown[0].shape)
            elif seen:
                seen[-1]["repeats"] = all(torch.equal(a, b) for a, b in zip(shown, last["shown"], strict=True))
            last["shown"] = shown
        else:
            like = next(model.parameters())
            pristine.train(model.training).to(like.device, like.dtype)
            with accelerator.autocast():
                base = family.prediction(pristine(*args, **kwargs), call)
            said = [target.phrase for target in network.spf.config.target]  # type: ignore[union-attr]
            target = any(words in caption for caption in host.captions(host.batch) for words in said)
            seen.append({"equal": bool(torch.equal(base.float(), prediction.float())), "target": target})
            last["reference"] = prediction
        (output / "spy.json").write_text(json.dumps(seen))

    unet.register_forward_hook(hook, with_kwargs=True)  # before SPF's, so of what the model itself gives
    return network
