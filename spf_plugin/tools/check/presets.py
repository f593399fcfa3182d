"""The presets of GUIs, as the options that each GUI makes of them for the host.

What they keep beside those is their own, and nobody's mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import toml

from spf_plugin.tools.check.host_options import OPTIONS
from spf_plugin.tools.check.source import parse_words

_KOHYA_SS = {
    "epoch": "max_train_epochs",
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}
_EASY = {"batch_size": "train_batch_size"}


def of_gui(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The host's options in a preset of kohya_ss, LoRA_Easy_Training_Scripts or lora-scripts; None for another file.

    Raises:
        SPFError: the command line that is in it is none of the host's.
    """
    if isinstance(content.get("additional_parameters"), str):
        return _kohya_ss(content)
    if any(isinstance(section, dict) and isinstance(section.get("args"), dict) for section in content.values()):
        return _easy(content)
    form = content.get("data", content)
    if isinstance(form, dict) and isinstance(form.get("ui_custom_params"), str):
        return _lora_scripts(form)
    return None


def _kohya_ss(content: Mapping[str, Any]) -> dict[str, Any]:
    """The GUI takes double quotes away, cuts at spaces, and leaves out what is empty."""
    options = {_KOHYA_SS.get(key, key): value for key, value in content.items() if value not in ("", None)}
    if options.get("xformers") not in ("xformers", True):
        options.pop("xformers", None)  # its name for the kind of attention
    return {**_known(options), **parse_words(content["additional_parameters"].replace('"', "").split())}


def _easy(content: Mapping[str, Any]) -> dict[str, Any]:
    """Every section has arguments, and some of a data set; the network's are a table."""
    options: dict[str, Any] = {}
    for section in content.values():
        for part in ("args", "dataset_args"):
            own = section.get(part) if isinstance(section, dict) else None
            if isinstance(own, dict):
                options.update({_EASY.get(str(key), str(key)): value for key, value in own.items()})
    if isinstance(options.get("network_args"), dict):
        options["network_args"] = [f"{key}={value}" for key, value in options["network_args"].items()]
    size = options.get("resolution")
    if isinstance(size, int | list):
        options["resolution"] = ",".join(map(str, size if isinstance(size, list) else [size]))
    return _known(options)


def _lora_scripts(form: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values, and over them what was written by hand: TOML in a text."""
    try:
        own = toml.loads(form["ui_custom_params"])
    except Exception:  # the library leaks many kinds; the GUI says what is wrong
        own = {}
    return _known({**form, **own})


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in OPTIONS}
