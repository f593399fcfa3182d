"""Runs that stop and go on, and runs on two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.hosts.conftest import Host, Result

TARGET = "spf_target=blonde hair"
contract = pytest.mark.contract
OFF = (
    "spf_text_consistent_multiplier=0",
    "spf_fine_grained_multiplier=0",
    "spf_output_multiplier=0",
    "spf_base_preservation_multiplier=0",
)


def stop_and_resume(host: Host, *network_args: str, module: str, stop: int = 2, end: int = 4) -> tuple[Result, Result]:
    """Some steps, then from the saved state to the end."""
    first = host.train(*network_args, module=module, max_train_steps=stop, save_state=True, save_every_n_steps=stop)
    assert first.returncode == 0, first.log[-3000:]
    state = next(p for p in sorted(first.folder.glob("*-state")) if p.is_dir())
    second = host.train(
        *network_args, module=module, max_train_steps=end, resume=state, skip_until_initial_step=True, save_state=True
    )
    assert second.returncode == 0, second.log[-3000:]
    return first, second


def ran(result: Result, name: str = "out") -> dict[str, Any]:
    """What a file says that its run did."""
    with safe_open(result.folder / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["ss_network_args"])["spf_run"]


@contract
def test_resume_without_weights_equals_plain_resume_byte_for_byte(host: Host) -> None:
    _, ours = stop_and_resume(host, TARGET, *OFF, "spf_log_every=1", module="spf_plugin.lora")
    _, plain = stop_and_resume(host, module="networks.lora")
    ours_tensors, plain_tensors = ours.tensors(), plain.tensors()
    assert ours_tensors.keys() == plain_tensors.keys()
    for name, tensor in plain_tensors.items():
        assert torch.equal(ours_tensors[name], tensor), name


def test_resume_in_the_middle_of_stage_2(host: Host) -> None:
    settings = (TARGET, "spf_stage2_start=1", "spf_log_every=1", "spf_preview_every=0")
    first, second = stop_and_resume(host, *settings, module="spf_plugin.lora")
    saved = [json.loads(p.read_text()) for p in sorted(first.folder.glob("*-state/spf_state.json"))]
    assert {state["step"] for state in saved} == {2}
    assert "SPF: resumed at step 2, stage 2" in second.said
    final = max(json.loads(p.read_text())["step"] for p in second.folder.glob("*-state/spf_state.json"))
    assert final == 4
    # Its file says what both parts of the run did, and one from before alignment that it is a plain LoRA.
    assert ran(second)["batches"] == {"aligned": 2, "second": 1, "before": 1}
    assert ran(second)["samples"] == 4
    early = host.train(*settings, module="spf_plugin.lora", max_train_steps=2, save_every_n_steps=1)
    assert ran(early, "out-step00000001")["batches"] == {"before": 1}
    assert "drift=" in second.log.split("running training")[1].split("saving checkpoint")[0]


@pytest.mark.one_host
def test_a_state_of_another_target_is_refused_and_other_settings_are_said(host: Host) -> None:
    """The run asks before it makes a network; and again when the host loads it, as it does of one from the hub."""
    flags: dict[str, Any] = {"save_state": True, "save_every_n_steps": 1, "max_train_steps": 1}
    first = host.train(TARGET, "spf_preview_every=0", **flags)
    (state,) = (path for path in first.folder.glob("out-step*-state") if path.is_dir())
    flags = {"resume": state, "max_train_steps": 2}
    refused = host.train("spf_target=jacket", "spf_nonsense=1", **flags)
    assert refused.returncode != 0
    assert "running training" not in refused.log
    assert "with the target blonde hair, and this run's is jacket" in refused.said
    assert "unknown setting 'spf_nonsense'" in refused.said
    again = host.train(TARGET, "spf_map=paper", "spf_preview_every=0", **flags)
    assert again.returncode == 0, again.log[-3000:]
    said = "this run goes on with its own: spf_map=paper (was soft)"
    assert said in again.said.split("running training")[0]
    assert again.said.count(said) == 1


@contract
def test_a_resumed_run_whose_steps_are_all_skipped_says_so(host: Host) -> None:
    """The host takes the steps of its state times the accumulated batches for steps, and skips every epoch."""
    flags: dict[str, Any] = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    settings = (TARGET, "spf_preview_every=0")
    first = host.train(*settings, **flags, max_train_steps=3, save_state=True, save_every_n_steps=2)
    state = first.folder / "out-step00000002-state"
    again = host.train(*settings, **flags, max_train_steps=4, resume=state, skip_until_initial_step=True)
    assert again.returncode == 0, again.log[-3000:]
    assert "skips 2 times as many epochs as it should" in again.said
    before, after = load_file(state / "model.safetensors"), again.tensors()
    if all(torch.equal(tensor, after[name]) for name, tensor in before.items()):
        assert "the run ended before its first step" in again.said


@contract
def test_resume_between_the_two_steps_of_a_pair(host: Host) -> None:
    """The second step follows first, on what the first one showed: step 3 of 0 to 6 preserves."""
    first, second = stop_and_resume(host, TARGET, "spf_log_every=1", module="tests.hosts.spy", stop=3, end=7)
    for state in (p for p in first.folder.glob("*-state") if p.is_dir()):  # after the third step, and at the end
        waiting = json.loads((state / "spf_state.json").read_text())["pair"]
        assert all("blonde" not in prompt for prompt in waiting["base"])
        kept = load_file(state / "spf_pair.safetensors")
        assert kept["args.0"].shape == kept["eps_ref"].shape
    calls = json.loads((second.folder / "spy.json").read_text())
    assert len(calls) == 2  # in steps 4 and 6
    assert all(step["equal"] for step in calls)
    assert len(json.loads((first.folder / "spy.json").read_text())) == 2


def test_two_processes_train_the_same_lora(host: Host) -> None:
    # What `accelerate launch --multi_gpu --num_processes 2` runs; on a CPU it would ask for MPI instead.
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")]
    result = host.train(
        TARGET,
        "spf_log_every=1",
        module="tests.hosts.rank_spy",
        command=launch,
        environment={"ACCELERATE_USE_CPU": "true"},
        max_train_steps=3,
        train_batch_size=1,
    )
    assert result.returncode == 0, result.log[-4000:]
    ranks = [load_file(Path(result.folder) / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    for name, tensor in ranks[0].items():
        torch.testing.assert_close(tensor, ranks[1][name], rtol=0, atol=0)
    assert "drift=" in result.log
    left = set(json.loads((result.folder / "left.json").read_text()))
    hosts = {"flag_tensor", "trackers", "_metadata", "_minimum_metadata"}  # the last two of v0.11
    assert left <= {"end_training", "spf", *hosts}, left  # and the spy's own, and a name to find SPF by
