"""What lands on the disk when a LoRA is saved, and what does not when saving goes wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spf_plugin.config import parse
from spf_plugin.saving import save_normalised


class Network(nn.Module):
    """An inner network with one module; saves as networks.lora does."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = value
        self.fail = False

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
        tensors = {
            f"{name}.lora_down.weight": torch.full((4, 1280), 0.5),
            f"{name}.lora_up.weight": torch.full((1280, 4), self.value),
            f"{name}.alpha": torch.tensor(2),  # an integer, as kohya writes it without an alpha argument
        }
        save_file(tensors, file, metadata)
        if self.fail:
            raise KeyboardInterrupt


METADATA = {"ss_network_args": json.dumps({"spf_target": "hat", "conv_dim": "4"}), "ss_output_name": "out"}


def saved(tmp_path: Path, network: Network) -> Path:
    save_normalised(network, parse({"spf_target": "hat"}))
    file = tmp_path / "out.safetensors"
    network.save_weights(str(file), torch.float16, METADATA)
    return file


def test_settings_and_safe_alpha(tmp_path: Path) -> None:
    file = saved(tmp_path, Network())
    with safe_open(file, "pt") as reader:
        arguments = json.loads(reader.metadata()["ss_network_args"])
        assert reader.metadata()["ss_base_model_version"] == "sd_v1"
    assert arguments["spf_target"] == "hat"
    assert arguments["spf_map"] == "soft"
    assert arguments["conv_dim"] == "4"
    (alpha,) = [t for name, t in load_file(file).items() if name.endswith("alpha")]
    assert alpha.dtype.is_floating_point
    assert float(alpha) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path, Network()).read_bytes()
    assert saved(tmp_path, Network()).read_bytes() == first


def test_not_a_number_does_not_replace_a_good_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = saved(tmp_path, Network()).read_bytes()
    with caplog.at_level(logging.ERROR):
        file = saved(tmp_path, Network(float("nan")))
    assert file.read_bytes() == good
    assert "NaN or infinity" in caplog.text
    assert (tmp_path / "out.rejected.safetensors").is_file()


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    good = saved(tmp_path, Network()).read_bytes()
    network = Network(3.0)
    network.fail = True
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, network)
    assert (tmp_path / "out.safetensors").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
