"""Training inside real, unmodified sd-scripts checkouts: files, exactness, reference, checkpointing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.hosts.conftest import Host

TARGET = "spf_target=blonde hair"
EVERY_STEP = (TARGET, "spf_log_every=1", "spf_preview_every=0")
one_host = pytest.mark.one_host  # nothing here passes through what the releases do differently
contract = pytest.mark.contract
OFF = (
    "spf_text_consistent_multiplier=0",
    "spf_fine_grained_multiplier=0",
    "spf_output_multiplier=0",
    "spf_base_preservation_multiplier=0",
)
# LyCORIS 4.1's default preset names a module twice on sd-scripts' SD1.5 UNet and fails there, with and without SPF.
LYCORIS = ("spf_network=lycoris.kohya", "preset=attn-mlp")


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5


@contract
def test_sd15_writes_an_ordinary_lora(host: Host) -> None:
    result = host.train(*EVERY_STEP, max_train_steps=2)
    plain = host.trained(module="networks.lora", max_train_steps=2)
    tensors = result.tensors()
    assert tensors.keys() == plain.tensors().keys()
    assert len(tensors) == 192 * 3
    assert relative_error(tensors, plain.tensors()) > 1e-2  # it trained something else than plain LoRA

    settings = json.loads(result.metadata()["ss_network_args"])
    assert settings["spf_target"] == "blonde hair"
    assert settings["spf_base_preservation_multiplier"] == "3"
    assert settings["spf_map"] == "soft"  # a default, written down all the same
    ran = settings["spf_run"]
    assert ran["batches"] == {"aligned": 1, "second": 1}
    assert (ran["samples"], ran["with_target"]) == (2, 2)
    assert "SPF: 2 batches: 1 aligned, 1 the second of a pair; 2 of 2 aligned samples had a target" in result.said
    changes_the_image(host, "sd15", result.file)
    assert set(result.metadata()) - set(plain.metadata()) == {"ss_network_args"}  # a host key; plain had no arguments


def image(pipeline: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 128, "width": 128, "output_type": "np"}
    return torch.from_numpy(pipeline("a woman, blonde hair", generator=generator, **options).images)


def changes_the_image(host: Host, model: str, file: Path) -> None:
    """diffusers' own loader takes the file without a word, and the picture is another one."""
    pipeline = DiffusionPipeline.from_pretrained(host.models[model], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    before = image(pipeline)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    assert float((image(pipeline) - before).abs().max()) > 1e-3
    pipeline.unload_lora_weights()
    torch.testing.assert_close(image(pipeline), before)


@contract
def test_sdxl_with_cached_text_and_checkpointing(host: Host) -> None:
    result = host.train(
        *EVERY_STEP,
        model="sdxl",
        max_train_steps=2,
        cache_text_encoder_outputs=True,
        gradient_checkpointing=True,
        cache_latents=True,
    )
    tensors = result.tensors()
    assert len(tensors) == 722 * 3
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_up" in name)
    changes_the_image(host, "sdxl", result.file)


@pytest.mark.parametrize(
    "options",
    [
        # The last two draw from Python's own generator, as the host's log lines do.
        pytest.param(
            {"network_train_unet_only": True, "shuffle_caption": True, "caption_dropout_rate": 0.3}, id="unet"
        ),
        pytest.param({"network_train_unet_only": False}, id="unet+text", marks=contract),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing", marks=one_host),  # SDXL: on both
        pytest.param(
            {"model": "sdxl", "gradient_checkpointing": True, "cache_text_encoder_outputs": True, "max_train_steps": 2},
            id="sdxl",
            marks=contract,
        ),
    ],
)
def test_without_weights_it_is_plain_lora_byte_for_byte(host: Host, options: dict[str, object]) -> None:
    """SPF still runs the reference to measure drift, and disturbs no random state, also not dropout's."""
    flags = {"network_dropout": 0.1, "max_train_steps": 3, **options}
    run = host.train(TARGET, *OFF, "spf_log_every=1", **flags)
    measured = run.tensors()
    assert f"this is a plain LoRA ({flags['max_train_steps']} plain, without any weight)" in run.said
    plain = host.train(module="networks.lora", **flags).tensors()
    assert measured.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(measured[name], tensor), name


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        pytest.param("sd15", "spf_base_preservation_multiplier=3", marks=contract),
        pytest.param("sd15", "spf_base_preservation_multiplier=0", marks=one_host),
        ("sdxl", "spf_base_preservation_multiplier=3"),
    ],
)
def test_checkpointing_changes_nothing(host: Host, model: str, setting: str) -> None:
    """Reentrant checkpointing would leave the alignment losses without gradient; SDXL uses it by default."""
    steps = 2 if model == "sdxl" else 4  # one pair, and two
    arguments = (setting, *EVERY_STEP)
    with_it = host.train(
        *arguments, model=model, max_train_steps=steps, gradient_checkpointing=True, learning_rate=1e-3
    )
    without = host.train(*arguments, model=model, max_train_steps=steps, learning_rate=1e-3)
    plain = host.trained(module="networks.lora", model=model, max_train_steps=steps, learning_rate=1e-3)
    assert relative_error(with_it.tensors(), without.tensors()) < 1e-4
    assert relative_error(without.tensors(), plain.tensors()) > 1e-2


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["network_dropout"], id="networks.lora+dropout", marks=contract),
        pytest.param([*LYCORIS, "algo=lora"], id="lycoris-locon", marks=one_host),
        pytest.param([*LYCORIS, "algo=lora", "dora_wd=True"], id="lycoris-dora", marks=one_host),
    ],
)
def test_the_reference_is_the_base_model_bit_for_bit(host: Host, arguments: list[str]) -> None:
    flags: dict[str, object] = {"network_dropout": 0.1} if arguments == ["network_dropout"] else {}
    words = [] if flags else arguments
    result = host.train(*EVERY_STEP, *words, module="tests.hosts.spy", max_train_steps=12, train_batch_size=1, **flags)
    assert result.returncode == 0, result.log[-4000:]
    steps = json.loads((result.folder / "spy.json").read_text())
    assert len(steps) == 6  # the first step of every pair
    assert any("dora_scale" in name for name in result.tensors()) == ("dora_wd=True" in arguments)
    assert all(step["equal"] for step in steps)
    assert all(step["response"] > 1e-4 for step in steps[1:])


@contract
def test_text_encoder_lora_trains_with_an_untrained_reference(host: Host) -> None:
    result = host.train(
        *EVERY_STEP,
        module="tests.hosts.spy",
        network_train_unet_only=None,
        max_train_steps=4,
        text_encoder_lr=1e-2,
    )
    tensors = result.tensors()
    assert len(tensors) == (192 + 12) * 3
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if name.startswith("lora_te") and "up" in name)
    assert all(step["equal"] for step in json.loads((result.folder / "spy.json").read_text()))


def test_cross_attention_only(host: Host) -> None:
    tensors = host.train(*EVERY_STEP, "spf_train=cross_attention", max_train_steps=2).tensors()
    assert len(tensors) == 64 * 3
    assert all("_attn2_" in name for name in tensors)
