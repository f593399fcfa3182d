"""The run stops where the check says so, with the same words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.check.conftest import kept_info, look, own_subset, stops_of_the_run
from tests.check_sets import Run, good
from tests.messages import all_messages


def _xl(run: Run, **options: object) -> None:
    run.set(pretrained_model_name_or_path="sd_xl_base_1.0.safetensors", cache_text_encoder_outputs=True, **options)


def _changed_caption(run: Run) -> None:
    _xl(run, cache_text_encoder_outputs_to_disk=True)
    (run.images / "p0_te_outputs.npz").write_bytes(b"")
    os.utime(run.images / "p0_te_outputs.npz", (1000, 1000))


def _every_option(run: Run) -> None:
    _xl(run, save_model_as="pt", torch_compile=True, fp8_base_unet=True, output_dir="run.toml/loras")
    run.args("spf_target=green hair", "spf_base=int8", "spf_network=lycoris.kohya", "algo=lokr")


#: What stops a run for a reason that only SPF has, by the rule.
FAULTS: dict[str, Callable[[Run], object]] = {
    "text encoder only": lambda r: r.set(network_train_text_encoder_only=True),
    "checkpoint": lambda r: r.set(save_model_as="ckpt"),
    "offload": lambda r: r.set(cpu_offload_checkpointing=True),
    "compiled": lambda r: r.set(torch_compile=True),
    "inpainting": lambda r: r.set(train_inpainting=True),
    "no output": lambda r: r.set(output_dir="run.toml/loras"),
    "output elsewhere": lambda r: r.set(output_dir=" /data/model"),
    "no folder for the name": lambda r: r.set(output_name="portraits/hair"),
    "prefix not cached": lambda r: (r.dataset(own_subset(caption_prefix="a photo of")), _xl(r)),
    "old cache": _changed_caption,
    "network on a base": lambda r: r.args("spf_target=blonde hair", "spf_base=int8", "spf_network=networks.dylora"),
    "algorithm on a base": lambda r: r.args(
        "spf_target=blonde hair", "spf_base=int8", "spf_network=lycoris.kohya", "algo=full", "bypass_mode=True"
    ),
    "decomposed base": lambda r: r.args(
        "spf_target=blonde hair", "spf_base=int8", "spf_network=lycoris.kohya", "dora_wd=True"
    ),
    "two small bases": lambda r: (r.args("spf_target=blonde hair", "spf_base=int8"), r.set(fp8_base=True)),
    "unreadable target": lambda r: r.dataset(own_subset(custom_attributes={"spf_target": "hat->"})),
    "no target": lambda r: r.args("spf_map=soft"),
    "absent target": lambda r: r.args("spf_target=green hair"),
    "absent target of a subset": lambda r: r.dataset(own_subset(custom_attributes={"spf_target": "hat|wings"})),
    "empty captions": lambda r: r.captions(lambda caption: ""),
    "cut targets": lambda r: r.captions(lambda caption: "a tree, " * 40 + caption),
    "cut targets of a longer text": lambda r: (
        r.captions(lambda caption: "a tree, " * 80 + caption),
        r.set(max_token_length=225),
    ),
    "no caption at any step": lambda r: r.dataset(own_subset(caption_dropout_every_n_epochs=1)),
    "captions kept by cache_info": lambda r: (r.dataset(own_subset(cache_info=True)), kept_info(r)),
    "nothing but the target": lambda r: r.captions(lambda caption: "blonde hair"),
    "masks drop a target": lambda r: r.dataset(
        own_subset(custom_attributes={"spf_target": "hat"}, conditioning_data_dir="masks")
    ),
    "wildcards not read": lambda r: (
        r.dataset(own_subset(enable_wildcard=True)),
        r.caption(0, "a {man|woman}, blonde hair"),
        _xl(r),
    ),
    "separator not read": lambda r: (
        r.dataset(own_subset(secondary_separator=";;;")),
        r.caption(0, "a man;;;blonde hair"),
        _xl(r),
    ),
    "many": _every_option,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_with_the_same_words(run: Run, fault: str) -> None:
    FAULTS[fault](run)
    said = [finding.message for finding in look(run).findings if finding.code == "stops"]
    assert said == stops_of_the_run(run)
    assert said


def test_every_rule_has_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no rule is left out above; what the device says is of the run alone."""
    said = []
    for i, spoil in enumerate(FAULTS.values()):
        run = good(tmp_path / str(i))
        monkeypatch.chdir(run.folder)
        spoil(run)
        said += stops_of_the_run(run)
    elsewhere = (
        "trainer_problem",
        "_dit_problems",
        "_early_layers",
        "_noisy_text",
        "_skipped_warnings",
        "by_encoding",
        "repeated",
    )  # of the run alone, as what the device says; warnings; and the command line's
    rules = [
        m
        for m in all_messages()
        if m.place.startswith(("hosts/kohya/rules.py", "hosts/kohya/cached_text.py")) and m.function not in elsewhere
    ]
    shared = ("adapter/quantised.py", "core/coverage.py")
    rules += [m for m in all_messages() if m.place.startswith(shared) and m.function == "problems"]
    assert len(rules) >= 15
    assert [message.text for message in rules if not any(map(message.made, said))] == []
