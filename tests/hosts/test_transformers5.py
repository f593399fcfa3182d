"""sd-scripts v0.11 beside transformers 5, diffusers 0.40 and accelerate 1.15, which v0.12 asks for.

Optional: SPF_TRANSFORMERS5_PYTHON names a Python with them and with what sd-scripts imports (docs/lora-files.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import MadeOnce
from tests.hosts.conftest import HOSTS, Host, Models, release
from tests.hosts.test_training import EVERY_STEP, OFF, TARGET
from tests.lorafile.conftest import interpreter

TEXT = {"network_train_unet_only": None, "text_encoder_lr": 1e-2}


@pytest.fixture(scope="module")
def beside5(models: Models, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The checkout, in that Python. Its models are made here, by transformers 4, as users' models are."""
    python = interpreter("SPF_TRANSFORMERS5_PYTHON")
    folder = next((folder for folder in HOSTS if release(folder) == "v0.11"), None)
    if folder is None:
        pytest.skip("NO sd-scripts v0.11 CHECKOUT FOUND (see README, Tests)")
    host = Host(folder, models, tmp_path_factory.mktemp("runs5"), made_once, python)
    yield host
    host.close()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({**TEXT, "network_dropout": 0.1, "max_train_steps": 3}, id="sd15-text"),
        pytest.param({"model": "sdxl", "cache_text_encoder_outputs": True, "max_train_steps": 2}, id="sdxl"),
    ],
)
def test_without_weights_it_is_plain_lora_byte_for_byte(beside5: Host, flags: dict[str, object]) -> None:
    measured = beside5.train(TARGET, *OFF, "spf_log_every=1", **flags)
    plain = beside5.train(module="networks.lora", **flags)
    ours, theirs = measured.tensors(), plain.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "drift=" in measured.log


def test_it_trains_both_models_with_the_base_model_as_reference(beside5: Host) -> None:
    result = beside5.train(*EVERY_STEP, module="tests.hosts.spy", max_train_steps=4, **TEXT)
    moved = {name for name, tensor in result.tensors().items() if "lora_up" in name and float(tensor.abs().max()) > 0}
    assert len(result.tensors()) == (192 + 12) * 3
    assert any(name.startswith("lora_unet_") for name in moved)
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_self_attn_") for name in moved)
    steps = json.loads((result.folder / "spy.json").read_text())
    assert [step["equal"] for step in steps] == [True, True]
    assert [step["repeats"] for step in steps] == [True, True]
