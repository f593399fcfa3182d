"""What a trained LoRA does to one image: the control map at several noise levels, where each phrase looks, drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spf_plugin.core import sfcm
from spf_plugin.core.losses import relative_drift
from spf_plugin.core.objective import Pass
from spf_plugin.core.prompt import Target
from spf_plugin.families.base import Text
from spf_plugin.families.known import find
from spf_plugin.probe import capture, pass_of
from spf_plugin.seam import Call
from spf_plugin.text import TextSide, map_text
from spf_plugin.trainer.models import BaseModel, from_pipeline

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Drift:
    """How far predictions of the noise at one timestep are from the base model's for the base prompt, relative to it.

    See `spf_plugin.core.losses.relative_drift`; not a number where the region is empty.

    Attributes:
        base_prompt: with the LoRA, base prompt: what it changes unasked.
        inside: with the LoRA, full prompt, inside the control map.
        outside: likewise, outside the map.
        full_prompt: likewise, everywhere.
        words: without the LoRA, full prompt: what the words do to the base model.
        map_mean: mean of the map, the share of the image that may change.
    """

    base_prompt: float
    inside: float
    outside: float
    full_prompt: float
    words: float
    map_mean: float


@dataclass(frozen=True)
class Maps:
    """Maps on the latent grid, `[h, w]` in [0, 1].

    Attributes:
        control: kind of map -> timestep -> the control map.
        phrases: phrase -> its share of the attention, at the middle timestep; the target is the last.
        distances: base phrase -> its semantic distance to the target.
        subtracted: timestep -> what the `soft` map takes from the noise difference: the phrases' shares of the
            attention, each times its distance, at most a half.
        drift: timestep -> the drift there, in and outside the first kind of map; mean over the draws.
    """

    control: Mapping[str, Mapping[int, Map]]
    phrases: Mapping[str, Map]
    distances: Mapping[str, float]
    subtracted: Mapping[int, Map]
    drift: Mapping[int, Drift]


NOISE_LEVELS = 1000


class _Text:
    """The text side of a pipeline, as `spf_plugin.text.TextHost`."""

    prefix = ""

    def __init__(self, model: BaseModel):
        self.model = model

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        return self.model.tokenize(text, which)

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Any:
        return self.model.encode(prompts)


@contextmanager
def _without_lora(pipeline: Any) -> Iterator[None]:
    pipeline.disable_lora()
    try:
        yield
    finally:
        pipeline.enable_lora()


class _Noised:
    """An image with the same noise at every level, and what a model predicts of it.

    Args:
        pipeline: an SD1.x, SD2.x, SDXL or SD3 pipeline.
        image: uint8 `[H, W, 3]`.
        draws: noise samples.
        seed: of the noise.
    """

    def __init__(self, pipeline: Any, image: NDArray[np.uint8], draws: int, seed: int):
        self.model, self.device, self._draws = from_pipeline(pipeline), pipeline.device, draws
        self.family = find(self.model.denoiser)
        random = torch.Generator().manual_seed(seed)
        pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        self._latents = self.model.to_latents(pixels, random)[None].expand(draws, -1, -1, -1)
        self._noise = torch.randn(self._latents.shape, generator=random)
        self._sizes = torch.tensor([[*image.shape[:2], 0, 0, *image.shape[:2]]]).expand(draws, -1)

    def call(self, step: int, conditioning: Text) -> Call:
        """Of the denoiser, at a timestep of 0 to 999."""
        process, draws = self.model.process, self._draws
        at = process.at(step / NOISE_LEVELS, draws)
        noisy = process.noisy(self._latents, self._noise, at).to(self.device, self.model.denoiser.dtype)
        conditioning = map_text(lambda part: part.expand(draws, *part.shape[1:]), conditioning)
        return self.model.call(noisy, at.to(self.device), conditioning, self._sizes)

    def predict(self, step: int, conditioning: Text) -> torch.Tensor:
        """`[draws, C, h, w]`."""
        made = self.call(step, conditioning)
        return self.family.prediction(made.on(self.model.denoiser), made)


@torch.no_grad()
def unasked(
    pipeline: Any, image: NDArray[np.uint8], prompt: str, *, timesteps: Sequence[int], draws: int, seed: int = 0
) -> float:
    """How far the LoRA moves the predictions for a prompt from the base model's, relative to these; mean of all levels.

    Args:
        pipeline: with one LoRA loaded (not fused).
        image: the base model's for the prompt, uint8 `[H, W, 3]`.
        prompt: one that says nothing of the target.
        timesteps: noise levels, 0 to 999, thousandths of all.
        draws: noise samples per timestep.
        seed: of the noise.
    """
    noised = _Noised(pipeline, image, draws, seed)
    with _without_lora(pipeline):
        text = noised.model.encode([prompt])
        reference = [noised.predict(step, text) for step in timesteps]
    text = noised.model.encode([prompt])  # the text encoder may have been trained too
    drifts = [
        relative_drift(noised.predict(step, text), eps, torch.ones_like(eps[:, :1])).mean()
        for step, eps in zip(timesteps, reference, strict=True)
    ]
    return float(torch.stack(drifts).mean())


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
        pipeline: an SD1.x, SD2.x, SDXL or SD3 pipeline with one LoRA loaded (not fused).
        image: uint8 `[H, W, 3]`, without the target.
        caption: the image's description, with the target's phrase.
        target: the target.
        timesteps: noise levels, 0 to 999, thousandths of all.
        kinds: maps to make, see `spf_plugin.core.sfcm.control_map`.
        gain: brightness of the map.
        layers: cross-attention layers, see `spf_plugin.families.base.Family.layers`.
        draws: noise samples per timestep; the maps are their mean.
        seed: of the noise.
    """
    noised = _Noised(pipeline, image, draws, seed)
    model, family, predict = noised.model, noised.family, noised.predict
    probed = family.layers(layers)
    side = TextSide(_Text(model), family, (target,), lambda: _without_lora(pipeline))
    trained_text = model.encode([caption])
    text = side.for_batch([caption], trained_text)
    with _without_lora(pipeline):  # the text encoder may have been trained too
        reference_text, words_text = model.encode(text.base), model.encode(text.full)
    base_text = model.encode(text.base)
    weights = side.distances(text)

    def compared(step: int, conditioning: Text, groups: torch.Tensor) -> Pass:
        made = noised.call(step, conditioning)
        with capture(probed) as seen:
            output = made.on(model.denoiser)
        return pass_of(family, probed, made, output, seen, groups.expand(draws, -1, -1))

    control: dict[str, dict[int, Map]] = {kind: {} for kind in kinds}
    subtracted: dict[int, Map] = {}
    drift: dict[int, Drift] = {}
    phrase_maps: Map | None = None
    middle = timesteps[len(timesteps) // 2]
    for step in timesteps:
        with _without_lora(pipeline):
            reference = compared(step, reference_text, text.base_groups)
            words = predict(step, words_text)
        response = compared(step, trained_text, text.full_groups)
        size = (response.eps.shape[-2], response.eps.shape[-1])
        attention = sfcm.mean_maps(response.attention, response.grids, size)
        count = text.present.shape[1] - 1
        shares = sfcm.share(attention[:, :count], attention[:, -1:])
        taken = (sfcm.soft_weights(weights)[..., None, None] * shares).sum(dim=1)
        subtracted[step] = taken.mean(dim=0).cpu().numpy()
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
            if kind == kinds[0]:
                everywhere = torch.ones_like(m)
                pairs = (
                    (predict(step, base_text), everywhere), (response.eps, m), (response.eps, 1 - m),
                    (response.eps, everywhere), (words, everywhere),
                )  # fmt: skip
                base, inside, outside, full, alone = [
                    float(relative_drift(eps, reference.eps, region).nanmean()) for eps, region in pairs
                ]
                drift[step] = Drift(base, inside, outside, full, alone, float(m.mean()))
        if step == middle:
            # Each phrase's share of what all phrases receive: the end token takes most attention everywhere.
            named = torch.cat([attention[:, :count], attention[:, -1:]], dim=1)
            phrase_maps = sfcm.stretch(named / named.sum(dim=1, keepdim=True)).mean(dim=0).cpu().numpy()
    assert phrase_maps is not None
    prompt = text.prompts[0]
    names = [*prompt.phrases, prompt.target]
    return Maps(
        control,
        {name: phrase_maps[i] for i, name in enumerate(names)},
        dict(zip(prompt.phrases, weights[0].tolist(), strict=True)),
        subtracted,
        drift,
    )
