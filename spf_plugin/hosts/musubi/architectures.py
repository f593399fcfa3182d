"""musubi-tuner's architectures that SPF knows: facts of the host, by architecture.

What such a model is inside is its family's (`spf_plugin.families`). No torch and no musubi-tuner: the checks read it
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spf_plugin.hosts.musubi import encoders
from spf_plugin.hosts.musubi.encoders import Encoder
from spf_plugin.hosts.musubi.scripts import SCRIPTS, Script, script_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spf_plugin.core.prompt import Target
    from spf_plugin.families.base import Text


@dataclass(frozen=True)
class Architecture:
    """One of the trainer's architectures.

    Attributes:
        name: of the command's `--arch`, and of its trainer's `Script.arch`.
        codes: the host's own (`ARCHITECTURE_...`), which stand in the names of its cache files; of one trainer there
            may be others, whose models SPF does not know.
        network: the host's own network module for it.
        family: the class of its model's family.
        caching: the module of the host's script that caches text, and the function there that adds its options.
        required: options of that script that name models, without which it fails or takes another one.
        tensors: what that script writes for a caption, without the type in the names; so they stand in a batch, too.
        text: these tensors of one prompt -> the family's text of one sample.
        load: (the script's parsed options, device) -> its tokenizer and text encoder.
        code: the script's parsed options -> which of `codes` its files are of.
        shown: how the names of tensors in its cached latents begin that are images which the trainer shows the model
            beside the noise, whatever its options say; empty where it has none.
    """

    name: str
    codes: tuple[str, ...]
    network: str
    family: str
    caching: tuple[str, str]
    required: tuple[str, ...]
    tensors: tuple[str, ...]
    text: Callable[[Mapping[str, Tensor]], Text]
    load: Callable[[Any, torch.device], Encoder]
    code: Callable[[Any], str]
    shown: str = ""

    @property
    def script(self) -> Script:
        """Its trainer."""
        return next(script for script in SCRIPTS if script.arch == self.name)

    @property
    def text_script(self) -> str:
        """The host's script that caches text."""
        return f"{self.caching[0].rpartition('.')[2]}.py"

    @property
    def latents_script(self) -> str:
        """The one that caches latents."""
        return self.text_script.replace("text_encoder_outputs", "latents")

    def command(self, args: Any, targets: Sequence[Target]) -> str:
        """What encodes the prompts of a run, as the user should type it.

        Args:
            args: the host's arguments.
            targets: of the run.
        """
        options = {"dataset_config": args.dataset_config or "FILE"}
        options |= {name: getattr(args, name, None) or "PATH" for name in self.required}
        said = [f"--arch {self.name}", f'--target "{"|".join(map(str, targets))}"']
        return " ".join(["spf cache-prompts", *said, *(f'--{name} "{value}"' for name, value in options.items())])


TEXT = "_te.safetensors"  # behind an item's name and the code: the host's cached text


def text_file(stem: str, code: str) -> str:
    """The name of the host's file with an item's cached text."""
    return f"{stem}_{code}{TEXT}"


def latents_files(code: str) -> str:
    """The pattern of its files with cached latents."""
    return f"*_{code}.safetensors"


POOLED = "pooled"  # what our encoder may add to the host's tensors: the vector of a prompt


def _states(name: str, *, masked: bool = True) -> Callable[[Mapping[str, Tensor]], Text]:
    """A text of states alone, none of which is padding; or which the model does not tell from padding."""

    def text(tensors: Mapping[str, Tensor]) -> Text:
        hidden = tensors[name][None]
        found = {"hidden": hidden}
        if masked:
            found["hidden_mask"] = hidden.new_ones(hidden.shape[:2]).bool()
        if POOLED in tensors:
            found[POOLED] = tensors[POOLED][None]
        return found

    return text


# `--model_version` of FLUX.2 -> the architecture. A model that was not distilled is of the same one.
_FLUX_2 = {
    "dev": "f2d",
    "klein-4b": "f2k4b",
    "klein-base-4b": "f2k4b",
    "klein-9b": "f2k9b",
    "klein-base-9b": "f2k9b",
}


ARCHITECTURES = (
    Architecture(
        name="zimage",
        codes=("zi",),
        network="networks.lora_zimage",
        family="ZImage",
        caching=("musubi_tuner.zimage_cache_text_encoder_outputs", "zimage_setup_parser"),
        required=("text_encoder",),
        tensors=("llm_embed",),
        text=_states("llm_embed"),
        load=encoders.zimage,
        code=lambda args: "zi",
    ),
    Architecture(
        name="flux_2",
        codes=("f2d", "f2k4b", "f2k9b"),
        network="networks.lora_flux_2",
        family="Flux2",
        caching=("musubi_tuner.flux_2_cache_text_encoder_outputs", "flux_2_setup_parser"),
        required=("model_version", "text_encoder"),
        tensors=("ctx_vec",),
        text=_states("ctx_vec", masked=False),
        load=encoders.flux_2,
        code=lambda args: _FLUX_2[args.model_version],
        shown="latents_control_",
    ),
    Architecture(
        name="krea2",
        codes=("kr2",),
        network="networks.lora_krea2",
        family="Krea2",
        caching=("musubi_tuner.krea2_cache_text_encoder_outputs", "krea2_setup_parser"),
        required=("text_encoder",),
        tensors=("krea2_vl_embed",),
        text=_states("krea2_vl_embed"),
        load=encoders.krea2,
        code=lambda args: "kr2",
    ),
    Architecture(
        name="qwen_image",
        codes=("qi",),
        network="networks.lora_qwen_image",
        family="QwenImage",
        caching=("musubi_tuner.qwen_image_cache_text_encoder_outputs", "qwen_image_setup_parser"),
        required=("text_encoder",),
        tensors=("vl_embed",),
        text=_states("vl_embed"),
        load=encoders.qwen_image,
        code=lambda args: "qi",
    ),
    Architecture(
        name="wan",
        codes=("wan",),
        network="networks.lora_wan",
        family="Wan",
        caching=("musubi_tuner.wan_cache_text_encoder_outputs", "wan_setup_parser"),
        required=("t5",),
        tensors=("t5",),
        text=_states("t5"),
        load=encoders.wan,
        code=lambda args: "wan",
    ),
)
NAMES = tuple(architecture.name for architecture in ARCHITECTURES)


def named(name: str) -> Architecture:
    """The one of a `--arch`.

    Raises:
        KeyError: there is none.
    """
    return {architecture.name: architecture for architecture in ARCHITECTURES}[name]


def of_trainer(trainer: Any) -> Architecture | None:
    """That of a trainer, or of one that is made from it; None where SPF does not know its model."""
    script = script_of(trainer)
    found = named(script.arch) if script is not None and script.supported else None
    return found if found is not None and trainer.architecture in found.codes else None
