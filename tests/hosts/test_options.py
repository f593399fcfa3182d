"""The host's own options, each beside the dual path: it trains, aligns, and what it writes is finite."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.hosts.conftest import Host, Result

TARGET = "spf_target=blonde hair"
EVERY_STEP = (TARGET, "spf_log_every=1", "spf_preview_every=0")
one_host = pytest.mark.one_host  # it passes through nothing that the releases do differently
contract = pytest.mark.contract


def aligned(result: Result) -> None:
    """It ended well, SPF compared the paths in it, and the LoRA moved and is finite."""
    tensors = result.tensors()
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_up" in name)
    assert re.search(r"drift=[\d.]+", result.log), "the dual path never ran"


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"weighted_captions": True}, id="weighted"),
        pytest.param({"max_token_length": 225, "clip_skip": 2}, id="225-tokens"),
        pytest.param({"v2": True, "v_parameterization": True, "max_token_length": 150}, id="sd2-code-path"),
        pytest.param({"weighted_captions": True, "max_token_length": 150}, id="weighted-150", marks=contract),
        pytest.param(
            {
                "shuffle_caption": True,
                "keep_tokens": 1,
                "caption_dropout_rate": 0.3,
                "caption_tag_dropout_rate": 0.3,
                "max_train_steps": 8,
            },
            id="shuffle-dropout",
            marks=contract,
        ),
        pytest.param({"mixed_precision": "bf16", "gradient_checkpointing": True}, id="bf16", marks=contract),
        pytest.param({"mixed_precision": "bf16", "full_bf16": True}, id="full-bf16", marks=one_host),
        pytest.param(
            {"v_parameterization": True, "zero_terminal_snr": True, "scale_v_pred_loss_like_noise_pred": True},
            id="v-prediction",
            marks=one_host,
        ),
        pytest.param(
            {"min_snr_gamma": 5, "noise_offset": 0.05, "sdpa": True, "loss_type": "huber"},
            id="snr-offset-sdpa",
            marks=one_host,
        ),
        pytest.param(
            {"mem_eff_attn": True, "cache_latents": True, "cache_latents_to_disk": True},
            id="mem-eff-disk-cache",
            marks=one_host,
        ),
        pytest.param(
            {"gradient_accumulation_steps": 2, "train_batch_size": 1, "max_train_steps": 2},
            id="accumulation",
            marks=contract,
        ),
        pytest.param(
            {"scale_weight_norms": 1.0, "lr_scheduler": "cosine", "network_dropout": 0.2}, id="max-norm", marks=one_host
        ),
    ],
)
def test_option(host: Host, flags: dict[str, object], tmp_path: Path) -> None:
    if flags.get("cache_latents_to_disk"):  # leaves .npz files beside the images
        flags = {**flags, "train_data_dir": tiny.images(tmp_path / "images")}
    result = host.train(*EVERY_STEP, module="tests.hosts.spy", **{"max_train_steps": 3, **flags})
    aligned(result)
    assert all(step["equal"] for step in json.loads((result.folder / "spy.json").read_text()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: fp16's loss scaler and xformers need a GPU")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"mixed_precision": "fp16", "gradient_checkpointing": True}, id="fp16-scaler"),
        pytest.param({"mixed_precision": "fp16", "xformers": True}, id="xformers"),
    ],
)
def test_option_of_a_gpu(host: Host, flags: dict[str, object]) -> None:
    if "xformers" in flags and find_spec("xformers") is None:
        pytest.skip("NOT RUN: xformers is not installed")
    aligned(host.train(*EVERY_STEP, learning_rate=1e-3, max_train_steps=12, **flags))


@one_host
def test_fp8_base(host: Host) -> None:
    flags: dict[str, object] = {"mixed_precision": "bf16", "fp8_base": True, "max_train_steps": 2}
    if host.train(module="networks.lora", **flags).returncode != 0:
        pytest.skip("NOT RUN: without a GPU, sd-scripts itself cannot train on an fp8 base")
    aligned(host.train(*EVERY_STEP, **flags))


@pytest.mark.parametrize("model", [pytest.param("sd15", marks=contract), "sdxl"])
def test_buckets_of_two_shapes_and_a_smaller_last_batch(host: Host, tmp_path: Path, model: str) -> None:
    """The second step of a pair shows the first one's bucket, whatever batch the loop has by then."""
    data = tiny.images(tmp_path / "both", size=(128, 320), captions=tiny.CAPTIONS[:3])
    for image in (data / "1_set").iterdir():
        image.rename(image.with_name("tall" + image.name))
    tiny.images(tmp_path / "both", size=(320, 128), captions=tiny.CAPTIONS[:3])
    flags: dict[str, object] = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 512}
    flags |= {"resolution": "192,192"}
    flags |= {"model": model, "train_data_dir": data, "max_train_steps": 8}
    result = host.train(*EVERY_STEP, "spf_layers=all", module="tests.hosts.spy", **flags)
    aligned(result)
    pairs = json.loads((result.folder / "spy.json").read_text())
    assert len({tuple(pair["shape"]) for pair in pairs}) >= 2  # two buckets, and one or two images
    assert [pair["repeats"] for pair in pairs] == [True] * 4


@contract
def test_masked_loss(host: Host, tmp_path: Path) -> None:
    data = tiny.images(tmp_path / "images")
    masks = tmp_path / "masks"
    masks.mkdir()
    for image in sorted((data / "1_set").glob("*.png")):
        Image.fromarray(np.full((128, 128, 3), 200, dtype=np.uint8)).save(masks / image.name)
    config = tmp_path / "data.toml"
    config.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 128\nbatch_size = 2\n[[datasets.subsets]]\n'
        f'image_dir = "{(data / "1_set").as_posix()}"\nconditioning_data_dir = "{masks.as_posix()}"\nnum_repeats = 1\n',
        encoding="utf-8",
    )
    aligned(host.train(*EVERY_STEP, train_data_dir=None, dataset_config=config, masked_loss=True))


def test_earlier_loras(host: Host) -> None:
    """An earlier LoRA merged into the base belongs to the reference; training can go on from a LoRA file."""
    first = host.trained(*EVERY_STEP, max_train_steps=2)
    merged = host.train(*EVERY_STEP, module="tests.hosts.spy", base_weights=[first.file], max_train_steps=3)
    aligned(merged)
    continued = host.train(*EVERY_STEP, network_weights=first.file, dim_from_weights=True, max_train_steps=2)
    aligned(continued)


@one_host
def test_an_earlier_lora_with_the_shapes_of_sd2_is_merged_as_any_other(host: Host, tmp_path: Path) -> None:
    """WebUIs want two dimensions for SD2's projections; the host's own merge takes the shapes as they come."""
    first = host.trained(*EVERY_STEP, max_train_steps=2)
    tensors = first.tensors()
    projections = [name for name in tensors if re.search(r"proj_(in|out).lora", name) and tensors[name].ndim == 4]
    assert projections
    flat = tmp_path / "flat.safetensors"
    save_file({**tensors, **{name: tensors[name].flatten(1) for name in projections}}, flat)
    once, again = (host.train(*EVERY_STEP, base_weights=[file], max_train_steps=2) for file in (first.file, flat))
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in once.tensors().items())


@one_host
def test_training_goes_on_from_a_file_whose_alphas_were_made_one(host: Host) -> None:
    """networks.lora takes its scale from its own alpha and no notice of the file's: the delta must stay."""
    convolutions = ["conv_dim=4", "conv_alpha=16"]
    first = host.train(*EVERY_STEP, *convolutions, max_train_steps=2)
    still = host.train(*EVERY_STEP, *convolutions, network_weights=first.file, max_train_steps=1, learning_rate=1e-20)
    assert {float(t) for name, t in first.tensors().items() if name.endswith("alpha")} == {2.0}
    for name, tensor in first.tensors().items():
        assert torch.allclose(still.tensors()[name], tensor, rtol=1e-5, atol=1e-9), name


@one_host
def test_plain_sd_scripts_go_on_from_such_a_file_as_it_says(host: Host, tmp_path: Path) -> None:
    """A step of plain gradient descent by networks.lora, from the file with the alphas of the user and from ours."""
    convolutions = ["conv_dim=4", "conv_alpha=16"]
    first = host.trained(*EVERY_STEP, *convolutions, max_train_steps=2)
    assert first.metadata()["spf.continued_with"] == "--dim_from_weights"
    assert "use --dim_from_weights" in json.loads(first.file.with_suffix(".json").read_text("utf-8"))["notes"]
    own = {name: tensor.clone() for name, tensor in first.tensors().items()}
    wide = {name.split(".")[0] for name, tensor in own.items() if "lora_down" in name and tensor.shape[2:] == (3, 3)}
    for name in wide:  # the same delta
        own[f"{name}.alpha"] = torch.full_like(own[f"{name}.alpha"], 16)
        own[f"{name}.lora_up.weight"] /= 8
    users = tmp_path / "users.safetensors"
    save_file(own, users)

    def updates(file: Path, **flags: Any) -> dict[str, torch.Tensor]:
        options = {"module": "networks.lora", "optimizer_type": "SGD", "max_train_steps": 1, "learning_rate": 1.0}
        result = host.train(*convolutions, network_weights=file, **options, **flags)
        before = load_file(file)
        return {
            name: tensor - before[name]
            for name, tensor in result.tensors().items()
            if name.split(".")[0] not in wide and "lora_up" in name
        }

    def apart(**flags: Any) -> float:
        """How far the steps are apart, as a share of the right one; each way draws its own noise."""
        right, ours = updates(users, **flags), updates(first.file, **flags)
        assert max(float(update.abs().max()) for update in right.values()) > 0
        return max(float((ours[name] - update).norm() / update.norm()) for name, update in right.items())

    assert apart(dim_from_weights=True) < 1e-3
    assert apart() > 0.1


def test_a_loop_that_begins_late(host: Host) -> None:
    """Two steps an epoch: from the second epoch on there are steps 2 to 5, of which 3 and 5 compare with the base."""
    late = {"initial_epoch": 2, "skip_until_initial_step": True, "max_train_steps": 6}
    result = host.train(EVERY_STEP[0], "spf_stage2_start=3", "spf_log_every=1", module="tests.hosts.spy", **late)
    aligned(result)
    assert "alignment from step 3 of 6" in re.sub(r"\s+", " ", result.log)
    assert len(json.loads((result.folder / "spy.json").read_text())) == 2


@one_host
def test_replacement_and_several_targets(host: Host) -> None:
    aligned(host.train("spf_target=blonde_hair->black hair|white dress", *EVERY_STEP[1:], "spf_map=paper"))


@one_host
def test_every_map_trains(host: Host) -> None:
    """Each its own LoRA: no two maps weigh the same."""
    loras: dict[str, dict[str, torch.Tensor]] = {}
    for kind, region in (("soft", "map"), ("paper", "map"), ("difference", "map"), ("difference", "all")):
        words = (f"spf_map={kind}", f"spf_diffusion_region={region}", "spf_map_gain=1")  # more: white, in noise
        result = host.train(*EVERY_STEP, *words, max_train_steps=2)
        aligned(result)
        loras[f"{kind} {region}"] = result.tensors()
    for one, other in combinations(loras, 2):
        equal = all(torch.equal(tensor, loras[other][name]) for name, tensor in loras[one].items())
        assert not equal, f"{one} and {other}"


@contract
def test_target_of_each_subset(host: Host, tmp_path: Path) -> None:
    if not host.is_new:
        pytest.skip("NOT RUN: custom_attributes came with the 2025 branches")
    data = tiny.images(tmp_path / "images")
    config = tmp_path / "data.toml"
    config.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 128\nbatch_size = 2\n[[datasets.subsets]]\n'
        f'image_dir = "{(data / "1_set").as_posix()}"\nnum_repeats = 1\n'
        '[datasets.subsets.custom_attributes]\nspf_target = "blonde hair"\n',
        encoding="utf-8",
    )
    aligned(host.train(*EVERY_STEP[1:], train_data_dir=None, dataset_config=config))


@contract
def test_the_hosts_own_preservation_and_validation_pass_through(host: Host, tmp_path: Path) -> None:
    if not host.is_new:
        pytest.skip("NOT RUN: validation and diff_output_preservation came with the 2025 branches")
    data = tiny.images(tmp_path / "images", captions=tiny.CAPTIONS * 3)
    regular = tiny.images(tmp_path / "regular", captions=("a woman", "a man"))
    config = tmp_path / "data.toml"
    config.write_text(
        '[general]\ncaption_extension = ".txt"\n'
        "[[datasets]]\nresolution = 128\nbatch_size = 1\nvalidation_split = 0.3\n"
        f'[[datasets.subsets]]\nimage_dir = "{(data / "1_set").as_posix()}"\nnum_repeats = 1\n'
        f'[[datasets.subsets]]\nimage_dir = "{(regular / "1_set").as_posix()}"\nnum_repeats = 1\nis_reg = true\n'
        "[datasets.subsets.custom_attributes]\ndiff_output_preservation = true\n",
        encoding="utf-8",
    )
    result = host.train(
        *EVERY_STEP,
        train_data_dir=None,
        dataset_config=config,
        max_train_steps=8,
        validate_every_n_steps=4,
        max_validation_steps=1,
    )
    aligned(result)
    assert "validation steps" in result.log


@contract
def test_trackers(host: Host, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = host.train(*EVERY_STEP, logging_dir=tmp_path / "logs", log_with="tensorboard")
    aligned(result)
    found: set[str] = set()
    for file in (tmp_path / "logs").rglob("events.*"):
        reader = EventAccumulator(str(file))
        reader.Reload()
        found |= set(reader.Tags()["scalars"])
    for name in ("text_consistent", "fine_grained", "output", "drift_inside", "drift_outside", "map_mean", "stage"):
        assert f"spf/{name}" in found
    assert "loss/current" in found
