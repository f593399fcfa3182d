"""What `plan` knows of the diffusion transformers: sizes by their layout, activations and operations tracked once.

Tracked as the UNets' are (`benchmarks.tracking`), on the host's own classes in full size (48d368fa), with its own
network of rank 16 at 1024 px, bf16, its default text lengths (HunyuanImage: 128 words and 128 glyphs): a plain step
(`python -m tests.hosts.full_size HOST anima`). What SPF adds to it is arithmetic: one more forward pass, and the
queries of three blocks, of the reference and of the step. Nothing was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

SIDE = 1024  # pixels, of what was tracked
RANK = 16
PROBED = 3  # blocks, as Anima's family takes


@dataclass(frozen=True)
class Transformer:
    """A model.

    Attributes:
        parameters: of the transformer.
        lora: parameters of the LoRA for each rank: the sum of features in and out over the host's modules.
        blocks: parameters of one swapped unit. Of one stack: a block. Of FLUX.1's two, the host takes a double block
            for every second unit and two single ones for every other, so half of each.
        swappable: units that may be swapped at most.
        width: features of a token.
        patch: pixels of a token's side.
        checkpointed: bytes that a step adds with gradient checkpointing.
        kept: the same without.
        recomputed: floating-point operations of a step with checkpointing, by those of a forward pass.
        once: the same without.
        fp8: the option that keeps the frozen weights in 8 bits; empty where the host has none.
    """

    parameters: int
    lora: int
    blocks: int
    swappable: int
    width: int
    patch: int
    checkpointed: int
    kept: int
    recomputed: float
    once: float
    fp8: str

    def frozen_bytes(self, weights: str, swapped: int) -> int:
        """Of the transformer on the card: 2 bytes a weight, or 1 with the host's fp8, without the swapped blocks.

        `parameters * b - swapped * blocks * b`; b is 2 or 1. What of a swapped block is on its way is not counted.
        """
        size = 1 if weights == "fp8" else 2
        return (self.parameters - min(swapped, self.swappable) * self.blocks) * size

    def step_bytes(self, pixels: int, rank: int, *, checkpointing: bool, spf: bool) -> int:
        """What a step adds at its peak: `tracked * pixels / 1024^2`, for SPF `2 * 3 * tokens * width * 2` bytes of
        queries, and at most 2 bytes for every weight of a rank beyond 16 (`plan.step_bytes`).

        Args:
            pixels: of a batch.
            rank: of the LoRA.
            checkpointing: gradient checkpointing.
            spf: with SPF.
        """
        tracked = self.checkpointed if checkpointing else self.kept
        queries = 2 * PROBED * (pixels // self.patch**2) * self.width * 2 if spf else 0
        extra = 2 * max(rank - RANK, 0) * self.lora
        return max(int(tracked * pixels / SIDE**2) + queries + extra, rank * self.lora * 4)

    def more_work(self, *, checkpointing: bool) -> float:
        """Work of a compared step beyond a plain one's, by that: one forward pass."""
        return 1 / (self.recomputed if checkpointing else self.once)


TRANSFORMERS = {
    "anima": Transformer(
        parameters=2_091_068_928, lora=1_433_600, blocks=69_206_528, swappable=26, width=2048, patch=16,
        checkpointed=1_227_981_824, kept=15_221_678_592, recomputed=3.34, once=2.347, fp8="",
    ),
    # SD3.5 medium
    "sd3": Transformer(
        parameters=2_243_171_520, lora=1_850_880, blocks=92_653_957, swappable=22, width=1536, patch=16,
        checkpointed=881_666_560, kept=10_522_002_944, recomputed=3.57, once=2.571, fp8="fp8_base",
    ),
    "flux": Transformer(
        parameters=11_901_408_320, lora=4_786_176, blocks=311_507_456, swappable=35, width=3072, patch=16,
        checkpointed=2_639_619_584, kept=43_018_378_752, recomputed=3.303, once=2.303, fp8="fp8_base",
    ),
    "chroma": Transformer(
        parameters=8_899_983_424, lora=3_502_080, blocks=226_545_152, swappable=35, width=3072, patch=16,
        checkpointed=2_445_942_272, kept=31_710_478_848, recomputed=3.111, once=2.111, fp8="fp8_base",
    ),
    "lumina": Transformer(
        parameters=2_609_771_456, lora=1_651_776, blocks=87_312_576, swappable=24, width=2304, patch=16,
        checkpointed=1_508_815_360, kept=20_849_446_912, recomputed=3.31, once=2.31, fp8="fp8_base",
    ),
    "hunyuan_image": Transformer(
        parameters=17_425_795_520, lora=5_877_760, blocks=423_980_544, swappable=37, width=3584, patch=32,
        checkpointed=942_804_992, kept=12_912_633_856, recomputed=2.990, once=1.998, fp8="fp8_scaled",
    ),
}  # fmt: skip
