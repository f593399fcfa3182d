"""A key that answers to the left half of an image, in the host's own Anima.

    python planted.py HOST MODELS     prints, as JSON, how its attention is spread

The left half of a wide noise is shifted, so that its queries differ from the right half's. The key of one token, in
every compared layer, is made what separates the two best (least squares). Its map must then lie on the left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import dits
import launcher
import torch
from torch import Tensor, nn

from spf_plugin.core.sfcm import mean_maps
from spf_plugin.families.known import find
from spf_plugin.probe import capture, pass_of
from spf_plugin.seam import Call

PLANTED, WORDS, LENGTH = 5, 9, 20
H, W = 16, 24  # of the latents
STRENGTH = 6.0  # of the logits


def call() -> Call:
    torch.manual_seed(0)
    noisy = torch.randn(1, 16, 1, H, W)
    noisy[..., : W // 2] += 2
    mask = (torch.arange(LENGTH) < WORDS).long()[None]
    return Call(
        (noisy, torch.tensor([0.5]), torch.randn(1, 16, 64)),
        {
            "padding_mask": torch.zeros(1, 1, H, W),
            "target_input_ids": torch.randint(3, 500, (1, LENGTH)) * mask,
            "target_attention_mask": mask,
            "source_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    )


def separating(query: Tensor) -> Tensor:
    """`[1, N, heads, d]` -> the keys `[heads, d]` that answer 1 on the left half and -1 on the right."""
    left = torch.arange(W // 2).repeat(H // 2) < W // 4
    wanted = torch.where(left, 1.0, -1.0)[:, None]
    keys = [torch.linalg.lstsq(query[0, :, head], wanted).solution[:, 0] for head in range(query.shape[2])]
    return torch.stack(keys) * STRENGTH * query.shape[-1] ** 0.5


@torch.no_grad()
def main(models: Path) -> None:
    dits.shrink()
    from library import anima_utils

    model = anima_utils.load_anima_model(
        "cpu", str(models / "dit.safetensors"), "torch", False, "cpu", torch.float32
    ).eval()
    family, made = find(model), call()
    layers = family.layers("last")
    groups = torch.zeros(1, LENGTH, 2)
    groups[0, PLANTED, 0] = groups[0, WORDS:, 1] = 1
    for layer in layers:  # one after the other: each changes what the later ones see
        with capture(layers) as seen:
            made.on(model)
        key = separating(seen.queries[layer.name])

        def plant(_module: nn.Module, _inputs: object, output: Tensor, key: Tensor = key) -> Tensor:
            output = output.clone()
            output[:, PLANTED] = key
            return output

        layer.key.register_forward_hook(plant)
    with capture(layers) as seen:
        output = made.on(model)
    found = pass_of(family, layers, made, output, seen, groups)
    (planted, padding) = mean_maps(found.attention, found.grids, (H, W))[0]
    parts = {
        "left": planted[:, : W // 2],
        "right": planted[:, W // 2 :],
        "top": planted[: H // 2],
        "bottom": planted[H // 2 :],
        "padding": padding,
    }
    print(json.dumps({"grid": found.grids[0], **{name: float(part.mean()) for name, part in parts.items()}}))


if __name__ == "__main__":
    launcher.prepare(Path(sys.argv[1]).resolve())
    main(Path(sys.argv[2]).resolve())
