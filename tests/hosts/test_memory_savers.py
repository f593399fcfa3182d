"""What makes a run fit a small card, inside real sd-scripts: a quantised base, and bitsandbytes' optimizers."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from spf_plugin.families.unet import UNet
from tests.hosts.conftest import Host
from tests.hosts.test_failures import stops
from tests.hosts.test_options import aligned

one_host = pytest.mark.one_host  # nothing here passes through what the releases do differently
EVERY_STEP = ("spf_target=blonde hair", "spf_log_every=1", "spf_preview_every=0")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="NOT RUN: bitsandbytes is not installed; pip install --no-deps bitsandbytes",
)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        pytest.param("int8", {"optimizer_type": "AdamW8bit", "mixed_precision": "bf16"}, id="int8-AdamW8bit-bf16"),
        pytest.param(
            "nf4", {"optimizer_type": "PagedAdamW8bit", "sdpa": True}, id="nf4-PagedAdamW8bit", marks=one_host
        ),
    ],
)
def test_quantised_base(host: Host, kind: str, flags: dict[str, object]) -> None:
    """The reference is the quantised base bit for bit, the LoRA learns, and its file is an ordinary one."""
    result = host.train(
        *EVERY_STEP,
        f"spf_base={kind}",
        module="tests.hosts.spy",
        max_train_steps=4,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        **flags,
    )
    tensors = result.tensors()
    assert len(tensors) == 192 * 3
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert all(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_up" in name)
    assert json.loads(result.metadata()["ss_network_args"])["spf_base"] == kind

    steps = json.loads((result.folder / "spy.json").read_text())
    assert len(steps) == 2  # the first step of each pair
    assert all(step["equal"] for step in steps)
    assert all(step["response"] > 1e-4 for step in steps[1:])

    unet = UNet2DConditionModel.from_pretrained(host.models["sd15"] / "unet")
    weights = [layer.weight for layer in UNet(unet).linear_layers()]
    dense, rows = sum(w.numel() for w in weights), sum(len(w) for w in weights)
    before, now = steps[0]["bytes"]  # of the host's own UNet: loaded in float32, cast to the run's precision
    rest = (before - 4 * dense) // (2 if "mixed_precision" in flags else 1)
    assert now == rest + (dense + 4 * rows if kind == "int8" else dense * 4.5 / 8)
    assert f"SPF: {len(weights)} linear" in result.log


@one_host
def test_paged_adamw(host: Host) -> None:
    aligned(host.train(*EVERY_STEP, optimizer_type="PagedAdamW", max_train_steps=2))


@one_host
def test_what_a_quantised_base_refuses(host: Host) -> None:
    message = stops(
        host, EVERY_STEP[0], "spf_base=nf4", "spf_network=lycoris.kohya", "algo=boft", "dora_wd=True", fp8_base=True
    )
    assert "SPF: 5 problems" in message
    for words in (
        "duplicated lora name",  # LyCORIS's own, of any algorithm: its preset `full` names a UNet's layers twice
        "cannot go with algo=boft",
        "cannot go with dora_wd",
        "Add bypass_mode=True",
        "spf_base=nf4 and --fp8_base",
    ):
        assert words in message
