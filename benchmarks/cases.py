"""What is measured: which steps on which setups, and how one of them is."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.steps import Setup, Workbench
from benchmarks.tracking import MetaGpu, track
from spf_plugin.config import BASES

PLAIN, SPF, DOP, PURE_CC, REFERENCE = "plain", "spf", "dop", "pure_cc", "reference"
PRESERVATION = "preservation"
MAPS_KEPT, ALL_LAYERS = "spf_maps_kept", "spf layers=all"
NO_QUERIES = "spf fine_grained_multiplier=0"
OUTPUT_ONLY = "spf fine_grained_multiplier=0 text_consistent_multiplier=0"
_SIZES = (("sdxl", 1024), ("sd1", 512), ("sd2", 768))
_PAIR, _PEERS = (PLAIN, SPF), (PRESERVATION, DOP, PURE_CC)
_WAYS = (REFERENCE, MAPS_KEPT, NO_QUERIES, OUTPUT_ONLY)

# Setups of the published table, then those that `spf plan` needs besides.
CASES: tuple[tuple[Setup, tuple[str, ...]], ...] = (
    (Setup("sd1", 512, 1, True), (*_PAIR, *_PEERS, *_WAYS)),
    (Setup("sdxl", 1024, 1, True), (*_PAIR, *_PEERS, ALL_LAYERS, *_WAYS)),
    (Setup("sd1", 512, 4, True), _PAIR),
    (Setup("sdxl", 1024, 4, True), _PAIR),
    (Setup("sd1", 512, 1, False), (*_PAIR, *_PEERS)),
    (Setup("sdxl", 1024, 1, False), (*_PAIR, *_PEERS)),
    (Setup("sd1", 512, 4, False), _PAIR),
    (Setup("sdxl", 1024, 4, False), _PAIR),
    (Setup("sdxl", 1024, 1, True, weights="fp8"), _PAIR),
    (Setup("sd2", 768, 1, True), _PAIR),
    (Setup("sd2", 768, 4, True), _PAIR),
    (Setup("sd1", 512, 1, True, weights="fp8"), _PAIR),
    (Setup("sd1", 512, 1, True, rank=64), _PAIR),
    (Setup("sd1", 768, 1, True), _PAIR),
    (Setup("sdxl", 1024, 1, False, weights="fp8"), (PLAIN,)),
    (Setup("sd2", 768, 1, False), _PAIR),
    (Setup("sd2", 768, 4, False), _PAIR),
    (Setup("sd2", 768, 1, True, weights="fp8"), _PAIR),
    *((Setup(model, side, 1, True, weights=base), _PAIR) for base in BASES[1:] for model, side in _SIZES),
    (Setup("sdxl", 1024, 1, False, weights="nf4"), (PLAIN,)),
)
PUBLISHED = 8  # the first so many of CASES
#: Steps whose time and allocator's peak the page has, on the published setups and on the frozen UNet in fewer bits.
TIMED_STEPS = (PLAIN, SPF, PRESERVATION, ALL_LAYERS, *_PEERS)
TIMED: tuple[tuple[Setup, tuple[str, ...]], ...] = tuple(
    (setup, tuple(name for name in steps if name in TIMED_STEPS))
    for index, (setup, steps) in enumerate(CASES)
    if index < PUBLISHED or (setup.weights != "bf16" and setup.checkpointing and setup.family != "sd2")
)


@dataclass
class Record:
    """One step on one setup.

    Attributes:
        setup: see `steps.Setup`.
        step: see `Workbench.step`.
        flops: of one step.
        peak: tracked bytes at the peak, beyond the weights and the optimizer's state.
        phases: name -> [peak, alive at the end], in bytes.
        unet_parameters: of the frozen UNet.
        lora_parameters: of the LoRA.
        seconds: median of the timed steps, if they were timed.
        ratio: median over interleaved pairs of this step's time by the plain step's, if they were timed.
        gpu_peak: the CUDA allocator's peak in bytes, if there was a GPU.
    """

    setup: Setup
    step: str
    flops: int
    peak: int
    phases: dict[str, list[int]]
    unet_parameters: int
    lora_parameters: int
    seconds: float | None = None
    ratio: float | None = None
    gpu_peak: int | None = None

    @property
    def key(self) -> tuple[Setup, str]:
        return self.setup, self.step

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        return cls(**{**values, "setup": Setup(**values["setup"])})


def tracked(setup: Setup, steps: tuple[str, ...]) -> Iterator[Record]:
    """Track each step once, on tensors without data."""
    with MetaGpu():
        bench = Workbench(setup)
        unet, lora = bench.unet_parameters, sum(p.numel() for p in bench.parameters)
        for name in steps:
            cost = track(bench.step(name))
            bench.clear()
            phases = {phase: list(values) for phase, values in cost.phases.items()}
            yield Record(setup, name, cost.flops, cost.peak, phases, unet, lora)


@dataclass
class Timing:
    """Wall time and the allocator's peak of each step, from interleaved runs on real tensors."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def median(self, step: str) -> float:
        """Seconds of this step."""
        return statistics.median(self.seconds[step])

    def ratio(self, step: str) -> float:
        """Median over the pairs of this step's time by the plain step's."""
        return statistics.median(a / b for a, b in zip(self.seconds[step], self.seconds[PLAIN], strict=True))


def timed(setup: Setup, steps: tuple[str, ...], pairs: int, progress: Callable[[], None]) -> Timing:
    """Run the steps `pairs` times in turn, after one round of warming up."""
    gc.collect()  # the models of an earlier setup
    bench, result, on_gpu = Workbench(setup), Timing(), setup.device == "cuda"

    def once(name: str) -> float:
        with bench.running(name) as step:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(lambda _: None)
            if on_gpu:
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            bench.clear()
        return taken

    for i in range(pairs + 1):
        for name in steps:
            taken = once(name)
            if i:
                result.seconds.setdefault(name, []).append(taken)
                if on_gpu:
                    result.peaks[name] = torch.cuda.max_memory_allocated()
            progress()
    return result
