"""What a run shows while it trains: pictures of a few samples, and warnings when its numbers go wrong.

Nothing here can stop a run: what cannot be drawn or written is said once and left out.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from spf_plugin import terminal
from spf_plugin.config import SPFConfig
from spf_plugin.core import losses, sfcm
from spf_plugin.enhancement.decoders import LinearDecoder, load_linear
from spf_plugin.families.latents import LatentSpace
from spf_plugin.files import expanded
from spf_plugin.lorafile.writer import renamed
from spf_plugin.shown import preview
from spf_plugin.step import Step

logger = terminal.logger(__name__)

SAMPLES = 4  # shown again and again, the first that come
CLEAR, NOISY = 0.25, 0.75  # noise levels of the pictures: below there is little to change, above little to see
HISTORY = 50  # logged steps that a warning looks back on
EMPTY, FULL = 0.01, 0.9  # mean of the map where there is a target
GROWTH = 1.5  # of the drift outside, from the older half of the history to the newer

Row = Mapping[str, float]


class WatchedHost(Protocol):
    """What the pictures need of a host."""

    accelerator: Any  # may have trackers

    @property
    def output(self) -> Path:
        """The LoRA's file, without its suffix: `OUTPUT_DIR/OUTPUT_NAME`."""
        ...

    @property
    def vae(self) -> Any: ...


def concerns(history: Sequence[Row]) -> dict[str, str]:
    """What the last `HISTORY` logged steps (oldest first) say is going wrong: a short name -> a sentence for the user.

    Args:
        history: the numbers of each logged step that had a target, as they go to the trackers; `spf/map_mean` is the
            mean over the samples with a target. Fewer rows than `HISTORY` say nothing yet.
    """
    found: dict[str, str] = {}
    if len(history) < HISTORY:
        return found

    def values(name: str, rows: Sequence[Row]) -> list[float]:
        return [row[name] for row in rows if name in row]

    area = fmean(values("spf/map_mean", history) or [0.5])
    if area < EMPTY:
        found["empty"] = (
            f"the control map has been empty over the last {HISTORY} logged steps (mean {area:.3f}): the target has no "
            "room to be learned. Raise spf_map_gain, and see whether base phrases name the target, too (spf check)"
        )
    elif area > FULL:
        found["full"] = (
            f"the control map has covered nearly everything over the last {HISTORY} logged steps (mean {area:.2f}): "
            "almost nothing is held to the base model. Lower spf_map_gain"
        )
    older, newer = history[: len(history) // 2], history[len(history) // 2 :]
    inside = [values("spf/drift_inside", rows) for rows in (older, newer)]
    outside = [values("spf/drift_outside", rows) for rows in (older, newer)]
    if (
        all(inside)
        and all(outside)
        and fmean(outside[1]) > GROWTH * fmean(outside[0])
        and fmean(inside[1]) <= fmean(inside[0])
    ):
        found["drift"] = (
            f"the drift outside the map grew from {fmean(outside[0]):.3f} to {fmean(outside[1]):.3f} within {HISTORY} "
            "logged steps, and the one inside did not: the LoRA learns what is not its target. Stop at an earlier "
            "save, lower the learning rate, or raise spf_output_multiplier"
        )
    return found


def pictures_folder(output: Path) -> Path:
    """`OUTPUT_NAME-spf`, cut where the name would be longer than a folder's can be."""
    return renamed(output.with_name(f"{output.name}.safetensors"), "-spf")


class Watch:
    """The pictures and warnings of a run; only for its main process.

    Args:
        config: the settings.
        host: where the run writes.
        space: the latents of the model's family, for colours.
    """

    def __init__(self, config: SPFConfig, host: WatchedHost, space: LatentSpace | None):
        self.config, self.host, self._space = config, host, space
        self._history: deque[Row] = deque(maxlen=HISTORY)
        self._warned: set[str] = set()
        self._due: dict[frozenset[str], int] = {}  # a shown caption's parts (they may be shuffled) -> its next step
        self._drawing = config.preview_every > 0
        self._decoder: LinearDecoder | None = None
        self._decoder_sought = False
        self._disk_refused = False

    # -- warnings -------------------------------------------------------------------------------------------------

    def record(self, logs: Row, control_map: Tensor, which: Tensor) -> None:
        """Look at the numbers of a logged step; `which` `[B]` bool are its samples with a target."""
        if not which.any():
            return
        row = {**logs, "spf/map_mean": float(control_map[which].mean())}
        self._history.append(row)
        found = concerns(list(self._history))
        for name in found.keys() - self._warned:
            logger.warning(f"SPF: {found[name]}.")
        self._warned = set(found)

    # -- pictures -------------------------------------------------------------------------------------------------

    def show(self, step: Step) -> None:
        """Draw the samples of a step whose turn it is, if any."""
        if not self._drawing:
            return
        try:
            for i, key in self._turns(step):
                image = preview.render(self._sample(i, step))
                self._due[key] = step.number + self.config.preview_every
                number = list(self._due).index(key) + 1
                self._write(f"sample{number}-step{step.number:08d}.png", image)
                self._to_trackers(f"spf/sample{number}", image, step.number)
        except Exception as error:  # a picture is never worth a run
            self._drawing = False
            logger.warning(f"SPF: no more pictures of this run: {type(error).__name__}: {error}")

    def _turns(self, step: Step) -> list[tuple[int, frozenset[str]]]:
        """Samples to draw now, `(index, key)`, each caption once. Only the middle half of the noise levels: before it
        there is little to see, behind it little to change."""
        found: dict[frozenset[str], int] = {}
        for i, prompt in enumerate(step.text.prompts):
            key = frozenset(part.strip() for part in prompt.full.split(","))
            new = key not in self._due and len(self._due) + len(found) < SAMPLES
            if prompt.has_target and key not in found and (new or self._due.get(key, step.number + 1) <= step.number):
                found[key] = i
        if not found:
            return []
        level = step.schedule.level(step.timesteps)
        right = (step.shown & ((level >= CLEAR) & (level < NOISY)).to(step.shown.device)).tolist()
        return [(i, key) for key, i in found.items() if right[i]]

    @torch.no_grad()
    def _sample(self, i: int, step: Step) -> preview.Sample:
        prompt, t = step.text.prompts[i], step.timesteps[i : i + 1].cpu()

        def small(tensor: Tensor) -> Tensor:
            return tensor[i : i + 1].detach().float().cpu()

        z, m = small(step.noisy_latents), small(step.result.map)
        predicted, expected = small(step.response.eps), small(step.reference.eps)
        attention = sfcm.mean_maps(
            [small(a) for a in step.response.attention],
            step.response.grids,
            (z.shape[-2], z.shape[-1]),
            step.response.frames,
        )[0]
        count, groups = len(prompt.phrases), attention.shape[0]
        words = attention[[groups - 1, *range(count)]]  # between them: EOS and padding, which take most everywhere
        maps = sfcm.stretch((words / words.sum(dim=0).clamp_min(1e-8))[None])[0]

        def colours(eps: Tensor) -> Tensor:
            return self._colours(step.schedule.clean(z, eps, t))

        drift = [float(losses.relative_drift(predicted, expected, weight)) for weight in (m, 1 - m)]
        return preview.Sample(
            caption=prompt.full,
            facts=(
                f"step {step.number}, noise level {1000 * float(step.schedule.level(t)):.0f} of 1000, "
                f"drift inside {drift[0]:.3f}, outside {drift[1]:.3f}"
            ),
            base=colours(expected),
            trained=colours(predicted),
            control=m[0, 0],
            phrases=dict(zip([prompt.target, *prompt.phrases], maps, strict=True)),
        )

    def _colours(self, latents: Tensor) -> Tensor:
        """`[1, 4, h, w]` -> `[3, h, w]` in [0, 1]: a linear decoder where one is known, else the latents' mean in grey.
        No model is loaded or moved for it."""
        if not self._decoder_sought:
            self._decoder_sought = True
            if self.config.decoder.endswith(".safetensors"):
                self._decoder = load_linear(expanded(self.config.decoder))
            elif self._space is not None and self._space.is_of(self.host.vae):
                self._decoder = LinearDecoder.of(self._space)
        if self._decoder is not None:
            return (self._decoder(latents)[0] / 2 + 0.5).clamp(0, 1)
        grey = latents[0].mean(dim=0, keepdim=True)
        return sfcm.stretch(grey[None])[0].expand(3, -1, -1)

    def _to_trackers(self, name: str, image: Any, step: int) -> None:
        for tracker in getattr(self.host.accelerator, "trackers", []):
            if tracker.name == "tensorboard":
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                batch = pixels.view(1, image.height, image.width, 3).numpy()
                tracker.log_images({name: batch}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":  # it has steps of its own: the picture goes with the next row
                tracker.log_images({name: [image]}, commit=False)

    def _write(self, name: str, image: Any) -> None:
        folder = pictures_folder(self.host.output)
        aside = folder / f".{name}.{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            image.save(aside, format="PNG")
            os.replace(aside, folder / name)
            self._disk_refused = False
        except OSError as error:
            if not self._disk_refused:
                logger.warning(f"SPF: {folder / name} was not written: {error.strerror or error}. Training goes on.")
            self._disk_refused = True
            with contextlib.suppress(OSError):
                aside.unlink()
