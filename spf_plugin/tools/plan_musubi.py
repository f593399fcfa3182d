"""What `plan` knows of musubi-tuner's transformers: sizes, activations and operations, tracked once.

Tracked as those of sd-scripts are (`plan_dit`), on the host's own classes in full size (v0.3.4, 30c658c), with its own
network of rank 16, its own call and loss, bf16, texts of 256 tokens (FLUX.2 and Wan fill theirs up to 512): a plain
step, and both steps of a pair by SPF's own code (`python -m benchmarks.musubi_cost MUSUBI-TUNER` writes
`plan_musubi.json`). Nothing was measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from spf_plugin.tools.plan_dit import CHECKPOINTING, FIRST, KEPT, PLAIN, SECOND

RANK = 16
FIGURES = Path(__file__).with_name("plan_musubi.json")
#: Of the frozen model: 16 bits, the host's `--fp8_base` alone, and with `--fp8_scaled`.
DENSE, CAST, SCALED = "bf16", "fp8", "fp8_scaled"


@cache
def figures() -> dict[str, Any]:
    """The tracked figures."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class MusubiModel:
    """A model.

    Attributes:
        name: of its figures.
        said: as people say it.
        arch: SPF's name of the host's trainer (`hosts.musubi.scripts`).
        chosen_by: the option of the trainer that chooses it among others, and its values; empty where it has one only.
        weights: in which the host runs it.
        clips: it trains on videos, too.
    """

    name: str
    said: str
    arch: str
    chosen_by: tuple[str, tuple[str, ...]] = ("", ())
    weights: tuple[str, ...] = (DENSE, CAST, SCALED)
    clips: bool = False

    @property
    def _figures(self) -> Mapping[str, Any]:
        return figures()["models"][self.name]

    @property
    def lora(self) -> int:
        """Parameters of the LoRA for each rank: the sum of features in and out over the host's modules."""
        return self._figures["lora"]

    @property
    def shrunk(self) -> tuple[str, str]:
        """The settings that shrink the frozen weights, and what they are then."""
        return "fp8_base = true, fp8_scaled = true", SCALED

    @property
    def swappable(self) -> int:
        """Blocks that the host swaps at most."""
        return len(self._figures["frozen"][DENSE]) - 1

    def frozen_bytes(self, weights: str, swapped: int) -> int:
        """Of the transformer on the card: the host keeps the weights of the linear layers of swapped blocks elsewhere.

        Args:
            weights: `DENSE`, `CAST` (every tensor in 8 bits) or `SCALED` (the linear layers that the host chooses in 8
                bits, with a scale in 16 for every 64 weights).
            swapped: blocks.
        """
        return self._figures["frozen"][weights][min(swapped, self.swappable)]

    def tracked(self, step: str, *, checkpointing: bool, weights: str = DENSE) -> list[dict[str, int]]:
        """`pixels`, `peak`, the bytes that a step adds, and `flops`, of what was tracked, the smallest sample first.

        Args:
            step: `PLAIN`, `FIRST` or `SECOND`.
            checkpointing: gradient checkpointing.
            weights: of the frozen model. In 16 bits there are two samples; in 8 one, with checkpointing.
        """
        points = self._figures["figures"][CHECKPOINTING if checkpointing else KEPT][weights]
        return [{"pixels": point["pixels"], **point[step]} for point in points]

    def step_bytes(self, pixels: int, rank: int, *, weights: str, checkpointing: bool, spf: bool) -> int:
        """What a step adds at its peak: on the line through both samples, with SPF that of the larger step of a pair.
        Smaller weights, which a step makes 16-bit ones for a moment, add what they add to the smaller sample with
        checkpointing, and a rank beyond 16 at most 2 bytes for every weight (`plan.step_bytes`).

        Args:
            pixels: of a batch: width x height x frames, as the model has them.
            rank: of the LoRA.
            weights: of the frozen model.
            checkpointing: gradient checkpointing.
            spf: with SPF.
        """

        def at(step: str) -> float:
            low, high = self.tracked(step, checkpointing=checkpointing)
            slope = (high["peak"] - low["peak"]) / (high["pixels"] - low["pixels"])
            dense, stored = (self.tracked(step, checkpointing=True, weights=each)[0] for each in (DENSE, weights))
            return low["peak"] + slope * (pixels - low["pixels"]) + stored["peak"] - dense["peak"]

        extra = 2 * max(rank - RANK, 0) * self.lora
        return max(int(max(map(at, (FIRST, SECOND) if spf else (PLAIN,)))) + extra, rank * self.lora * 4)

    def more_work(self, *, checkpointing: bool) -> float:
        """Work of a compared step beyond a plain one's, by that, of the largest sample. The second step of a pair has
        none."""
        plain, first = (self.tracked(step, checkpointing=checkpointing)[-1]["flops"] for step in (PLAIN, FIRST))
        return first / plain - 1


def _flux_2(name: str, said: str, *versions: str) -> MusubiModel:
    """The host does not run it in 8 bits without scales: its norms multiply by them."""
    return MusubiModel(name, said, "flux_2", ("model_version", versions), (DENSE, SCALED))


def _wan(name: str, said: str, *tasks: str) -> MusubiModel:
    return MusubiModel(name, said, "wan", ("task", tasks), clips=True)


MODELS = {
    model.name: model
    for model in (
        MusubiModel("zimage", "Z-Image", "zimage"),
        MusubiModel("qwen_image", "Qwen-Image", "qwen_image"),
        _flux_2("flux2-dev", "FLUX.2 dev", "dev"),
        _flux_2("flux2-klein-4b", "FLUX.2 klein 4B", "klein-4b", "klein-base-4b"),
        _flux_2("flux2-klein-9b", "FLUX.2 klein 9B", "klein-9b", "klein-base-9b"),
        MusubiModel("krea2", "Krea 2", "krea2", weights=(DENSE, SCALED)),
        _wan("wan-1.3b", "Wan 2.1 1.3B", "t2v-1.3B"),
        _wan("wan-14b", "Wan 2.1 14B", "t2v-14B", "t2i-14B"),
        _wan("wan-a14b", "one model of Wan 2.2 A14B", "t2v-A14B"),
    )
}
