"""Against sd-scripts itself: its options, and how it reads data sets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spf_plugin.errors import SPFError
from spf_plugin.hosts.kohya.scripts import SCRIPTS
from spf_plugin.tools.check.host_options import CHOICES, LISTS, OF_SCRIPT, OPTIONS, SDXL_ONLY, SWITCHES, TYPES
from spf_plugin.tools.check.source import parse_words
from tests.check.conftest import kept_info, look, own_subset
from tests.check_sets import MISTAKES, Run, good
from tests.hosts.conftest import HOSTS, LAUNCHER

REPOSITORY = Path(__file__).parents[2]


ASK = """
import argparse, contextlib, io, json, os, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{tests!r}, {host!r}]
import launcher
launcher.prepare(Path({host!r}))
import importlib, sdxl_train_network, train_network
from library import config_util, train_util
try:
    from library import strategy_base, strategy_sd
    strategy_base.LatentsCachingStrategy.set_strategy(
        strategy_sd.SdSdxlLatentsCachingStrategy(True, False, 1, False))
except ImportError:
    pass
parsers = [train_network.setup_parser(), sdxl_train_network.setup_parser()]
actions = {{script: {{a.dest: [a.nargs, a.option_strings, getattr(a.type, "__name__", None),
        a.choices and list(a.choices), a.default] for a in importlib.import_module(script).setup_parser()._actions}}
    for script in {scripts!r} if Path({host!r}, script + ".py").is_file()}}
from unittest.mock import MagicMock
def asked(script, **options):
    # What the trainer asks of a data set before it trains, and whether it would stop.
    module = importlib.import_module(script)
    args = module.setup_parser().parse_args([])
    vars(args).update(options)
    data = MagicMock()
    trainer = getattr(module, {trainers!r}[script])()
    groups = (data, None) if hasattr(trainer, "process_batch") else (data,)
    try:
        trainer.assert_extra_args(args, *groups)
        stops = False
    except AssertionError:
        stops = True
    return [max([call.args[0] for call in data.verify_bucket_reso_steps.call_args_list], default=0),
            [dict(call.kwargs) for call in data.is_text_encoder_output_cacheable.call_args_list], stops]
facts = {{script: [asked(script), asked(script, cache_text_encoder_outputs=True)] for script in actions}}
taken = []
given = sdxl_train_network.setup_parser()
for action in given._actions:
    action.default = argparse.SUPPRESS
with contextlib.redirect_stderr(io.StringIO()):
    for line in {lines!r}:
        try:
            taken.append(vars(given.parse_args(line)))
        except SystemExit:
            taken.append(None)
os.chdir({folder!r})
answers = []
for config in {configs!r}:
    sys.argv = ["train_network.py", "--config_file", config]
    args = train_util.read_config_from_file(parsers[0].parse_args(), parsers[0])
    train_util.prepare_dataset_args(args, True)
    if args.dataset_config:
        user = config_util.load_user_config(args.dataset_config)
    elif args.in_json:
        user = {{"datasets": [{{"subsets": [{{"image_dir": args.train_data_dir, "metadata_file": args.in_json}}]}}]}}
    else:
        user = {{"datasets": [{{"subsets": config_util.generate_dreambooth_subsets_config_by_subdirs(
            args.train_data_dir, args.reg_data_dir)}}]}}
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    try:
        tokenizer = SimpleNamespace(model_max_length=77)
        blueprint = config_util.BlueprintGenerator(sanitizer).generate(user, args, tokenizer=tokenizer)
        group = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
        group = group[0] if isinstance(group, tuple) else group
        rows = []
        for dataset in group.datasets:
            for info in dataset.image_data.values():
                subset = dataset.image_to_subset[info.image_key]
                rows.append([os.path.basename(info.absolute_path), info.num_repeats,
                             dataset.process_caption(subset, info.caption)])
        answers.append(sorted(rows))
    except BaseException as error:
        answers.append(f"{{type(error).__name__}}: {{error}}")
print("ANSWER" + json.dumps({{"actions": actions, "taken": taken, "answers": answers, "facts": facts}}, default=str))
"""
#: Command lines of every kind of option, and what argparse has special rules for.
LINES = [
    *([f"--{name}", *values.split()] for name in sorted(LISTS) for values in ("", "1", "1 2", "a=1 b=2", "-1 0.5")),
    *([f"--{name}", *values.split()] for name in ("sdpa", "seed", "output_dir") for values in ("", "1", "1 2")),
    *([f"--{name}=1"] for name in ("sdpa", "seed", "network_args", "output_dir")),
    *(line.split(" ") for line in (
        "--optimizer_args weight_decay=0.1 betas=0.9,0.99 --seed 1", "--base_weights a.safetensors b.safetensors",
        "--text_encoder_lr 1e-5", "--optimizer_args a=1 b=2 --sdpa --optimizer_args c=3",
        "--max-train-steps 7", "--max_train_s 7", "--save 7", "--resolution 512,512", "--learning_rate -1e-4",
        "--lr_warmup_steps 10%", "--lr_warmup_steps 0.1", "--lr_warmup_steps 1.5", "--lr_warmup_steps 5",
        "--learning_rate 1e-4 1e-5", "stray --sdpa", "--sdpa stray", "--seed 1 stray", "--nothing 1", "-x 1",
        "--output_name -x", "--output_name --x", "--output_name -", "--network_args -x=1", "--network_args -- x",
        "--max_token_length 75", "--max_token_length 225", "--zero_stage 4", "--seed 1.0", "--seed 0x1", "--seed 1_0",
    )),
    ["--output_name", "a b"], ["--output_name", "--a b"], ["--network_args", "spf_target=blonde hair"], [],
]  # fmt: skip


def compare_options(answer: dict[str, Any], newest: bool) -> None:
    """Every option of the host is known, with what it takes, and every line is read or refused as the host does."""
    names = {None: "switch", "Path": "str", "int_or_float": "whole_or_number"}
    known: set[str] = set()
    of_trainer = answer["actions"]
    for actions in of_trainer.values():
        for name, (nargs, spellings, kind, choices, _) in actions.items():
            if name == "help":
                continue
            known.add(name)
            assert spellings == [f"--{name}"]
            assert nargs == (0 if name in SWITCHES else "*" if name in LISTS else None) or (name, newest) == LATER, name
            if kind or not choices:  # a choice without a type is a text
                assert names.get(kind, kind) == (TYPES[name].__name__ if name in TYPES else "switch"), name
            assert set(choices or ()) - {None} <= set(CHOICES.get(name, ())), name
            assert bool(choices) == (name in CHOICES), name
    latest = "train_inpainting" in known
    assert known == OPTIONS if latest else known < OPTIONS  # v0.11 has them all
    assert set(of_trainer["sdxl_train_network"]) - set(of_trainer["train_network"]) == set(SDXL_ONLY)
    for script in SCRIPTS:
        mine = set(of_trainer.get(script.name, ())) - {"help"}
        assert mine == OF_SCRIPT[script.name] if latest else mine <= OF_SCRIPT[script.name], script.name
        if mine:
            (steps, _, stops), (_, cacheable, stops_cached) = answer["facts"][script.name]
            assert (steps, stops) in ((script.bucket_steps, False), (64, newest)), script.name  # v0.9.1: 64 for SDXL
            assert cacheable in ([{"cache_supports_dropout": True}] if script.drops_cached else [{}], []), script.name
            # HunyuanImage does not stop for it, and trains no text encoder
            cached = script.name == "hunyuan_image_train_network" or script.name == "train_network"
            assert stops_cached != script.trains_cached or cached, script.name
        option, default = script.text
        if mine and script.is_dit and option:  # what is None there is the default of a tokenize strategy
            assert of_trainer[script.name][option][-1] in (default, None)
    for line, theirs in zip(LINES, answer["taken"], strict=True):
        try:
            ours = parse_words(line)
        except SPFError:
            ours = None
        assert ours == theirs or (line[:1], newest) == ([f"--{LATER[0]}"], LATER[1]), line


LATER = ("text_encoder_lr", False)  # one value in v0.9.1


@pytest.mark.skipif(not HOSTS, reason="NO sd-scripts CHECKOUT FOUND (see README, Tests)")
@pytest.mark.parametrize("host", HOSTS, ids=lambda p: p.name)
def test_the_host_reads_the_same(tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same configs through the host's own code: the same images, repeats and captions, or a refusal of both."""
    names = {
        "target-missing",
        "dataset-config",
        "class-caption",
        "more-lines",
        "bom",
        "caption-extension",
        "no-repeats",
    }
    names |= {"image-missing", "folder-without-repeats", "empty-caption-file", "not-utf8", "loose-images"}
    runs = []
    more: list[tuple[str, str, Callable[[Run], object]]] = [
        ("good", "", lambda r: None),
        ("kept", "", lambda r: (r.dataset(own_subset(cache_info=True)), kept_info(r))),
    ]
    for i, (code, _, spoil) in enumerate([*more, *MISTAKES]):
        if code in names | {"good", "kept"}:
            monkeypatch.chdir(tmp_path)
            run = good(tmp_path / f"{i:02d}-{code}")
            monkeypatch.chdir(run.folder)
            spoil(run)
            text = run.config.read_text(encoding="utf-8")  # one working folder for all: absolute names
            text = text.replace('"data"', json.dumps(str(run.folder / "data"))).replace(
                '"dataset.toml"', json.dumps(str(run.folder / "dataset.toml"))
            )
            run.config.write_text(
                text.replace('"meta.json"', json.dumps(str(run.folder / "meta.json"))), encoding="utf-8"
            )
            if (run.folder / "dataset.toml").exists():
                dataset = (run.folder / "dataset.toml").read_text(encoding="utf-8")
                run.dataset(dataset.replace('"data/', f'"{(run.folder / "data").as_posix()}/'))
                run.set(dataset_config=str(run.folder / "dataset.toml"))
            runs.append(run)
    code = ASK.format(
        tests=str(LAUNCHER.parent),
        host=str(host),
        folder=str(tmp_path),
        configs=[str(r.config) for r in runs],
        lines=LINES,
        scripts=[script.name for script in SCRIPTS],
        trainers={script.name: script.trainer for script in SCRIPTS},
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    answer = json.loads(done.stdout.split("ANSWER")[1])
    compare_options(answer, "def process_batch" in (host / "train_network.py").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    for run, theirs in zip(runs, answer["answers"], strict=True):
        report = look(run)
        if isinstance(theirs, str):
            assert report.failed, f"{run.folder.name}: the host says {theirs}"
            continue
        ours = [[e.path.name, e.subset.num_repeats, e.prompts[0]] for e in report.data.entries]
        assert sorted(ours) == theirs or run.folder.name.endswith("image-missing"), run.folder.name


def test_a_check_loads_no_terminal_packages_and_no_torch() -> None:
    code = (
        "import sys\n"
        "import spf_plugin.tools.check.run\n"
        "assert not {'typer', 'rich', 'transformers', 'diffusers', 'PIL', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
