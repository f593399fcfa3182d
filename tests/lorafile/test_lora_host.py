"""Files made by the host's own networks.lora: names, shapes, hashes, and that normalising changes nothing in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spf_plugin.lorafile import inspect, loaders, names, reader, writer
from spf_plugin.lorafile.normalise import normalise
from tests.lorafile import helpers as h
from tests.lorafile.test_lora_names import FROZEN, digest

HOSTS = h.hosts()[:1]  # a process per checkout costs ten seconds; the training tests cover the others
pytestmark = pytest.mark.skipif(
    not HOSTS, reason="no sd-scripts checkout in SPF_SD_SCRIPTS or ~/.cache/spf-plugin/sd-scripts-*"
)

SCRIPT = (
    h.HOST_PREAMBLE
    + r"""
import networks.lora as lora
from library.original_unet import UNet2DConditionModel
from library.sdxl_original_unet import SdxlUNet2DConditionModel

def text(layers, width, mlp):
    config = CLIPTextConfig(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                            num_attention_heads=width // 64)
    return CLIPTextModel(config)

out = {}
with torch.device("meta"):  # full-size models without memory; the LoRA modules themselves are real
    models = {
        "sd1": (text(12, 768, 3072), UNet2DConditionModel(8, 64, 768, False, False)),
        "sd2": (text(23, 1024, 4096), UNet2DConditionModel([5, 10, 20, 20], 64, 1024, False, False)),
        "sdxl": ([text(12, 768, 3072), text(32, 1280, 5120)], SdxlUNet2DConditionModel()),
    }
for base, (te, unet) in models.items():
    for conv in (None, 1):
        lora.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["Transformer2DModel"]  # the host appends to it in place
        device = "meta" if conv else "cpu"
        with torch.device(device):
            net = lora.LoRANetwork(te, unet, lora_dim=2, alpha=1, conv_lora_dim=conv, conv_alpha=1 if conv else None)
        out[f"{base}{'+conv' if conv else ''}"] = {
            m.lora_name: [list(m.lora_down.weight.shape), list(m.lora_up.weight.shape)]
            for m in net.text_encoder_loras + net.unet_loras
        }
        if conv:
            continue
        torch.manual_seed(0)
        for m in net.text_encoder_loras + net.unet_loras:
            torch.nn.init.normal_(m.lora_up.weight, std=0.02)
        net.apply_to(te, unet, True, True)
        metadata = {"ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[base],
                    "ss_v2": str(base == "sd2"), "ss_network_module": "networks.lora", "ss_output_name": "häns",
                    "ss_network_args": json.dumps({"a": "b\n\t\"\u20ac\x7f"})}
        net.save_weights(f"{sys.argv[2]}/{base}.safetensors", torch.float16, metadata)
print("RESULT" + json.dumps(out))
"""
)


@pytest.fixture(scope="module", params=HOSTS, ids=lambda path: path.name)
def made(request, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("host")
    command = [sys.executable, "-c", SCRIPT, str(request.param), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    return folder, json.loads(done.stdout.split("RESULT", 1)[1])


def test_names_and_shapes(made) -> None:
    """networks.lora on the host's own full-size UNets makes exactly the table's names and shapes (K1, K2)."""
    for base in names.BASES:
        for conv in (False, True):
            listed = made[1][base + ("+conv" if conv else "")]
            assert set(listed) == set(names.expected_names(base, conv=conv))
        assert digest(list(listed)) == FROZEN[base]
        for m in names.modules(base):
            if m.group not in ("attention", "conv", "text"):
                continue
            down, up = listed[names.kohya_name(base, m)]
            assert (down[1], up[0]) == (m.fan_in, m.fan_out)
            if base == "sd2" and m.path.endswith(("proj_in", "proj_out")):
                assert len(down) == 4  # the host trains them as convolutions; diffusers has Linear, see normalise
            else:
                assert len(down) == (2 if m.kind == "linear" else 4)
                assert down[2:] == {"linear": [], "conv1": [1, 1], "conv3": [3, 3]}[m.kind]


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_plain_files_stay_bit_identical(made, base: str) -> None:
    path = made[0] / f"{base}.safetensors"
    theirs = load_file(path)
    state_dict, metadata = reader.load(path)
    fixed, strings, notes = normalise(state_dict, metadata)
    assert notes == []
    assert list(fixed) == list(state_dict)
    assert set(fixed) == set(theirs)
    for key, tensor in theirs.items():
        assert fixed[key].dtype == tensor.dtype
        assert torch.equal(fixed[key].view(torch.int16), tensor.view(torch.int16))
    assert {key: strings[key] for key in metadata} == metadata
    contents = inspect.gather(fixed.items(), strings)
    assert [v.status for v in loaders.verdicts(contents, inspect.describe(contents))] == ["loads"] * 5


def test_sd2_projections_become_linear(made) -> None:
    state_dict, metadata = reader.load(made[0] / "sd2.safetensors")
    fixed, _, notes = normalise(state_dict, metadata)
    changed = {key for key in state_dict if fixed[key].shape != state_dict[key].shape}
    assert {key.split(".")[0].rsplit("_", 2)[1] for key in changed} == {"proj"}
    assert len(changed) == 64
    assert all(torch.equal(fixed[key].flatten(), state_dict[key].flatten()) for key in state_dict)
    assert "reshaped" in notes[0]
    assert all("SD2 text encoder" in note for note in notes[1:])  # sd.cpp's limit, nothing to mend


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_writer_gives_the_hosts_bytes(made, tmp_path: Path, base: str) -> None:
    """Same tensors: same data section and the same two hashes as the host computed (M2)."""
    path = made[0] / f"{base}.safetensors"
    state_dict, metadata = reader.load(path)
    writer.save(tmp_path / "ours.safetensors", dict(reversed(state_dict.items())), metadata)
    ours, theirs = reader.read_header(tmp_path / "ours.safetensors"), reader.read_header(path)
    assert ours.metadata == theirs.metadata
    assert len(theirs.metadata["sshs_legacy_hash"]) == 8
    data = [
        (p.read_bytes()[header.data_offset :]) for p, header in ((tmp_path / "ours.safetensors", ours), (path, theirs))
    ]
    assert data[0] == data[1]


def test_description(made) -> None:
    for base in names.BASES:
        description = inspect.describe(inspect.from_file(made[0] / f"{base}.safetensors"))
        assert (description.base, description.evidence) == (base, "shapes")
        assert description.algorithms == {"LoRA": len(made[1][base])}
        assert set(description.ranks["unet"]) == {2}
        assert set(description.alphas["te1"]) == {1.0}
