"""The LoRA trainers of musubi-tuner, known to SPF or not: facts that tell a run of one from a run of another.

From v0.3.4 (30c658c). No torch: `spf check` reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED = (
    "SPF supports zimage_, qwen_image_, flux_2_, krea2_ and wan_train_network.py of musubi-tuner, from text to image "
    "(Wan: to video, too)"
)


@dataclass(frozen=True)
class Script:
    """A trainer of LoRAs.

    Attributes:
        name: of its file, without `.py`.
        trainer: its class.
        said: what it trains, as people say it.
        arch: what SPF calls it (`architectures`); empty where SPF does not know the model.
        text: tokens of text that its text encoder reads, with those of its template.
        clips: it trains on videos, too.
    """

    name: str
    trainer: str
    said: str
    arch: str = ""
    text: int = 512
    clips: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}.py"

    @property
    def supported(self) -> bool:
        return bool(self.arch)


SCRIPTS = (
    Script("zimage_train_network", "ZImageNetworkTrainer", "Z-Image", "zimage"),
    Script("qwen_image_train_network", "QwenImageNetworkTrainer", "Qwen-Image", "qwen_image", 1024),
    Script("flux_2_train_network", "Flux2NetworkTrainer", "FLUX.2", "flux_2"),
    Script("krea2_train_network", "Krea2NetworkTrainer", "Krea 2", "krea2"),
    Script("wan_train_network", "WanNetworkTrainer", "Wan", "wan", clips=True),
    Script("hv_train_network", "HunyuanVideoNetworkTrainer", "HunyuanVideo"),
    Script("hv_1_5_train_network", "HunyuanVideo15NetworkTrainer", "HunyuanVideo 1.5"),
    Script("fpack_train_network", "FramePackNetworkTrainer", "FramePack"),
    Script("flux_kontext_train_network", "FluxKontextNetworkTrainer", "FLUX.1 Kontext"),
    Script("flux_2_train_network_self_flow", "Flux2SelfFlowNetworkTrainer", "FLUX.2 with Self-Flow"),
    Script("hidream_o1_train_network", "HiDreamO1NetworkTrainer", "HiDream-O1"),
    Script("ideogram4_train_network", "Ideogram4NetworkTrainer", "Ideogram 4"),
    Script("kandinsky5_train_network", "Kandinsky5NetworkTrainer", "Kandinsky 5"),
)


def script_of(trainer: Any) -> Script | None:
    """What a trainer's object is, or one that is made from it; None where it is none of `SCRIPTS`."""
    by_trainer = {script.trainer: script for script in SCRIPTS}
    return next((by_trainer[cls.__name__] for cls in type(trainer).__mro__ if cls.__name__ in by_trainer), None)


def named(text: str) -> Script | None:
    """The trainer whose file a word names, with or without a folder; None where it names none."""
    name = text.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")
    return next((script for script in SCRIPTS if script.name == name), None)
