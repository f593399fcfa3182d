"""What `plan` knows of the diffusion transformers: sizes by their layout, activations and operations tracked once.

Tracked as the UNets' are (`benchmarks.tracking`), on the host's own classes in full size (48d368fa), with its own
network of rank 16 at 1024 px, bf16, its default text lengths (HunyuanImage: 128 words): a plain step, and both steps of
a pair by SPF's own code (`python -m benchmarks.dit_cost SD-SCRIPTS` writes `plan_dit.json`). Nothing was measured on a
GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SIDE = 1024  # pixels, of what was tracked
RANK = 16
FIGURES = Path(__file__).with_name("plan_dit.json")
PLAIN, FIRST, SECOND = "plain", "first", "second"  # a step of a plain LoRA, and those of a pair
CHECKPOINTING, KEPT = "checkpointing", "no checkpointing"


@cache
def figures() -> dict[str, Any]:
    """The tracked figures."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Transformer:
    """A model.

    Attributes:
        name: of its figures.
        parameters: of the transformer.
        lora: parameters of the LoRA for each rank: the sum of features in and out over the host's modules.
        blocks: parameters of one swapped unit. Of one stack: a block. Of FLUX.1's two, the host takes a double block
            for every second unit and two single ones for every other, so half of each.
        swappable: units that may be swapped at most.
        fp8: the option that keeps the frozen weights in 8 bits; empty where the host has none.
    """

    name: str
    parameters: int
    lora: int
    blocks: int
    swappable: int
    fp8: str

    @property
    def shrunk(self) -> tuple[str, str]:
        """The setting that shrinks the frozen weights, and what they are then; empty where the host has none."""
        return (f"{self.fp8} = true", "fp8") if self.fp8 else ("", "")

    def frozen_bytes(self, weights: str, swapped: int) -> int:
        """Of the transformer on the card: 2 bytes a weight, or 1 with the host's fp8, without the swapped blocks.

        `parameters * b - swapped * blocks * b`; b is 2 or 1. What of a swapped block is on its way is not counted.
        """
        size = 1 if weights == "fp8" else 2
        return (self.parameters - min(swapped, self.swappable) * self.blocks) * size

    def tracked(self, step: str, *, checkpointing: bool) -> dict[str, int]:
        """`peak`, the bytes that a step adds, and `flops`, its floating-point operations; one image of 1024 x 1024.

        Args:
            step: `PLAIN`, `FIRST` or `SECOND`.
            checkpointing: gradient checkpointing.
        """
        return figures()["models"][self.name][CHECKPOINTING if checkpointing else KEPT][step]

    def step_bytes(self, pixels: int, rank: int, *, checkpointing: bool, spf: bool) -> int:
        """What a step adds at its peak: `tracked * pixels / 1024^2`, with SPF that of the larger step of a pair, and at
        most 2 bytes for every weight of a rank beyond 16 (`plan.step_bytes`).

        Args:
            pixels: of a batch.
            rank: of the LoRA.
            checkpointing: gradient checkpointing.
            spf: with SPF.
        """
        steps = (FIRST, SECOND) if spf else (PLAIN,)
        peak = max(self.tracked(step, checkpointing=checkpointing)["peak"] for step in steps)
        extra = 2 * max(rank - RANK, 0) * self.lora
        return max(int(peak * pixels / SIDE**2) + extra, rank * self.lora * 4)

    def more_work(self, *, checkpointing: bool) -> float:
        """Work of a compared step beyond a plain one's, by that. The second step of a pair has none."""
        plain, first = (self.tracked(step, checkpointing=checkpointing)["flops"] for step in (PLAIN, FIRST))
        return first / plain - 1


TRANSFORMERS = {
    "anima": Transformer(
        "anima", parameters=2_091_068_928, lora=1_433_600, blocks=69_206_528, swappable=26, fp8="",
    ),
    # SD3.5 medium
    "sd3": Transformer(
        "sd3", parameters=2_243_171_520, lora=1_850_880, blocks=92_653_957, swappable=22, fp8="fp8_base",
    ),
    "flux": Transformer(
        "flux", parameters=11_901_408_320, lora=4_786_176, blocks=311_507_456, swappable=35, fp8="fp8_base",
    ),
    "chroma": Transformer(
        "chroma", parameters=8_899_983_424, lora=3_502_080, blocks=226_545_152, swappable=35, fp8="fp8_base",
    ),
    "lumina": Transformer(
        "lumina", parameters=2_609_771_456, lora=1_651_776, blocks=87_312_576, swappable=24, fp8="fp8_base",
    ),
    "hunyuan_image": Transformer(
        "hunyuan_image", parameters=17_425_795_520, lora=5_877_760, blocks=423_980_544, swappable=37, fp8="fp8_scaled",
    ),
}  # fmt: skip
