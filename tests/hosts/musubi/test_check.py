"""What `spf check` knows of musubi-tuner, held against the checkouts that there are."""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toml

from spf_plugin.tools.check.kinds import NUMBER, NUMBER_LIST, SWITCH, TEXT, TEXTS, WHOLE, Kind
from spf_plugin.tools.check.musubi import data, options
from tests.hosts.conftest import REPOSITORY
from tests.hosts.musubi import classes
from tests.hosts.musubi.conftest import CAPTIONS, Musubi

HOSTS = classes.checkouts()
SOURCES = {
    "zimage": [("zimage_train_network.py", "zimage_setup_parser")],
    "qwen_image": [
        ("qwen_image_train_network.py", "qwen_image_setup_parser"),
        ("qwen_image/qwen_image_utils.py", "add_model_version_args"),
    ],
    "flux_2": [
        ("flux_2_train_network.py", "flux2_setup_parser"),
        ("flux_2/flux2_utils.py", "add_model_version_args"),
    ],
    "krea2": [("krea2_train_network.py", "krea2_setup_parser")],
    "wan": [("wan_train_network.py", "wan_setup_parser")],
}
KINDS = {
    ("switch", False): SWITCH,
    ("str", False): TEXT,
    ("pathlib.Path", False): TEXT,
    ("int", False): WHOLE,
    ("float", False): NUMBER,
    ("_int_or_float", False): NUMBER,
    ("str", True): TEXTS,
    ("float", True): NUMBER_LIST,
}


@pytest.fixture(params=HOSTS or [None], ids=lambda folder: folder.name if folder else "none")
def source(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        pytest.skip(classes.NO_CHECKOUT)
    return Path(request.param, "src", "musubi_tuner")


def added(file: Path, function: str | None = None) -> Iterator[tuple[str, Kind, Any]]:
    """Every option that a file's code adds to a parser, with its kind and its choices."""
    tree: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    if function is not None:
        tree = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "add_argument":
            continue
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert isinstance(node.args[0], ast.Constant)
        kind = "switch" if "store_true" in said.get("action", "") else said.get("type", "str")
        choices = said.get("choices", "")
        yield (
            str(node.args[0].value).removeprefix("--"),
            KINDS[kind, "nargs" in said],
            ast.literal_eval(choices) if choices.startswith("['") else None,
        )


@pytest.mark.parametrize("arch", SOURCES)
def test_the_options_are_the_hosts(source: Path, arch: str) -> None:
    found = list(added(source / "training" / "parser_common.py"))
    for file, function in SOURCES[arch]:
        found += added(source / file, function)
    assert {name: kind.name for name, kind, _ in found} == {
        name: kind.name for name, kind in options.OF_ARCH[arch].items()
    }
    choices = {name: tuple(chosen) for name, _, chosen in found if chosen}
    assert choices == {name: chosen for name, chosen in options.CHOICES.items() if name in choices}


IMAGES = {"image_directory": "images", "caption_extension": ".txt", "resolution": [64, 48], "cache_directory": "c"}
VIDEOS = {"video_directory": "videos", "caption_extension": ".txt", "cache_directory": "c"}
SETS: list[dict[str, Any]] = [
    {"datasets": [IMAGES]},
    {"general": {"resolution": 64, "batch_size": 2}, "datasets": [IMAGES]},
    {"general": {"cache_directory": "c"}, "datasets": [IMAGES]},
    {"general": {"image_directory": "images"}, "datasets": [IMAGES]},
    {"general": [], "datasets": [IMAGES]},
    {"datasets": IMAGES},
    {"datasets": [IMAGES], "subsets": []},
    *({"datasets": [{**IMAGES, key: value}]} for key, value in [
        ("resolution", "64,48"), ("resolution", [64]), ("resolution", 64.0), ("batch_size", "1"), ("batch_size", True),
        ("num_repeats", 1.0), ("enable_bucket", 1), ("image_dir", "images"), ("control_resolution", [64, 64]),
        ("fp_1f_clean_indices", [0, 1]), ("fp_1f_clean_indices", 0), ("multiple_target", True), ("target_frames", [1]),
        ("flux_kontext_no_resize_control", True), ("no_resize_control", "true"), ("caption_extension", None),
    ] if value is not None),
    {"datasets": [VIDEOS]},
    *({"datasets": [{**VIDEOS, key: value}]} for key, value in [
        ("target_frames", [1, 25]), ("target_frames", 25), ("target_frames", ["1"]), ("source_fps", 24),
        ("source_fps", 24.0), ("max_frames", 129), ("frame_extraction", "head"), ("frame_extraction", 1),
        ("multiple_target", False),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("said", SETS, ids=lambda said: re.sub(r"\W+", "-", json.dumps(said))[-60:])
def test_what_may_stand_in_a_data_set_is_what_the_host_takes(
    said: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_utils = classes.module("dataset.config_utils")
    monkeypatch.chdir(tmp_path)
    for folder, name in (("images", "a.png"), ("videos", "a.mp4")):
        Path(folder).mkdir()
        Path(folder, name).touch()
        Path(folder, "a.txt").write_text("a man, blonde hair", encoding="utf-8")
    Path("sets.toml").write_text(toml.dumps(said), encoding="utf-8")
    generator = config_utils.BlueprintGenerator(config_utils.ConfigSanitizer())
    try:
        generator.generate(
            config_utils.load_user_config("sets.toml"), argparse.Namespace(debug_dataset=False), architecture="wan"
        )
        taken = True
    except Exception:  # voluptuous' own, and what leaks from the host where there are no names
        taken = False
    found = data.read(Path("sets.toml"), None)
    assert ("dataset-config" in [f.code for f in found.findings if f.level == "error"]) != taken, found.findings


def test_items_and_captions_are_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are hidden, without caption, in capitals, in folders; captions of several lines."""
    sources = classes.module("dataset.datasources")
    monkeypatch.chdir(tmp_path)
    Path("images", "deeper").mkdir(parents=True)
    for name in ("b.png", "a.PNG", "c.jpg", ".d.png", "e.webp", "f[1].png", "g.gif", "deeper/h.png", "i.txt.png"):
        Path("images", name).touch()
    for name, text in {
        "a": " a man,\n blonde hair \n",
        "b": "",
        "c": "x",
        ".d": "x",
        "f[1]": "y",
        "i.txt": "z",
    }.items():
        Path("images", f"{name}.txt").write_text(text, encoding="utf-8")
    told = sources.ImageDirectoryDatasource("images", ".txt")
    theirs = [told.get_caption(i) for i in range(len(told))]
    ours = data.Data()
    items = list(data._of_folder(ours, "images", ".txt", "[[datasets]] 1", video=False))
    assert [(item.path, item.caption) for item in items] == theirs
    assert len(theirs) == 5


@pytest.mark.kinds("zimage")
def test_a_run_that_can_begin_and_one_that_cannot(musubi: Musubi, tmp_path: Path) -> None:
    words = ["--dataset_config", str(musubi.data / "data.toml"), "--dit", "x", "--sdpa", "--output_dir", str(tmp_path)]
    words += ["--output_name", "x", "--network_module", "spf_plugin.lora", "--network_args"]
    ready = musubi.run("spf", ["check", f"{musubi.kind.ARCH}_train_network.py", *words, "spf_target=blonde hair"])
    assert ready.returncode == 0, ready.log
    assert "ready to train" in ready.log
    other = musubi.run("spf", ["check", f"{musubi.kind.ARCH}_train_network.py", *words, "spf_target=jacket"])
    assert other.returncode == 1
    flat = re.sub(r"\s+", " ", other.log)
    assert f"the prompts of all {len(CAPTIONS)} cached items are of another target" in flat


# -- presets ----------------------------------------------------------------------------------------------------------

PRESETS = {
    path.stem: path for path in sorted((REPOSITORY / "presets" / "musubi").glob("*.toml")) if "dataset" not in path.stem
}
ARCH_OF = {"zimage": "zimage", "qwen": "qwen_image", "flux2": "flux_2", "krea2": "krea2", "wan": "wan"}


def parser_of(source: Path, arch: str) -> tuple[Any, argparse.ArgumentParser]:
    """The host's own parser of a trainer. Only its function is run: some trainers import what is not installed here."""
    common = classes.module("training.parser_common")
    file, function = SOURCES[arch][0]
    tree = ast.parse((source / file).read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    configs = (source / "wan" / "configs" / "__init__.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {
        "argparse": argparse,
        "WAN_CONFIGS": dict.fromkeys(re.findall(r'^    "([\w.-]+)": \w+,$', configs, re.MULTILINE)),
    }
    for module in ("flux_2.flux2_utils", "qwen_image.qwen_image_utils"):
        names[module.rpartition(".")[2]] = classes.module(module)
    exec(compile(ast.Module([node], []), file, "exec"), names)
    return common, names[function](common.setup_parser_common())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_hosts_own_parser_takes(source: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common, parser = parser_of(source, ARCH_OF[name.split("-")[0]])
    monkeypatch.setattr("sys.argv", ["train.py", "--config_file", str(PRESETS[name])])
    args = vars(common.read_config_from_file(parser.parse_args(), parser))
    said = toml.loads(PRESETS[name].read_text(encoding="utf-8"))
    by_name = {action.dest: action for action in parser._actions}
    assert set(said) <= set(by_name)
    for key, value in said.items():
        action = by_name[key]
        words = [f"--{key}"] if value is True else [f"--{key}", str(value)]
        assert vars(parser.parse_args(words))[key] == value == args[key], key  # the file's types are the parser's
        assert action.choices is None or value in action.choices
    assert args["network_module"] == "spf_plugin.lora"
    assert args["sdpa"]


@pytest.mark.parametrize("name", ["dataset", "dataset-wan"])
def test_the_presets_data_sets_are_what_the_host_takes(name: str) -> None:
    config_utils = classes.module("dataset.config_utils")
    said = config_utils.load_user_config(str(REPOSITORY / "presets" / "musubi" / f"{name}.toml"))
    generator = config_utils.BlueprintGenerator(config_utils.ConfigSanitizer())
    made = generator.generate(said, argparse.Namespace(debug_dataset=False), architecture="wan")
    assert [one.is_image_dataset for one in made.dataset_group.datasets] == [True, False][: len(said["datasets"])]
