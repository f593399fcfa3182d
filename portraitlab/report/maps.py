"""What a trained LoRA does to one image: the control map at several noise levels, and where each phrase looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spf_plugin import sfcm
from spf_plugin.objective import Path
from spf_plugin.probe import capture, find_layers
from spf_plugin.prompt import Target
from spf_plugin.text import TextSide
from spf_plugin.trainer.models import BaseModel, from_pipeline

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Maps:
    """Maps on the latent grid, `[h, w]` in [0, 1].

    Attributes:
        control: kind of map -> timestep -> the control map.
        phrases: phrase -> its share of the attention, at the middle timestep; the target is the last.
        distances: base phrase -> its semantic distance to the target.
    """

    control: Mapping[str, Mapping[int, Map]]
    phrases: Mapping[str, Map]
    distances: Mapping[str, float]


class _Text:
    """The text side of a pipeline, as `spf_plugin.text.TextHost`."""

    def __init__(self, model: BaseModel):
        self.model = model

    def tokenize(self, text: str) -> Sequence[int]:
        return self.model.tokenizers[0](text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Any:
        return self.model.encode(prompts)


@contextmanager
def _without_lora(pipeline: Any) -> Iterator[None]:
    pipeline.disable_lora()
    try:
        yield
    finally:
        pipeline.enable_lora()


@torch.no_grad()
def explain(
    pipeline: Any,
    image: NDArray[np.uint8],
    caption: str,
    target: Target,
    *,
    timesteps: Sequence[int] = (100, 300, 500, 700, 900),
    kinds: Sequence[str] = ("soft", "difference", "paper"),
    gain: float = 3.0,
    layers: str = "last",
    draws: int = 4,
    seed: int = 0,
) -> Maps:
    """Run both paths on a noised image, as training does, and keep the maps.

    Args:
        pipeline: an SD1.x or SD2.x pipeline with one LoRA loaded (not fused).
        image: uint8 `[H, W, 3]`, without the target.
        caption: the image's description, with the target's phrase.
        target: the target.
        timesteps: noise levels, 0 to 999.
        kinds: maps to make, see `spf_plugin.sfcm.control_map`.
        gain: brightness of the map.
        layers: cross-attention layers, see `spf_plugin.probe.find_layers`.
        draws: noise samples per timestep; the maps are their mean.
        seed: of the noise.
    """
    model = from_pipeline(pipeline)
    if model.family == "sdxl":
        raise ValueError("maps of SDXL need its size conditioning, which this function does not make")
    unet, device = pipeline.unet, pipeline.device
    probed = find_layers(unet, layers)
    side = TextSide(_Text(model), (target,), lambda: _without_lora(pipeline))
    conds = model.encode([caption])
    text = side.for_batch([caption], conds)
    base_conds = model.encode(text.base)
    weights = side.distances(text)
    random = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    latents = model.to_latents(pixels, random)[None].expand(draws, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=random)

    def path(step: int, conditioning: Any, groups: torch.Tensor) -> Path:
        alpha_bar = model.alphas_cumprod[step]
        noisy = (alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise).to(device, unet.dtype)
        with capture(probed) as seen:
            eps = unet(noisy, step, encoder_hidden_states=conditioning.expand(draws, -1, -1)).sample
        return Path.of(eps, seen, probed, groups.expand(draws, -1, -1))

    control: dict[str, dict[int, Map]] = {kind: {} for kind in kinds}
    phrase_maps: Map | None = None
    middle = timesteps[len(timesteps) // 2]
    for step in timesteps:
        with _without_lora(pipeline):
            reference = path(step, base_conds, text.base_groups)
        response = path(step, conds, text.full_groups)
        size = (response.eps.shape[-2], response.eps.shape[-1])
        attention = sfcm.mean_maps(response.attention, size)
        count = text.present.shape[1] - 1
        for kind in kinds:
            m = sfcm.control_map(
                kind,
                eps_res=response.eps,
                eps_ref=reference.eps,
                phrase_maps=attention[:, :count],
                target_map=attention[:, -1:],
                weights=weights.expand(draws, -1),
                gain=gain,
            )
            control[kind][step] = m.mean(dim=(0, 1)).cpu().numpy()
        if step == middle:
            # Each phrase's share of what all phrases receive: the end token takes most attention everywhere.
            words = torch.cat([attention[:, :count], attention[:, -1:]], dim=1)
            phrase_maps = sfcm.stretch(words / words.sum(dim=1, keepdim=True)).mean(dim=0).cpu().numpy()
    assert phrase_maps is not None
    prompt = text.prompts[0]
    names = [*prompt.phrases, prompt.target]
    return Maps(
        control,
        {name: phrase_maps[i] for i, name in enumerate(names)},
        dict(zip(prompt.phrases, weights[0].tolist(), strict=True)),
    )


def separation(region: NDArray[np.bool_], heat: Map) -> float:
    """How well a map finds a region: the chance that a place inside is hotter than one outside (area under the ROC).

    Args:
        region: bool `[H, W]`.
        heat: `[h, w]`, smaller than the region by a whole factor.
    """
    factor = region.shape[0] // heat.shape[0]
    share = region.reshape(heat.shape[0], factor, heat.shape[1], factor).mean(axis=(1, 3))
    inside, outside = heat[share > 0.5], heat[share <= 0.5]
    if not len(inside) or not len(outside):
        return float("nan")
    difference = inside[:, None] - outside[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())
