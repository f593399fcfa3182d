"""What musubi-tuner can and cannot do with SPF, without a copy of it: the rules, on plain data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spf_plugin.config import parse
from spf_plugin.hosts.looking import Found
from spf_plugin.hosts.musubi import rules
from spf_plugin.hosts.musubi.dataset import Dataset, Item, of_host
from spf_plugin.hosts.musubi.scripts import named

DATA = Dataset((Item("a/1.png", "a man, red wall, blonde hair"), Item("a/2.png", "a woman, street, blonde hair")))


def options(**more: Any) -> SimpleNamespace:
    """The host's arguments of a run that is right."""
    given = {
        "network_args": ["spf_target=blonde hair"],
        "sdpa": True,
        "dim_from_weights": False,
        "dynamo_backend": "NO",
        "max_train_steps": 100,
        "max_train_epochs": None,
        "resume": None,
        "output_dir": "out",
        "output_name": "hair",
    }
    return SimpleNamespace(**{**given, **more})


def found(
    script: str = "zimage", settings: dict[str, Any] | None = None, data: list[Dataset] | None = None, **more: Any
) -> Found:
    chosen = named(f"{script}_train_network.py")
    assert chosen is not None
    config = parse({"spf_target": "blonde hair", **(settings or {})})
    return rules.look(options(**more), [DATA] if data is None else data, config, script=chosen, trying=False)


@pytest.mark.parametrize("script", ["zimage", "qwen_image", "flux_2", "krea2", "wan"])
def test_nothing_is_wrong_with_a_run_that_is_right(script: str) -> None:
    assert found(script) == Found([], [], [])


@pytest.mark.parametrize(
    ("script", "more", "reason"),
    [
        ("hv", {}, "hv_train_network.py trains HunyuanVideo, whose model SPF does not know"),
        ("ideogram4", {}, "Ideogram 4"),
        ("qwen_image", {"model_version": "Edit-2509"}, "Qwen-Image Edit-2509: SPF knows the model from text"),
        ("qwen_image", {"edit_plus": True}, "Qwen-Image edit_plus"),
        ("qwen_image", {"model_version": "layered"}, "Qwen-Image layered"),
        ("qwen_image", {"model_version": "original"}, None),
        ("qwen_image", {"model_version": "Original"}, None),  # the host writes it small
        ("wan", {"task": "i2v-14B"}, "--task i2v-14B begins with an image"),
        ("wan", {"task": "t2v-1.3B-FC"}, "--task t2v-1.3B-FC"),
        ("wan", {"task": "t2v-A14B"}, None),
        ("wan", {"task": "t2v-A14B", "dit_high_noise": "high.safetensors"}, "--dit_high_noise: the host changes"),
        ("wan", {"one_frame": True}, "--one_frame"),
        ("zimage", {"compile": True}, "--compile"),
        ("zimage", {"dynamo_backend": "INDUCTOR"}, "--dynamo_backend INDUCTOR"),
        ("zimage", {"sdpa": False}, "no attention is chosen"),
        ("zimage", {"sdpa": False, "sage_attn": True}, "--sage_attn cannot train"),
        ("zimage", {"sdpa": False, "flash_attn": True, "sage_attn": True}, None),  # the host takes the first
        ("zimage", {"fp8_scaled": True}, "--fp8_scaled needs --fp8_base"),
        ("zimage", {"fp8_base": True}, None),
        ("krea2", {"fp8_base": True}, "--fp8_base needs --fp8_scaled"),
        ("flux_2", {"fp8_base": True}, "--fp8_base needs --fp8_scaled beside it with FLUX.2"),
        ("zimage", {"blocks_to_swap": 2, "block_swap_h2d_only": True}, "--block_swap_h2d_only"),
        ("zimage", {"save_every_n_steps": 0}, "--save_every_n_steps 0"),
        ("zimage", {"output_dir": None}, "no --output_dir"),
        ("zimage", {"output_name": None}, "no --output_name"),
        ("zimage", {"output_dir": " out"}, "begins or ends with a space"),
        ("zimage", {"output_name": "hair/"}, "--output_name is empty"),
        ("zimage", {"output_name": "not there/hair"}, "and musubi-tuner makes none for it"),
        ("zimage", {"dim_from_weights": True}, "--dim_from_weights: musubi-tuner reads its value as the file"),
        ("zimage", {"dim_from_weights": "old.safetensors"}, None),
        ("zimage", {"network_args": ["exclude_patterns=['a=b']"]}, "has more than one '='"),
        ("zimage", {"network_args": ["spf_target=a=b"]}, None),  # that is said where SPF's own settings are read
    ],
)
def test_options_that_cannot_be(script: str, more: dict[str, Any], reason: str | None) -> None:
    errors = found(script, **more).errors
    assert len(errors) == bool(reason)
    assert reason is None or reason in errors[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"spf_response": "anchor"}, "spf_response=anchor needs pixels"),
        ({"spf_base": "int8"}, "spf_base=int8 has not been tried with musubi-tuner"),
        ({"spf_stage2_start": "100"}, "alignment would start at step 100"),
        ({"spf_target": "green hair"}, "occurs in none of the 2 captions"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], reason: str) -> None:
    errors = found(settings=settings).errors
    assert len(errors) == 1
    assert reason in errors[0]


@pytest.mark.parametrize("more", [{"max_train_epochs": 2}, {"resume": "state"}], ids=["epochs", "resumed"])
def test_steps_that_are_not_known_yet_are_not_counted(more: dict[str, Any]) -> None:
    assert not found(settings={"spf_stage2_start": "100"}, **more).errors


@pytest.mark.parametrize(("script", "limit"), [("zimage", 512), ("qwen_image", 1024), ("wan", 512)])
def test_targets_behind_what_the_text_encoder_reads(script: str, limit: int) -> None:
    """Of Qwen-Image's prompt alone there may be twice as many tokens. A token a word."""
    chosen, config = named(f"{script}_train_network"), parse({"spf_target": "blonde hair"})
    assert chosen is not None
    for words, errors in ((limit - 2, 0), (limit, 1)):
        data = Dataset((Item("a/1.png", "very " * (words - 1) + "long, blonde hair"),))
        look = rules.look(
            options(), [data], config, script=chosen, trying=False,
            tokenize=lambda text: [0 for word in text.split()],
        )  # fmt: skip
        assert len(look.errors) == errors, (words, look)


def test_a_target_is_needed() -> None:
    chosen = named("zimage_train_network")
    assert chosen is not None
    errors = rules.look(options(), [DATA], parse({}), script=chosen, trying=False).errors
    assert len(errors) == 1
    assert errors[0].startswith("no target.")
    assert not rules.look(options(), [DATA], parse({}), {"target"}, script=chosen, trying=False).errors


@pytest.mark.parametrize(
    ("script", "data", "reason"),
    [
        ("zimage", Dataset(DATA.items, video=True), "is of videos, and zimage_train_network.py takes images only"),
        ("wan", Dataset(DATA.items, video=True), None),
        ("flux_2", Dataset(DATA.items, control=True), "has control images or videos"),
        ("qwen_image", Dataset(DATA.items, multiple_target=True), "multiple_target"),
        ("wan", Dataset(DATA.items, one_frame=("fp_1f_target_index",)), "fp_1f_target_index"),
        ("zimage", Dataset((*DATA.items, Item("b/1.jpg", "a boy, blonde hair"))), "a/1.png and b/1.jpg"),
    ],
)
def test_data_that_cannot_be(script: str, data: Dataset, reason: str | None) -> None:
    errors = found(script, data=[data]).errors
    assert len(errors) == bool(reason)
    assert reason is None or reason in errors[0]


def test_of_a_trainer_that_is_not_known_nothing_is_said_of_its_data() -> None:
    (error,) = found("hv", data=[Dataset(DATA.items, video=True)]).errors
    assert error.startswith("hv_train_network.py trains HunyuanVideo")


def test_8_bits_alone_and_several_samples_in_a_batch() -> None:
    several = [replace(DATA, batch_size=2)]
    (error,) = found(data=several, fp8_base=True).errors
    assert error.startswith("--fp8_base needs --fp8_scaled beside it with Z-Image and a batch_size above 1")
    for right in ({"fp8_scaled": True}, {"split_attn": True}):
        assert not found(data=several, fp8_base=True, **right).errors
    assert not found("qwen_image", data=several, fp8_base=True).errors


def test_items_of_two_data_sets_may_share_a_name() -> None:
    """Each has a folder of its own for the cache."""
    assert not found(data=[DATA, Dataset(DATA.items, "[[datasets]] 2")]).errors


def test_data_sets_with_one_cache_by_two_names(tmp_path: Path) -> None:
    """The host stops where the names are the same."""
    (tmp_path / "cache").mkdir()
    first, second, third, fourth = (
        Dataset(DATA.items, f"[[datasets]] {i}", cache=str(tmp_path / name))
        for i, name in enumerate(("cache", "elsewhere/../cache", "other", "link"), 1)
    )
    (tmp_path / "elsewhere").mkdir()
    (error,) = found(data=[first, second, third]).errors
    assert error.startswith("[[datasets]] 1 and [[datasets]] 2 have one cache folder, ")
    try:
        (tmp_path / "link").symlink_to(tmp_path / "cache", target_is_directory=True)
    except OSError as problem:
        pytest.skip(f"LINKS NOT TESTED: {problem}")
    (error,) = found(data=[first, third, fourth]).errors
    assert error.startswith("[[datasets]] 1 and [[datasets]] 4 have one cache folder, ")


def test_captions_without_the_target_are_said() -> None:
    told = found(data=[Dataset((*DATA.items, Item("a/3.png", "a man, red wall")))])
    assert not told.errors
    assert "1 of 3 captions do not contain the target" in told.of_captions[0]


def test_what_accelerate_was_set_up_to_do() -> None:
    chosen = named("zimage_train_network")
    assert chosen is not None
    config = parse({"spf_target": "blonde hair"})
    errors = rules.look(options(), [DATA], config, script=chosen, trying=False, compiled=True).errors
    assert len(errors) == 1
    assert errors[0].startswith("the model would be compiled")


class NetworkTrainer:
    def process_batch(self) -> None: ...

    def compute_loss(self) -> None: ...


class ZImageNetworkTrainer(NetworkTrainer): ...


class Ideogram4NetworkTrainer(NetworkTrainer):
    def compute_loss(self) -> None: ...


class Quieter(ZImageNetworkTrainer):
    def save(self) -> None: ...


class OtherLoss(ZImageNetworkTrainer):
    def compute_loss(self) -> None: ...


class Flux2NetworkTrainer(NetworkTrainer): ...


class Flux2SelfFlowNetworkTrainer(Flux2NetworkTrainer): ...


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (ZImageNetworkTrainer, None),
        (Quieter, None),
        (OtherLoss, "OtherLoss has a compute_loss of its own, and SPF knows that of ZImageNetworkTrainer only"),
        (Ideogram4NetworkTrainer, "Ideogram4NetworkTrainer trains Ideogram 4"),
        (Flux2SelfFlowNetworkTrainer, "FLUX.2 with Self-Flow"),
        (NetworkTrainer, "NetworkTrainer is none of the trainers"),
    ],
)
def test_trainers(trainer: type, reason: str | None) -> None:
    problem = rules.trainer_problem(trainer())
    assert (problem is None) == (reason is None)
    assert reason is None or (problem is not None and reason in problem)


def test_a_configuration_is_looked_for_beside_the_data_sets() -> None:
    assert rules.folders(SimpleNamespace(dataset_config=Path("sets/hair.toml"))) == [Path(), Path("sets")]
    assert rules.folders(SimpleNamespace(dataset_config=None)) == [Path()]


def test_the_hosts_data_sets() -> None:
    class Source(list[tuple[str, str]]):
        def get_caption(self, i: int) -> tuple[str, str]:
            return self[i]

    images = SimpleNamespace(
        datasource=Source([("a/1.png", "a man")]), has_control=False, multiple_target=True, cache_directory="a",
        batch_size=2,
    )  # fmt: skip
    clips = SimpleNamespace(
        datasource=Source([("b/1.mp4", "a dog")]), has_control=True, target_frames=(1,), cache_directory=None,
        batch_size=1,
    )  # fmt: skip
    first, second = of_host(SimpleNamespace(datasets=[images, clips]))
    assert first == Dataset((Item("a/1.png", "a man"),), multiple_target=True, cache="a", batch_size=2)
    assert second == Dataset((Item("b/1.mp4", "a dog"),), "[[datasets]] 2", video=True, control=True)
