"""LoRA files from real training runs: the doctor's verdict, the deltas that diffusers makes of them, the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from spf_plugin.lorafile import inspect
from spf_plugin.lorafile.loaders import verdicts
from tests.hosts.conftest import Host
from tests.hosts.test_training import LYCORIS

one_host = pytest.mark.one_host  # LyCORIS is the same in both
contract = pytest.mark.contract
ARGUMENTS = ("spf_target=blonde hair",)


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        pytest.param([], True, id="networks.lora"),
        pytest.param([*LYCORIS, "algo=lora"], True, id="locon", marks=one_host),
        pytest.param([*LYCORIS, "algo=lokr"], False, id="lokr", marks=one_host),
    ],
)
def test_files_of_a_run(host: Host, words: list[str], loads: bool) -> None:
    result = host.train(*ARGUMENTS, *words, max_train_steps=2)
    tensors = result.tensors()
    contents = inspect.from_file(result.file)
    found = {v.loader: v.status for v in verdicts(contents, inspect.describe(contents))}
    if not loads:  # diffusers reads no LoKr; the WebUIs do
        assert found["diffusers"] == "fails"
        assert found["ComfyUI"] == "loads"
        return
    # The tiny widths are not SD1.5's, which the doctor notices; what is left must be loadable.
    assert set(found.values()) <= {"loads", "differs"}

    pipeline = DiffusionPipeline.from_pretrained(host.models["sd15"], safety_checker=None)
    before = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    pipeline.load_lora_weights(str(result.folder), weight_name=result.file.name)
    pipeline.fuse_lora()
    after = {name.replace(".base_layer", ""): p.detach() for name, p in pipeline.unet.named_parameters()}
    checked = 0
    for name, weight in before.items():
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{module}.alpha" not in tensors or name.startswith("time_embedding"):
            continue  # LyCORIS trains the time embedding too; diffusers has no LoRA there, and the doctor says so
        down, up = tensors[f"{module}.lora_down.weight"].double(), tensors[f"{module}.lora_up.weight"].double()
        scale = float(tensors[f"{module}.alpha"]) / down.shape[0]
        delta = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(after[name].double() - weight.double(), delta, rtol=1e-3, atol=1e-5)
        checked += 1
    beyond = {name.split(".")[0] for name in tensors if "time_embedding" in name}
    assert (checked + len(beyond)) * 3 == len(tensors)
    assert (found["diffusers"] == "differs") == bool(beyond)


@contract
def test_the_card_and_the_preview_of_a_run(host: Host, tmp_path: Path) -> None:
    """Beside the last file only, with this run's own sample; samples are the host's, under its own names."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a woman, blonde hair --w 64 --h 64 --s 1 --d 7\n", encoding="utf-8")
    settings = {"max_train_steps": 2, "save_every_n_steps": 1, "sample_every_n_steps": 1, "sample_prompts": prompts}
    result = host.train(*ARGUMENTS, "spf_preview_every=0", **settings)
    assert result.returncode == 0, result.log[-4000:]
    samples = sorted((result.folder / "sample").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(samples) >= 2
    assert sorted(p.name for p in result.folder.glob("out*")) == [
        *("out-step00000001.safetensors", "out-step00000002.safetensors"),
        *("out.json", "out.preview.png", "out.safetensors"),
    ]
    card = json.loads((result.folder / "out.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "blonde hair"
    assert card["sd version"] == "SD1"
    assert (result.folder / "out.preview.png").read_bytes() == samples[-1].read_bytes()
