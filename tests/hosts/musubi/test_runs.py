"""Training inside a real, unmodified musubi-tuner: tiny models of the host's own classes, on the CPU. What a kind is,
its module here says; here is what must be true of all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.hosts.conftest import Result
from tests.hosts.musubi.conftest import EVERY_STEP, TARGET, Musubi, copied, equal, relative_error, words

OFF = tuple(f"spf_{name}_multiplier=0" for name in ("text_consistent", "fine_grained", "output", "base_preservation"))
SPY = "tests.hosts.musubi.spy"
contract = pytest.mark.contract


@contract
def test_it_trains_an_ordinary_lora(musubi: Musubi) -> None:
    plain = musubi.plain()
    result = musubi.train(*EVERY_STEP)
    tensors = result.tensors()
    assert tensors.keys() == plain.tensors().keys()
    assert len(tensors) == musubi.kind.TENSORS
    assert relative_error(tensors, plain.tensors()) > 1e-2
    assert "drift=" in result.log
    assert "nothing is applied" not in result.said  # what is known of loaders is of SD and SDXL
    assert set(result.metadata()) - set(plain.metadata()) == {"ss_network_args"}
    said = json.loads(result.metadata()["ss_network_args"])
    assert said["spf_target"] == "blonde hair"
    assert "spf_run" in said
    # The host's own network takes the file for what it is.
    again = musubi.plain(network_weights=result.file, max_train_steps=1, learning_rate=1e-12)
    assert "All keys matched" in again.said
    assert relative_error(again.tensors(), tensors) < 1e-6


@contract
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_without_weights_it_is_the_plain_network_bit_for_bit(musubi: Musubi, flags: dict[str, Any]) -> None:
    """SPF still runs the reference to measure drift, and disturbs no random state, also not dropout's."""
    flags = {"network_dropout": 0.1, "max_train_steps": 3, **flags}
    measured = musubi.train(TARGET, *OFF, "spf_log_every=1", **flags)
    assert "drift=" in measured.log
    plain = musubi.plain(**flags)
    assert equal(measured.tensors(), plain.tensors())
    names, data = ((tensors_of(result.file)) for result in (measured, plain))
    assert names == data


def tensors_of(file: Path) -> bytes:
    """The bytes of all tensors."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def pairs(result: Result) -> list[dict[str, Any]]:
    """What the spy saw, which must be right."""
    assert result.returncode == 0, result.log[-4000:]
    seen = json.loads((result.folder / "spy.json").read_text(encoding="utf-8"))
    assert seen
    assert all(pair["equal"] and pair["response"] > 0 for pair in seen if pair["target"]), seen
    assert all(pair["equal"] for pair in seen), seen
    *complete, last = seen  # of which a run may end before the second step
    assert all(pair["repeats"] == pair["target"] for pair in complete if "repeats" in pair or pair["target"]), seen
    assert last.get("repeats", True), seen
    assert all(height != width for *_, height, width in (pair["shape"] for pair in seen))
    return seen


@contract
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            {"gradient_checkpointing": True, "network_dropout": 0.1, "max_train_steps": 6}, id="checkpointing"
        ),
        pytest.param({"mixed_precision": "bf16", "fp8_base": True, "fp8_scaled": True}, id="fp8-scaled"),
        pytest.param({"blocks_to_swap": "MOST", "gradient_checkpointing": True}, id="swap-checkpointing"),
    ],
)
def test_the_reference_is_the_base_model_bit_for_bit(musubi: Musubi, flags: dict[str, Any]) -> None:
    flags = {name: musubi.kind.SWAPPED if value == "MOST" else value for name, value in flags.items()}
    assert len(pairs(musubi.train(*EVERY_STEP, module=SPY, **flags))) >= 2


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"mixed_precision": "bf16"}, id="bf16"),
        pytest.param({"split_attn": True}, id="split-attention"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True}, id="workers"),
    ],
)
@pytest.mark.kinds("zimage", "wan")
def test_the_reference_of_other_runs(musubi: Musubi, flags: dict[str, Any]) -> None:
    assert len(pairs(musubi.train(*EVERY_STEP, module=SPY, **flags))) >= 2


@pytest.mark.kinds("zimage", "qwen_image", "wan")
def test_every_module_has_a_gradient(musubi: Musubi) -> None:
    """Of the two factors, the one that begins at 0 moves in the first step, the other in the second. What a plain run
    leaves at 0 counts for nothing: of some models the last block makes words that nobody reads."""
    plain = musubi.plain(max_train_steps=1).tensors()
    read = {name for name in plain if "lora_up" in name and plain[name].abs().max() > 0}
    assert len(read) > 0.9 * sum("lora_up" in name for name in plain)
    first = musubi.train(*EVERY_STEP, max_train_steps=1).tensors()
    third = musubi.train(*EVERY_STEP, max_train_steps=3).tensors()
    assert all(first[name].abs().max() > 0 for name in read)
    both = read | {name.replace("lora_up", "lora_down") for name in read}
    assert not any(torch.equal(first[name], third[name]) for name in both)


@contract
def test_checkpointing_and_swapped_blocks_change_nothing(musubi: Musubi) -> None:
    without = musubi.train(*EVERY_STEP).tensors()
    for flags in ({"gradient_checkpointing": True}, {"blocks_to_swap": musubi.kind.SWAPPED}):
        assert relative_error(musubi.train(*EVERY_STEP, **flags).tensors(), without) < 1e-4


@pytest.mark.kinds("zimage", "qwen_image", "wan")
def test_an_earlier_lora_is_part_of_the_reference(musubi: Musubi) -> None:
    """`--base_weights` goes through SPF too, and is the host's own network there."""
    earlier = musubi.train(*EVERY_STEP).file
    result = musubi.train(*EVERY_STEP, module=SPY, base_weights=earlier, max_train_steps=2)
    assert "all weights merged" in result.said
    assert pairs(result)
    merged = musubi.plain(base_weights=earlier, max_train_steps=2).tensors()
    measured = musubi.train(TARGET, *OFF, base_weights=earlier, max_train_steps=2).tensors()
    assert equal(measured, merged)
    assert relative_error(measured, musubi.plain(max_train_steps=2).tensors()) > 1e-4


def test_the_rank_of_a_file(musubi: Musubi, tmp_path: Path) -> None:
    """`--dim_from_weights` is a switch to the parser and a path to the trainer: a configuration file can write one."""
    earlier = musubi.train(*EVERY_STEP, network_dim=2, network_alpha=1).file
    (tmp_path / "more.toml").write_text(f'dim_from_weights = "{earlier}"\n', encoding="utf-8")
    result = musubi.train(*EVERY_STEP, config_file=tmp_path / "more.toml", network_dim=8)
    assert {len(tensor) for name, tensor in result.tensors().items() if "lora_down" in name} == {2}
    assert "drift=" in result.log


@contract
def test_resume_between_the_two_steps_of_a_pair(musubi: Musubi) -> None:
    """The second step follows first, on what the first one showed, with all that the call takes."""
    first = musubi.train(*EVERY_STEP, module=SPY, max_train_steps=3, save_state_on_train_end=True)
    assert len(pairs(first)) == 2
    (state,) = (path for path in first.folder.glob("*-state") if path.is_dir())
    kept = load_file(state / "spf_pair.safetensors")
    assert sum(name.startswith(("args.", "kwargs.")) for name in kept) >= 3  # noise, timesteps, text
    second = musubi.train(*EVERY_STEP, module=SPY, max_train_steps=3, resume=state)
    assert "resumed at step 3, stage 2" in second.said
    assert len(pairs(second)) == 1  # the second of a pair, and a pair


@pytest.mark.kinds("zimage", "wan")
def test_samples_are_drawn_without_spf(musubi: Musubi, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a woman, smiling --w 64 --h 64 --s 2 --f 1\n", encoding="utf-8")
    flags = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1, "sample_at_first": True}
    flags["mixed_precision"] = "bf16"  # the host cannot draw in float32
    result = musubi.train(*EVERY_STEP, module=SPY, max_train_steps=2, **flags)
    assert pairs(result)
    assert len(list((result.folder / "sample").iterdir())) >= 2
    plain = musubi.plain(max_train_steps=2, **flags)
    measured = musubi.train(TARGET, *OFF, max_train_steps=2, **flags)
    assert equal(measured.tensors(), plain.tensors())


def test_its_numbers_are_in_the_trainers_logs(musubi: Musubi, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    musubi.train(*EVERY_STEP, logging_dir=tmp_path / "logs", log_with="tensorboard").tensors()
    (events,) = (tmp_path / "logs").rglob("events*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"loss/current", "spf/drift_outside", "spf/stage"} <= set(tags)


def drift(result: Result, logs: Path) -> float:
    """Outside the target, over the last steps of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert result.returncode == 0, result.log[-4000:]
    (events,) = logs.rglob("events*")
    values = [event.value for event in EventAccumulator(str(events)).Reload().Scalars("spf/drift_outside")]
    return fmean(values[-8:])


@pytest.mark.kinds("zimage", "qwen_image", "wan")
def test_drift_outside_the_target_falls(musubi: Musubi, tmp_path: Path) -> None:
    """Beside a plain LoRA of as many steps, which SPF only measures."""
    found = []
    for name, settings in (("plain", OFF), ("spf", ())):
        flags = {
            "logging_dir": tmp_path / name,
            "log_with": "tensorboard",
            "max_train_steps": 60,
            "learning_rate": 3e-3,
        }
        found.append(drift(musubi.train(*EVERY_STEP, *settings, **flags), tmp_path / name))
    assert found[1] < 0.5 * found[0], found


def test_another_network_of_the_hosts(musubi: Musubi) -> None:
    result = musubi.train(*EVERY_STEP, "spf_network=networks.loha", "spf_train=cross_attention")
    assert result.tensors()
    assert all("hada" in name or "alpha" in name for name in result.tensors())
    with safe_open(result.file, "pt") as file:
        assert "spf_target" in json.loads(file.metadata()["ss_network_args"])


@pytest.mark.kinds("zimage", "wan")
def test_several_targets(musubi: Musubi, tmp_path: Path) -> None:
    """Of which a caption may have one, both or none."""
    config = copied(musubi, tmp_path / "data")
    assert musubi.cache_prompts(config, "blonde hair|blue shirt").returncode == 0
    settings = ("spf_target=blonde hair|blue shirt", *EVERY_STEP[1:])
    result = musubi.train(*settings, module=SPY, dataset_config=config, max_train_steps=6)
    assert all(pair["target"] for pair in pairs(result))  # each caption has one of them
    assert "target blonde hair|blue shirt; " in result.said
    assert json.loads(result.metadata()["ss_network_args"])["spf_target"] == "blonde hair|blue shirt"


@pytest.mark.kinds("zimage", "wan")
def test_one_image_a_step(musubi: Musubi, tmp_path: Path) -> None:
    """Then the host pads nothing."""
    config = (musubi.data / "data.toml").read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1")
    (tmp_path / "one.toml").write_text(config, encoding="utf-8")
    seen = pairs(musubi.train(*EVERY_STEP, module=SPY, dataset_config=tmp_path / "one.toml", max_train_steps=20))
    assert {pair["target"] for pair in seen} == {True, False}


def test_two_processes_train_the_same_lora(musubi: Musubi) -> None:
    """With `--cpu` accelerate would leave the second one to MPI."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    result = musubi.train(*EVERY_STEP, module="tests.hosts.rank_spy", command=launch, max_train_steps=3)
    assert result.returncode == 0, result.log[-4000:]
    ranks = [load_file(result.folder / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert equal(ranks[0], ranks[1])
    assert any(bool(tensor.abs().max() > 0) for name, tensor in ranks[0].items() if "lora_up" in name)
    assert "drift=" in result.log


def test_every_mistake_is_said_before_the_first_step(musubi: Musubi) -> None:
    wrong = ("spf_target=green beard", "spf_layers=nothing", "spf_outptu_multiplier=1", "exclude=a=b", "stray")
    result = musubi.train(*wrong, compile=True)
    assert result.returncode != 0
    assert "epoch 1" not in result.log
    for said in (
        "stray word 'stray'",
        "more than one '='",
        "unknown setting 'spf_outptu_multiplier'; did you mean spf_output_multiplier?",
        "--compile",
        "spf_layers='nothing' matches none",
        "are of another target",
        "spf cache-prompts --arch",
    ):
        assert said in result.said, said
    assert words({"a": True}) == ["--a"]
