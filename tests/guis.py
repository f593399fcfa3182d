"""What each GUI makes of its preset, restated from its source: the network module and the words of `--network_args`.

Each function returns `(network_module, words)` as the trainer's argument parser has them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import toml

Arrived = tuple[str, list[str]]
MEMORY_SAVERS = (
    "gradient_checkpointing", "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "no_half_vae",
)  # fmt: skip


def _host(config: str, argv: list[str]) -> argparse.Namespace:
    """sd-scripts: the sections of a TOML flattened, then the command line over it; a repeated option replaces."""
    flat: dict[str, Any] = {}
    for key, value in toml.loads(config).items():
        flat.update(value) if isinstance(value, dict) else flat.update({key: value})
    parser = argparse.ArgumentParser()
    parser.add_argument("--network_module")
    parser.add_argument("--network_args", nargs="*")
    parser.add_argument("--network_train_unet_only", action="store_true")
    return parser.parse_args(argv, namespace=argparse.Namespace(**flat))


def kohya_ss(preset: dict[str, Any], *, opened: bool = True) -> Arrived:
    """The GUI writes networks.lora into its TOML; the additional parameters lose their double quotes, are cut at space,
    quoted for a shell that there is not, and put last.

    Args:
        preset: the JSON.
        opened: whether Parameters was ever opened. Else Gradio gives null for what the JSON does not name, and the GUI
            compares the name of `network_weights` with "" (v26.0.0).
    """
    if not opened and preset.get("network_weights") is None:
        raise TypeError("stat: path should be string, bytes, os.PathLike or integer, not NoneType")
    config = toml.dumps({"network_module": "networks.lora", "network_args": ["conv_dim=1"]})
    words = [shlex.quote(word) for word in preset["additional_parameters"].replace('"', "").split()]
    args = _host(config, words)
    return args.network_module, args.network_args


def lora_easy_window(preset: dict[str, Any]) -> dict[str, Any]:
    """What the window shows after File > Load Toml. What the file does not name is as in a new window, but the time
    goes to one step, and buckets go off."""
    general = preset.get("general_args", {})
    own = preset.get("network_args", {}).get("args", {})
    return {
        "base_model": "", "subsets": [], "seed": 23,
        "sdxl": general.get("args", {}).get("sdxl", False),
        "resolution": general.get("dataset_args", {}).get("resolution", 512),
        "max_train": ("epochs", general["args"]["max_train_epochs"])
        if "max_train_epochs" in general.get("args", {}) else ("steps", 1),
        "train_on": "Unet Only" if own.get("network_train_unet_only") else "Both",
        "buckets": preset.get("bucket_args", {}).get("dataset_args", {}).get("enable_bucket", False),
        "gradient_checkpointing": general.get("args", {}).get("gradient_checkpointing", False),
        "sdpa": general.get("args", {}).get("sdpa", False),
        "no_half_vae": general.get("args", {}).get("no_half_vae", False),
    }  # fmt: skip


def memory_savers(gui: str, preset: dict[str, Any]) -> dict[str, bool]:
    """What the host is told of them after the file was loaded and Start pressed."""
    if gui == "kohya_ss":
        names = {"sdxl_no_half_vae": "no_half_vae", "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs"}
        sent = {names.get(key, key): value for key, value in preset.items()}
    elif gui == "lora-scripts":
        sent = {"cache_latents": True, "cache_latents_to_disk": True, **preset["data"]}  # the form's own
    else:
        # The window loads Flux after Network: that takes the box for cached text back, whatever Network loaded.
        network = {"cache_text_encoder_outputs": False}
        extra = preset.get("extra_args", {}).get("args", {})
        sent = {**preset.get("general_args", {}).get("args", {}), **network, **extra}
    return {name: sent.get(name, False) for name in MEMORY_SAVERS}


def lora_easy(preset: dict[str, Any]) -> Arrived:
    """The backend turns network args into key=value texts, lets the sections win one after the other, and writes a TOML
    by hand: lists as Python shows them, texts between double quotes with nothing escaped."""
    args: dict[str, Any] = {}
    for section in preset.values():
        for key, value in section.get("args", {}).items():
            args[key] = [f"{k}={v}" for k, v in value.items()] if key == "network_args" else value
    args.setdefault("network_module", "networks.lora")
    lines = []
    for key, value in args.items():
        shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else value
        lines.append(f"{key} = {shown}")
    host = _host("[all]\n" + "\n".join(lines), [])
    return host.network_module, host.network_args


def lora_scripts(preset: dict[str, Any]) -> Arrived:
    """The form's own values, with the custom parameters (a TOML in a text) assigned over them, dumped as TOML.

    Loading calls `toExponential` on the learning rates of the preset, and gives up where one is a text.
    """
    for name in ("learning_rate", "unet_lr", "text_encoder_lr"):
        if not isinstance(preset["data"].get(name, 0.0), (int, float)):
            raise TypeError("e[t].toExponential is not a function")
    form = {"network_module": "networks.lora", "network_args": ["conv_dim=1"], **preset["data"]}
    custom = toml.loads(form.pop("ui_custom_params"))
    host = _host(toml.dumps({**form, **custom}), [])
    return host.network_module, host.network_args


def colab(lines: str) -> Arrived:
    """The notebook's variables end up in a TOML with sections."""
    names: dict[str, Any] = {}
    exec(lines, names)
    config = toml.dumps({"additional_network_arguments": {k: names[k] for k in ("network_module", "network_args")}})
    host = _host(config, [])
    return host.network_module, host.network_args


def kohya_ss_preset(words: list[str]) -> dict[str, Any]:
    """How a user writes these words into the GUI."""
    return {"additional_parameters": "--network_module spf_plugin.lora --network_args " + " ".join(words)}


def lora_easy_preset(words: list[str]) -> dict[str, Any]:
    rows = dict(word.split("=", 1) for word in words)
    return {
        "network_args": {"args": {"network_dim": 16, "network_args": rows}},
        "extra_args": {"args": {"network_module": "spf_plugin.lora"}},
    }


def lora_scripts_preset(words: list[str]) -> dict[str, Any]:
    custom = f'network_module = "spf_plugin.lora"\nnetwork_args = {json.dumps(words, ensure_ascii=False)}\n'
    return {"data": {"network_dim": 16, "ui_custom_params": custom}}


def colab_lines(words: list[str]) -> str:
    return f'network_module = "spf_plugin.lora"\nnetwork_args = {words!r}\n'


def load(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else toml.loads(text)
