"""What a LoRA does to the embedded model, in numbers: response, drift, leak, what is kept. See `Evaluator.scores`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from portraitlab.autoencoder import to_tensor
from portraitlab.captions import Target
from portraitlab.demo import Show
from portraitlab.judge import CHOICES, load_judge, predict, probability
from portraitlab.lab.styled import StyleReader, beside
from portraitlab.lab.tasks import Task
from portraitlab.measure import untouched_region
from portraitlab.model_files import CLIP_FOLDERS, JUDGE_FILE, load_pipeline, sample
from portraitlab.portraits import render
from spf_plugin.enhancement import clip
from spf_plugin.families.base import unwrapped
from spf_plugin.trainer.models import BaseModel, from_pipeline
from spf_plugin.trainer.vae import clean_latents

SAMPLER_STEPS, GUIDANCE, DRAWN_TOGETHER = 12, 3.5, 32
NOISE_LEVELS = (0.2, 0.5, 0.8)
KINDS = ("explicit", "partial")
#: How scores name two targets that are taught at once.
ORDER = ("first", "second")

Images = NDArray[np.uint8]


def load_with(model: Path, loras: list[Path], device: str) -> Any:
    """The model's pipeline with LoRAs fused into it, as diffusers loads them."""
    pipeline = load_pipeline(model, device)
    for lora in loras:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def kernel_distance(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """KID: the unbiased squared maximum mean discrepancy with the kernel `(x.y / d + 1)^3` of features `[N, d]`."""

    def kernel(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: NDArray[Any]) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


class Evaluator:
    """The evaluation of a task: its prompts, the base model's pictures for them, and what reads pictures.

    Args:
        task: the task.
        model: folder of the base model.
        device: where to draw.
        show: progress.
    """

    def __init__(self, task: Task, model: Path, device: str, show: Show):
        self.task, self.model, self.device, self.show = task, model, device, show
        self.prompts = task.evaluation()
        # Half of the prompts also without the target: the first half of each kind.
        kept = list(range(task.prompts // 2 or 1))
        self.bare = [*kept, *(task.prompts + i for i in kept)]
        self.judge = load_judge(JUDGE_FILE)
        self.scorer = clip.load(str(CLIP_FOLDERS[1]))
        goal = task.goal
        self.untouched = {part.name: untouched_region(part) for part in (goal, *goal.parts) if not part.is_style}
        asked = np.stack([task.picture(person.with_(**goal.changes)) for person in task.persons])
        neutral = np.stack([render(person, 128)[0] for person in task.persons])
        pipeline = load_pipeline(model, device)
        self.style: StyleReader | None = None
        if goal.is_style:
            self.style = StyleReader.fitted(self.judge, pipeline.vae)
            self.judge = self.style.judge
        self.asked_features = self._features(asked)
        self._latents = self._noised(from_pipeline(pipeline), neutral)
        self.base = self._draw(pipeline, [p.base_prompt for p in self.prompts], [p.seed for p in self.prompts], "base")
        self.seen_base = predict(self.judge, self.base)
        self.base_noise = self._predictions(pipeline)

    # -- what the models make -------------------------------------------------------------------------------------

    def _draw(self, pipeline: Any, texts: list[str], seeds: list[int], label: str) -> Images:
        return sample(
            pipeline,
            texts,
            seeds,
            steps=SAMPLER_STEPS,
            guidance=GUIDANCE,
            batch=DRAWN_TOGETHER,
            report=lambda done, total: self.show(f"{label}: drawing", done, total, {}),
        )

    def draw(self, pipeline: Any, label: str) -> tuple[Images, Images]:
        """Pictures for all prompts with the target, and for the prompts `bare` without it."""
        texts = [p.target_prompt for p in self.prompts] + [self.prompts[i].base_prompt for i in self.bare]
        seeds = [p.seed for p in self.prompts] + [self.prompts[i].seed for i in self.bare]
        both = self._draw(pipeline, texts, seeds, label)
        return both[: len(self.prompts)], both[len(self.prompts) :]

    @torch.no_grad()
    def _noised(self, model: BaseModel, pictures: Images) -> list[tuple[float, torch.Tensor]]:
        """Held-out portraits, noised to each of the noise levels: what the base model is asked to denoise."""
        random = torch.Generator().manual_seed(self.task.evaluation_seed)
        latents = clean_latents(model.vae, to_tensor(pictures).to(self.device)).cpu()
        found = []
        for level in NOISE_LEVELS:
            noise = torch.randn(latents.shape, generator=random)
            found.append((level, model.process.noisy(latents, noise, model.process.at(level, len(latents)))))
        return found

    @torch.no_grad()
    def _predictions(self, pipeline: Any) -> torch.Tensor:
        """Predictions for the explicit base prompts, `[levels, N, 4, 16, 16]`."""
        model = from_pipeline(pipeline)
        text = model.encode([prompt.base_prompt for prompt in self.prompts[: self.task.prompts]])
        sizes = torch.zeros(self.task.prompts, 6)  # the embedded models are not told any
        found = []
        for level, noisy in self._latents:
            timesteps = model.process.at(level, len(noisy)).to(self.device)
            call = model.call(noisy.to(self.device), timesteps, text, sizes)
            found.append(unwrapped(call.on(model.denoiser)).float().cpu())
        return torch.stack(found)

    @torch.no_grad()
    def _features(self, images: Images) -> NDArray[Any]:
        return self.judge.features(to_tensor(images)).double().numpy()

    def _alone(self, pipeline: Any, part: Target) -> Images:
        """Pictures for the prompts `bare` with one of several targets."""
        texts = [part.added_to(self.prompts[i].base_prompt) for i in self.bare]
        return self._draw(pipeline, texts, [self.prompts[i].seed for i in self.bare], part.name)

    # -- the numbers ----------------------------------------------------------------------------------------------

    def _shown(self, images: Images, goal: Target) -> NDArray[np.float64]:
        """How sure it is that each image shows the target, or how much of the style it shows, `[N]`."""
        if self.style is not None:
            return self.style.share(images)
        return probability(self.judge, images, {n: value for n, value in goal.changes.items() if value is not False})

    def _drift(self, images: Images, base: Images, goal: Target) -> NDArray[np.float64]:
        """Mean squared change of what the target has no business with, `[N]`."""
        if self.style is not None:
            return beside(images, base)
        change = (images.astype(np.float32) - base.astype(np.float32))[:, self.untouched[goal.name]] / 255
        found: NDArray[np.float64] = (change**2).mean(axis=(1, 2))
        return found

    def _at_once(self, pipeline: Any) -> dict[str, float]:
        """Of two targets: what shows where only one is asked for."""
        found, drift = {}, []
        parts = self.task.goal.parts
        for part, other, name, of in zip(parts, parts[::-1], ORDER, ORDER[::-1], strict=True):
            images = self._alone(pipeline, part)
            found[f"{name}_alone"] = float(self._shown(images, part).mean())
            found[f"{of}_bled"] = float(self._shown(images, other).mean())
            drift.append(float(self._drift(images, self.base[self.bare], part).mean()))
        return {**found, "drift_alone": float(np.mean(drift))}

    def scores(self, with_: Images, bare: Images, pipeline: Any) -> dict[str, float]:
        """All numbers about a model.

        `_explicit` prompts name clothes and background, `_partial` ones leave them open.

        - `response_*`: the judge's mean probability of the target where the prompt names it; `shows`: the share of the
          pictures where it is above one half, both kinds together.
        - `drift_*`: mean squared change of the pixels (in [0, 1]) that the target has no business with, against the
          base model's picture for the base prompt at the same seed. Of a style: see `styled.beside`.
        - `attributes_*`: share of the judge's attributes, the target's left out, that read as in the base picture.
        - `leak`: mean probability of the target where the prompt does not name it.
        - `reconstruction`: mean squared change of all pixels on base prompts.
        - `noise_drift`: relative squared change of the prediction on held-out, noised portraits with base prompts.
        - `follows`: share of the clothes colours and backgrounds (of a set of one person hair colours and skins) that
          explicit prompts name and pictures show.
        - `uninvited`: share of the pictures with the training set's background or clothes colour (that person's hair
          colour or skin), where the base picture has another.
        - `kid`: kernel distance, in the judge's features, of the explicit pictures to renders of what was asked for.
        - `clip`: similarity to the target's phrase in a CLIP model that guided nobody.

        Of a style, `response_*` and `leak` are how much of it shows (`StyleReader.share`). Of two targets at once they
        are about both, and there are, for prompts (half of them) that name one: `first_alone`, `second_alone`: the
        probability of that one; `first_bled`, `second_bled`: of that one, where only the other is named; `drift_alone`.
        """
        goal, count = self.task.goal, self.task.prompts
        sure, seen = self._shown(with_, goal), predict(self.judge, with_)
        others = [name for name in CHOICES if name not in goal.changes]
        shared = self.task.shared
        found: dict[str, float] = {"shows": float((sure > 0.5).mean())}
        drift = self._drift(with_, self.base, goal)
        same = np.array([[s[n] == b[n] for n in others] for s, b in zip(seen, self.seen_base, strict=True)]).mean(1)
        for kind, rows in zip(KINDS, (slice(0, count), slice(count, None)), strict=True):
            found[f"response_{kind}"] = float(sure[rows].mean())
            found[f"drift_{kind}"] = float(drift[rows].mean())
            found[f"attributes_{kind}"] = float(same[rows].mean())
        found["leak"] = float(self._shown(bare, goal).mean())
        unasked = bare.astype(np.float32) - self.base[self.bare].astype(np.float32)
        found["reconstruction"] = float(((unasked / 255) ** 2).mean())
        predicted, reference = self._predictions(pipeline), self.base_noise
        found["noise_drift"] = float((predicted - reference).square().sum() / reference.square().sum())
        named = [
            [s[n] == getattr(p.person, n) for n in shared] for s, p in zip(seen[:count], self.prompts, strict=False)
        ]
        found["follows"] = float(np.mean(named))
        uninvited = [
            [s[n] == value for n, value in shared.items() if b[n] != value]
            for s, b in zip(seen, self.seen_base, strict=True)
        ]
        found["uninvited"] = float(np.mean([value for row in uninvited for value in row]))
        found["kid"] = kernel_distance(self._features(with_[:count]), self.asked_features)
        with torch.no_grad():
            text = self.scorer.text([goal.phrase])[0]
            found["clip"] = float((self.scorer.image(to_tensor(with_)) @ text).mean())
        return found | (self._at_once(pipeline) if goal.parts else {})
