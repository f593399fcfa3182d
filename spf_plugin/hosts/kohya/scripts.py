"""The LoRA trainers of sd-scripts, known to SPF or not: facts that tell a run of one from a run of another.

From main of February 2026 and v0.11.1. No torch: `spf check`, `spf plan` and `spf doctor` read it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spf_plugin.hosts.kohya.trainers import DITS, Dit

LENGTHS = (150, 225)  # of --max_token_length, in tokens of text, as the command line takes it
CHUNK = 75  # tokens of text that CLIP reads at once


def text_tokens(length: int | None) -> int:
    """Tokens of text that CLIP reads with a `max_token_length`: whole chunks. A file may say any, and GUIs write 75."""
    return max(CHUNK, (length or 0) // CHUNK * CHUNK)


@dataclass(frozen=True)
class Script:
    """A trainer of LoRAs.

    Attributes:
        name: of its file, without `.py`.
        trainer: its class.
        models: what it trains, by SPF's name and as people say it.
        bucket_steps: what `bucket_reso_steps` must be divisible by.
        parts: options that name the other files of its model, without which it fails.
        text: the option for the most tokens that its longest text encoder reads, and what holds without it.
        special: how many of these tokens are no text.
        drops_cached: captions may be dropped (`caption_dropout_rate`) where text is cached.
        trains_cached: a text encoder may be trained where text is cached.
    """

    name: str
    trainer: str
    models: dict[str, str]
    bucket_steps: int
    parts: tuple[str, ...] = ()
    text: tuple[str, int] = ("max_token_length", CHUNK)
    special: int = 0
    drops_cached: bool = False
    trains_cached: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}.py"

    @property
    def is_dit(self) -> bool:
        """Whether its model is a diffusion transformer, and no UNet."""
        return self.text[0] != "max_token_length"

    @property
    def dit(self) -> Dit | None:
        """What SPF knows of it; None where it is no transformer, or none that SPF knows."""
        return DITS.get(self.trainer)

    @property
    def supported(self) -> bool:
        return not self.is_dit or self.dit is not None

    def text_limit(self, args: Any) -> int:
        """The most tokens of a caption that are read; what the host does not take for a length counts as left out."""
        option, default = self.text
        value = getattr(args, option, None) if option else None
        if not isinstance(value, int) or value <= self.special:
            value = default
        return value - self.special if self.is_dit else text_tokens(value)


SCRIPTS = (
    Script("train_network", "NetworkTrainer", {"sd1": "SD 1.x", "sd2": "SD 2.x"}, 64),
    Script("sdxl_train_network", "SdxlNetworkTrainer", {"sdxl": "SDXL"}, 32),  # v0.9.1 wants 64
    Script(
        "anima_train_network",
        "AnimaNetworkTrainer",
        {"anima": "Anima"},
        16,
        ("qwen3", "vae"),
        ("t5_max_token_length", 512),
        special=1,
        drops_cached=True,
    ),
    # Its text encoders may be in the checkpoint.
    Script(
        "sd3_train_network",
        "Sd3NetworkTrainer",
        {"sd3": "SD3"},
        32,
        (),
        ("t5xxl_max_token_length", 256),
        special=1,
        trains_cached=True,
    ),
    # clip_l is none of Chroma's; of FLUX.1 schnell the text is 256 tokens.
    Script(
        "flux_train_network",
        "FluxNetworkTrainer",
        {"flux": "FLUX.1", "chroma": "Chroma"},
        64,
        ("t5xxl", "ae"),
        ("t5xxl_max_token_length", 512),
        special=1,
        trains_cached=True,
    ),
    Script(
        "lumina_train_network",
        "LuminaNetworkTrainer",
        {"lumina": "Lumina 2"},
        64,
        ("gemma2", "ae"),
        ("gemma2_max_token_length", 256),
        special=1,
        trains_cached=True,
    ),
    Script(
        "hunyuan_image_train_network",
        "HunyuanImageNetworkTrainer",
        {"hunyuan_image": "HunyuanImage-2.1"},
        64,
        ("text_encoder", "byt5", "vae"),
        ("", 1000),
    ),
)
#: Every kind of base model that they train, as people say it.
MODELS = {model: said for script in SCRIPTS for model, said in script.models.items()}


def script_of(model: str) -> Script:
    """The trainer of a kind of base model (`MODELS`)."""
    return next(script for script in SCRIPTS if model in script.models)


def named(text: str) -> Script | None:
    """The trainer whose file a word names, with or without a folder; None where it names none."""
    name = text.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py")
    return next((script for script in SCRIPTS if script.name == name), None)
