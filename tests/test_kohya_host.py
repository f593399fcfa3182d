"""What the kohya host decides without a checkout: which trainers it takes, and how it reads a data set."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml
import torch

from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.hosts.frames import local_variables, raw_network_args, training_frame
from spf_plugin.hosts.kohya.captions import prompts
from spf_plugin.hosts.kohya.images import dropped_targets
from spf_plugin.hosts.kohya.loop import KohyaHost
from spf_plugin.hosts.kohya.rules import trainer_problem
from spf_plugin.hosts.kohya.text import TextEncoding
from spf_plugin.hosts.looking import name_problems, repeated, unwritable
from spf_plugin.lora import create_network
from spf_plugin.pairs import State
from tests.check_sets import everything


class Monolithic:
    def call_unet(self) -> None: ...


class Processing(Monolithic):
    is_sdxl = True

    def get_noise_pred_and_target(self) -> None: ...

    def process_batch(self) -> None: ...

    def call_unet(self) -> None: ...


class SdxlNetworkTrainer(Processing):
    def call_unet(self) -> None: ...


class OtherNetworkTrainer(Processing):
    def get_noise_pred_and_target(self) -> None: ...


class ThirdFamily:
    def call_unet(self) -> None: ...

    def get_noise_pred_and_target(self) -> None: ...


@pytest.mark.parametrize("trainer", [Monolithic, Processing, SdxlNetworkTrainer])
def test_supported_trainers(trainer: type) -> None:
    assert trainer_problem(trainer()) is None


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (
            OtherNetworkTrainer,
            "OtherNetworkTrainer is not supported: its model is neither a UNet nor a transformer that",
        ),
        (ThirdFamily, "ThirdFamily belongs to a 2024 development branch"),
        (object, "object has no call_unet"),
    ],
)
def test_refused_trainers_are_named(trainer: type, reason: str) -> None:
    problem = trainer_problem(trainer())
    assert problem is not None
    assert reason in problem


def test_no_trainer_at_all() -> None:
    assert training_frame() is None
    with pytest.raises(SPFError, match="no sd-scripts trainer is calling"):
        create_network(1.0, 4, 4, None, None, None, spf_target="x")  # type: ignore[arg-type]


def test_arguments_are_found_in_the_callers_frame() -> None:
    args = SimpleNamespace(network_module="spf_plugin.lora", network_args=["spf_target=a", "b"])  # noqa: F841
    assert raw_network_args() == ["spf_target=a", "b"]


# -- the variables of the host's functions ----------------------------------------------------------------------------


class Loop(Monolithic):
    """The host's training function in small: what it holds for a whole run, and what for a step."""

    def train(self, args: Any, in_step: Callable[[], object]) -> list[bool]:
        """Per step, whether somebody still holds its tensors when it is over."""
        train_dataset_group, train_dataloader = SimpleNamespace(datasets=[]), range(9)
        noise_scheduler = SimpleNamespace(alphas_cumprod=torch.ones(3))
        accelerator = SimpleNamespace(register_save_state_pre_hook=None, num_processes=1)
        progress_bar = SimpleNamespace(set_postfix=lambda **values: None)
        held = []
        for step in range(3):
            noise_pred = torch.ones(3, requires_grad=True) * step
            seen = weakref.ref(noise_pred)
            in_step()
            # Nothing was written back.
            assert (step, seen(), args.network_module) == (len(held), noise_pred, "spf_plugin.lora")
            assert None not in (train_dataset_group, train_dataloader, noise_scheduler, accelerator, progress_bar)
            del noise_pred
            held.append(seen() is not None)
        return held


ARGS = SimpleNamespace(
    network_module="spf_plugin.lora",
    network_args=[],
    initial_step=None,
    initial_epoch=2,
    gradient_accumulation_steps=1,
    v_parameterization=False,
)
#: Everything that is looked for among the callers.
LOOKS: dict[str, Callable[[], object]] = {
    "raw_network_args": raw_network_args,
    "find": lambda: KohyaHost.find([]),
    "first_step": lambda: KohyaHost.find([]).first_step,
    "noise_schedule": lambda: KohyaHost.find([]).noise_schedule,
    "report": lambda: KohyaHost.find([]).report({"a": 1.0}),
}


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or a coverage keeps what a frame held")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_the_hosts_variables_keeps_no_tensor_of_the_step(look: Callable[[], object]) -> None:
    assert Loop().train(ARGS, look) == [False, False, False]


@pytest.mark.parametrize("install", [sys.settrace, sys.setprofile])
def test_a_debugger_or_profiler_that_looks_on_loses_nothing(install: Any) -> None:
    """It writes a frame's dictionary back, and an emptied one would unset every variable."""

    def watching(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code is Loop.train.__code__:
            raw_network_args()
        return watching

    before = sys.gettrace() if install is sys.settrace else sys.getprofile()
    install(watching)
    try:
        Loop().train(ARGS, raw_network_args)
    finally:
        install(before)


def test_a_dictionary_that_somebody_holds_is_left_alone() -> None:
    def caller(value: str) -> None:
        held = locals()
        assert local_variables(sys._getframe(), "value") == {"value": "a"}
        assert held["value"] == value

    caller("a")


def test_the_variables_of_a_class_body_are_its_own() -> None:
    args = 1

    class Body:
        given = args
        found = local_variables(sys._getframe(), "args")

    assert (Body.given, Body.found) == (1, {})


# -- a data set, and what would stop a run ----------------------------------------------------------------------------


def host(images: dict[str, tuple[str, Any]], **options: Any) -> KohyaHost:
    """A host over a data set of `key: (caption, subset)`."""
    defaults = {
        "network_train_text_encoder_only": False,
        "save_model_as": "safetensors",
        "train_data_dir": None,
        "dataset_config": None,
        "seed": 1,
    }
    data = SimpleNamespace(
        image_data={key: SimpleNamespace(caption=caption, is_reg=False) for key, (caption, _) in images.items()},
        image_to_subset={key: subset for key, (_, subset) in images.items()},
    )
    names = {
        "self": Processing(),
        "args": SimpleNamespace(**{**defaults, **options}),
        "train_dataset_group": SimpleNamespace(datasets=[data]),
    }
    return KohyaHost(names, [])


def subset(prefix: str | None = None, suffix: str | None = None, target: str | None = None) -> SimpleNamespace:
    attributes = {"spf_target": target} if target else {}
    return SimpleNamespace(caption_prefix=prefix, caption_suffix=suffix, custom_attributes=attributes)


def test_options_that_are_refused_by_name() -> None:
    for option in ("torch_compile", "cpu_offload_checkpointing", "train_inpainting"):
        with_it, without = (
            host({"a": ("a woman, blonde hair", None)}, **{option: on}).problems(parse({"spf_target": "blonde hair"}))
            for on in (True, False)
        )
        assert [problem.split()[0].rstrip(":") for problem in with_it] == [f"--{option}"]
        assert without == []


def test_an_output_folder_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    os.symlink(tmp_path / "gone", tmp_path / "link")
    folders = {"": None, "a/new/one": None, "file/in": "Not a directory", "link/in": "Not a directory"}
    folders |= {"file": "Not a directory", "a" * 300: "File name too long", "new/" + "a" * 300: "File name too long"}
    before = sorted(everything(tmp_path))
    for folder, reason in folders.items():
        assert unwritable(tmp_path / folder, trying=True) == reason, folder
    assert sorted(everything(tmp_path)) == before
    before_looking = everything(tmp_path)
    for folder, reason in folders.items():
        assert unwritable(tmp_path / folder, trying=False) == reason or folder.startswith("new/"), folder
    assert everything(tmp_path) == before_looking


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (["--network_args", "spf_target=hat", "--network_args", "conv_dim=4"], 2),
        (["--network_args=spf_target=hat", "--seed", "1", "--network_arg", "conv_dim=4"], 2),  # the host takes both
        (["--network_args", "spf_target=hat", "conv_dim=4", "--network_alpha", "4"], 0),
        (["--network_alpha", "4", "--network_alpha", "8"], 0),
    ],
)
def test_network_args_that_the_host_does_not_read(words: list[str], times: int) -> None:
    problems = repeated(words, "sd-scripts")
    assert [re.findall(r"given (\d+) times", problem) for problem in problems] == [[str(times)]] * bool(times)


@pytest.mark.parametrize(
    ("name", "windows", "reason"),
    [
        ("", False, "is empty"),
        ("hair/", False, "is empty"),
        ("höhe 髪", False, None),
        ("portraits/hair", False, "is in a folder 'portraits' that is not there"),
        ("there/hair", False, None),
        ("ha\0ir", False, "no file can have '\\x00' in its name"),
        ("hair: first\n", False, None),
        ("hair: first", True, "no file can have ':' in its name"),
        ("hair\n", True, "no file can have '\\n' in its name"),
        ("hair v1.2 (new)", True, None),
        ("there\\hair", False, None),  # a backslash is a letter here
        ("portraits\\hair", True, "is in a folder 'portraits' that is not there"),
        ("NUL", True, "NUL is a device on Windows"),
        ("nul", False, None),
        ("com1.v2", True, "COM1 is a device on Windows"),
        ("lpt\u00b9", True, "LPT\u00b9 is a device on Windows"),
        ("console", True, None),
        ("a: first", True, "no file can have ':' in its name"),
        ("髪" * 100, False, "makes file names of"),
        ("髪" * 60, True, None),
    ],
)
def test_names_under_which_nothing_could_be_saved(tmp_path: Path, name: str, windows: bool, reason: str | None) -> None:
    (tmp_path / "there").mkdir()
    problems = name_problems(SimpleNamespace(output_dir=str(tmp_path), output_name=name), "sd-scripts", windows=windows)
    assert bool(problems) == bool(reason)
    assert reason is None or reason in problems[0]


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is made up."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert unwritable(tmp_path / "a" / "b", trying=False) == "Permission denied"
    (tmp_path / "a").mkdir()
    assert unwritable(tmp_path / "a" / "b", trying=False) is None


@pytest.mark.parametrize(("gpu", "encoders", "expected"), [("cuda", "cpu", 4), ("cpu", "cpu", 1), ("cuda", "cuda", 1)])
def test_text_encoders_that_stay_on_the_cpu_beside_a_gpu_get_more_threads(
    monkeypatch: pytest.MonkeyPatch, gpu: str, encoders: str, expected: int
) -> None:
    seen: list[int] = []

    def encode(prompts: list[str]) -> str:
        seen.append(torch.get_num_threads())
        if not prompts:
            raise RuntimeError
        return "conds"

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        accelerator = SimpleNamespace(device=torch.device(gpu), num_processes=2)
        encoder, args = SimpleNamespace(device=torch.device(encoders)), SimpleNamespace(weighted_captions=False)
        found = TextEncoding(Monolithic(), args, accelerator, [encoder], None, None)
        monkeypatch.setattr("os.cpu_count", lambda: 16)
        monkeypatch.setattr(found, "_encode_old", encode)
        assert found.encode(["a"]) == {"hidden": "conds"}
        with pytest.raises(RuntimeError):
            found.encode([])
        assert seen == [expected, expected]
        assert torch.get_num_threads() == 1  # put back, also after an exception
    finally:
        torch.set_num_threads(before)


def test_caption_prefix_and_wildcard_lists_count() -> None:
    config = parse({"spf_target": "blonde hair"})
    assert host({"a": ("a woman", subset(suffix="blonde hair"))}).problems(config) == []
    assert host({"a": (["a woman", "a woman, blonde hair"], subset())}).problems(config) == []  # type: ignore[dict-item]


def test_wildcards_count_as_the_host_may_draw_them() -> None:
    either = SimpleNamespace(enable_wildcard=True, caption_prefix=None, caption_suffix=None)
    assert host({"a": ("a woman, {blonde|golden} hair", either)}).problems(parse({"spf_target": "golden hair"})) == []


CHOICES = "{" + "|".join("abcdefgh") + "}"


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        # 512 products, of which the first 32 end in a or b
        (f"{CHOICES}, {CHOICES}, a {CHOICES[:-1]}|golden}} hair", 9),
        (f"{CHOICES} {CHOICES} {CHOICES[:-1]}|golden hair}}", 200),
        ("\n".join([f"a man, {CHOICES}"] * 9 + ["a woman, golden hair"]), 10),
        (
            f"a woman with {{blonde|golden}} {{hair|wig}} and {CHOICES} {CHOICES} {CHOICES}".replace(
                "hair|wig", "wig|hair"
            ),
            300,
        ),
        ("{{a|b}} {golden hair|c}", 3),
        ("a woman, {" + "|".join(map(str, range(3000))) + "|golden hair}", 3001),
    ],
)
def test_every_choice_and_line_is_looked_at_and_no_products(caption: str, count: int) -> None:
    either = SimpleNamespace(enable_wildcard=True)
    found = prompts(caption, either)
    assert len(found) <= count
    assert any("golden hair" in text for text in found)
    images = {"a": (caption, either), "b": ("a dog", either)}
    assert host(images).problems(parse({"spf_target": "golden hair"})) == []


def test_braces_are_read_as_the_host_reads_them() -> None:
    """Its own two steps, with all first and all second choices."""

    def theirs(choice: int) -> str:
        text = caption.replace("{{", "\x01").replace("}}", "\x02")
        text = re.sub(r"\{([^}]+)\}", lambda m: (m[1].split("|") * 2)[choice], text)
        return text.replace("\x01", "{").replace("\x02", "}")

    for caption in ("{{x}} {a|b{c} d", "{a|b}, {e|f, g}{{, {h}", "{{{a|b}}}", "a } b {", "{}{a|b}"):
        found = prompts(caption, SimpleNamespace(enable_wildcard=True))
        assert {theirs(0), theirs(1)} == set(found), caption


def test_captions_are_counted_and_not_their_choices(caplog: pytest.LogCaptureFixture) -> None:
    either = SimpleNamespace(enable_wildcard=True)
    images = {"a": ("{a|b|c} man", either), "b": ("{a|b|c} woman, hat", either)}
    with caplog.at_level(logging.WARNING):
        assert host(images).problems(parse({"spf_target": "hat"})) == []
    assert "1 of 2 captions do not contain the target" in caplog.text


def test_masks_hide_no_subset(caplog: pytest.LogCaptureFixture) -> None:
    """With conditioning_data_dir the subsets are those of another data set inside."""
    images = {"a": ("a woman", subset(suffix="blonde hair"))}
    found = host(images)
    data = found._dataset.datasets[0]
    data.dreambooth_dataset_delegate = SimpleNamespace(image_to_subset=data.image_to_subset)
    del data.image_to_subset
    assert found.problems(parse({"spf_target": "blonde hair"})) == []
    found.args.cache_text_encoder_outputs = True
    (problem,) = found.problems(parse({"spf_target": "blonde hair"}))
    assert "caption_prefix and caption_suffix do nothing" in problem


@pytest.mark.parametrize("as_the_host_has_it", [str, Path])
def test_targets_that_masks_drop(tmp_path: Path, as_the_host_has_it: Callable[[str], Any]) -> None:
    own = {"image_dir": "a", "custom_attributes": {"spf_target": "hat"}}
    masked = {**own, "conditioning_data_dir": "m"}
    files = {
        "plain.toml": toml.dumps({"datasets": [{"subsets": [own]}]}),
        "masked.toml": toml.dumps({"datasets": [{"subsets": [masked]}]}),
        "masked.json": json.dumps({"datasets": [{"subsets": [masked]}]}),
        "wrong.toml": "datasets = 3",
        "broken.toml": "[[",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        found = dropped_targets(SimpleNamespace(dataset_config=as_the_host_has_it(str(path))))
        assert found == (["hat"] if name.startswith("masked") else []), name


def test_some_captions_that_are_cut_or_bare_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    long = "a man" + ", a tree" * 80
    images = {"a": (f"{long}, hat", None), "b": ("hat", None), "c": ("a man, hat", None)}
    found = host(images)
    found._text._tokenizers = lambda text, **_: SimpleNamespace(input_ids=text.replace(",", " ,").split())
    found.args.weighted_captions = False
    found.trainer = found._text.trainer = Monolithic()
    with caplog.at_level(logging.WARNING):
        assert found.problems(parse({"spf_target": "hat"})) == []
    assert "in 1 of 3 captions the target lies behind token 75 and is cut off" in caplog.text
    assert "1 of 3 captions say nothing but the target" in caplog.text


def test_a_prefix_that_cached_text_leaves_out(tmp_path: Path) -> None:
    config = parse({"spf_target": "blonde hair"})
    images = {"a": ("a woman, blonde hair", subset(prefix="a photo of"))}
    assert host(images).problems(config) == []
    cached = host(images, cache_text_encoder_outputs=True)
    (problem,) = cached.problems(config)
    assert "caption_prefix and caption_suffix do nothing together with --cache_text_encoder_outputs" in problem
    cached.trainer = Monolithic()  # of SD1.x: the option came from a file, and its script has none
    assert cached.problems(config) == []


def test_text_that_was_cached_before_the_caption_changed(tmp_path: Path) -> None:
    config, options = parse({"spf_target": "blonde hair"}), {"cache_text_encoder_outputs": True}
    own = subset()
    own.caption_extension = ".txt"
    with_it = host({"a": ("a woman, blonde hair", own)}, cache_text_encoder_outputs_to_disk=True, **options)
    without = host({"a": ("a woman, blonde hair", own)}, **options)
    for found in (with_it, without):
        found._dataset.datasets[0].image_data["a"].absolute_path = str(tmp_path / "a.b.png")
    assert with_it.problems(config) == []
    caption, cache = tmp_path / "a.b.txt", tmp_path / "a.b_te_outputs.npz"
    for path in (caption, cache):
        path.write_bytes(b"")
        os.utime(path, (1000, 1000))
    assert with_it.problems(config) == []
    os.utime(caption, (1001, 1001))
    (problem,) = with_it.problems(config)
    assert "1 captions were changed after their encoding was cached" in problem
    assert "Delete the *_te_outputs.npz files" in problem
    assert without.problems(config) == []  # then the host does not read the file


def test_where_the_user_lets_the_loop_begin() -> None:
    assert host({}).first_step is None
    assert host({}, initial_step=7, initial_epoch=3).first_step == 7
    found = host({}, initial_step=None, initial_epoch=3, gradient_accumulation_steps=2)
    found.accelerator = SimpleNamespace(num_processes=2)
    with pytest.raises(SPFError, match="train_dataloader"):
        _ = found.first_step
    train_dataloader = range(9)  # noqa: F841  found in this frame
    assert found.first_step == 2 * 3  # two epochs of ceil(9 / 4) steps


def test_targets_of_subsets() -> None:
    images = {"a": ("a woman, hat", subset(target="hat")), "b": ("a man, scarf", subset(target="scarf"))}
    assert host(images).problems(parse({})) == []
    wrong = {"a": ("a woman", subset(target="hat"))}
    (problem,) = host(wrong).problems(parse({}))
    assert "occurs in none of the 1 captions" in problem
    (problem,) = host({"a": ("a woman", subset(target="hat->"))}).problems(parse({}))
    assert "custom_attributes.spf_target" in problem


def test_an_unused_target_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert host({"a": ("a woman, hat", subset())}).problems(parse({"spf_target": "hat|scraf"})) == []
    assert "no caption contains 'scraf'" in caplog.text


def test_empty_captions_point_to_the_extension() -> None:
    (problem,) = host({"a": ("", subset())}).problems(parse({"spf_target": "hat"}))
    assert "--caption_extension" in problem


def saving_host() -> tuple[KohyaHost, dict[str, Callable[..., None]]]:
    """A host, and what it registers for saving and loading a state."""
    hooks: dict[str, Callable[..., None]] = {}
    accelerator = SimpleNamespace(
        is_main_process=True,
        register_save_state_pre_hook=lambda hook: hooks.update(save=hook),
        register_load_state_pre_hook=lambda hook: hooks.update(load=hook),
    )
    names = {"self": None, "args": None, "train_dataset_group": None, "accelerator": accelerator}
    return KohyaHost(names, []), hooks


def test_a_state_that_was_not_written_to_its_end_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, loaded = State({"step": 1, "pair": {"loss": 1.0}}, {"eps_ref": torch.ones(2)}), list[State]()
    saving, hooks = saving_host()
    saving.on_save_state(lambda: now, loaded.append)
    hooks["save"](None, None, str(tmp_path))
    now = State({"step": 2, "pair": {"loss": 2.0}}, {"eps_ref": torch.zeros(2)})

    def cut_off(_: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as full:
        full.setattr("safetensors.torch.save_file", cut_off)
        saving.on_save_state(lambda: now, loaded.append)
        with pytest.raises(OSError, match="No space"):
            hooks["save"](None, None, str(tmp_path))
    hooks["load"](None, str(tmp_path))
    assert loaded[0].values == {"step": 1, "pair": {"loss": 1.0}}
    assert loaded[0].tensors["eps_ref"].tolist() == [1, 1]
    saving.on_save_state(lambda: State({"step": 3}), loaded.append)
    hooks["save"](None, None, str(tmp_path))
    hooks["load"](None, str(tmp_path))
    assert loaded[1] == State({"step": 3})  # without the pair that is left there


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"step": 1, "pair": {"loss": 1}}'])
def test_a_damaged_state_is_said(tmp_path: Path, content: str) -> None:
    host, hooks = saving_host()
    host.on_save_state(lambda: State({}), lambda state: state.values["step"])
    (tmp_path / "spf_state.json").write_text(content, encoding="utf-8")
    (tmp_path / "spf_pair.safetensors").write_bytes(b"half")
    with pytest.raises(SPFError, match=r"spf_state\.json is damaged .* Delete it"):
        hooks["load"](None, str(tmp_path))
