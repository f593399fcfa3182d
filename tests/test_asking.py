"""`spf check` asks sd-scripts what it makes of a data set: which copy, how the process may end, and what is said of it.

What real copies answer is held against them in `test_data_sets`. Here stand-ins take the place of their heavy modules.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spf_plugin.tools.check import asking, heard
from spf_plugin.tools.check.family import Family
from spf_plugin.tools.check.run import check
from spf_plugin.tools.cli.check import app
from tests.check_sets import Run, everything, good
from tests.hosts.conftest import LAUNCHER, NEWEST

SCRIPT = """
import argparse, sys
{line}
class NetworkTrainer:
    def assert_extra_args(self, args, group, other):
        pass
def setup_parser():
    parser = argparse.ArgumentParser()
    for name in ("config_file", "dataset_config", "dataset_class", "in_json", "train_data_dir", "reg_data_dir", "seed"):
        parser.add_argument("--" + name)
    for name in ("masked_loss", "cache_latents"):
        parser.add_argument("--" + name, action="store_true")
    return parser
"""
TRAIN_UTIL = """
def read_config_from_file(args, parser):
    return args
verify_training_args = prepare_dataset_args = lambda *args: None
"""
CONFIG_UTIL = """
from types import SimpleNamespace
class ConfigSanitizer:
    def __init__(self, *kinds):
        pass
class BlueprintGenerator:
    def __init__(self, sanitizer):
        pass
    def generate(self, config, args{more}):
        return SimpleNamespace(dataset_group=SimpleNamespace(datasets=[]))
def generate_dreambooth_subsets_config_by_subdirs(*folders):
    return []
def generate_dataset_group_by_blueprint(blueprint):
    {made}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return good(tmp_path)


def stand_in(folder: Path, line: str = "", *, made: str = "return []", more: str = ", **others") -> Path:
    """A folder with what is asked of sd-scripts, that does this when it is imported, and when it makes data sets."""
    (folder / "library").mkdir(parents=True)
    (folder / "train_network.py").write_text(SCRIPT.format(line=line), encoding="utf-8")
    (folder / "library" / "__init__.py").touch()
    (folder / "library" / "train_util.py").write_text(TRAIN_UTIL, encoding="utf-8")
    text = CONFIG_UTIL.replace("{made}", made).replace("{more}", more)
    (folder / "library" / "config_util.py").write_text(text, encoding="utf-8")
    return folder


def answer(host: Path, **options: object) -> asking.Answer:
    return asking.ask(host, Family("sd1"), **options)  # type: ignore[arg-type]


# -- which copy -------------------------------------------------------------------------------------------------------


def test_the_copy_is_found_by_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = stand_in(tmp_path / "one"), stand_in(tmp_path / "other")
    (tmp_path / "sd-scripts").mkdir()
    (tmp_path / "sd-scripts" / "train_network.py").write_text("print('another program')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place or ".", "library").exists()])
    monkeypatch.chdir(tmp_path)
    assert asking.at_hand() is None
    assert asking.at_hand(Path("sd-scripts/train_network.py")) is None
    assert asking.at_hand(Path("one/sdxl_train_network.py")) == one
    monkeypatch.chdir(one)
    assert asking.at_hand() == one
    assert asking.at_hand(Path("train_network.py")) == one
    assert asking.at_hand(other / "train_network.py") == other
    monkeypatch.chdir(tmp_path)
    sys.path.append(str(other))  # as `pip install --editable` does for sd-scripts' own requirements
    assert asking.at_hand() == other
    assert asking.at_hand(Path("one/train_network.py")) == one


# -- how it may end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import torch_that_is_not_there", "ModuleNotFoundError: No module named 'torch_that_is_not_there'"),
        ("raise RuntimeError('CUDA is too old')", "RuntimeError: CUDA is too old"),
        ("sys.exit('not today')", "SystemExit: not today"),
        ("import os; print('aborted', file=sys.stderr); os._exit(3)", "it ended with status 3: aborted"),
        ("import os; os._exit(0)", "it gave no answer"),
        ("import time; time.sleep(600)", "it was not done after 2 seconds"),
        (
            "import time; sys.stderr.write('x' * 10**6); sys.stderr.flush(); raise ValueError('y' * 10**5)",
            "yy",
        ),
    ],
)
def test_where_it_cannot_be_asked_the_model_says_it(
    line: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in line:
        monkeypatch.setattr(asking, "SECONDS", 2.0)
        monkeypatch.setattr(asking, "SECONDS_PER_IMAGE", 0.0)
    host = stand_in(run.folder / "host", line)
    report = check(run.config, {}, host=host)
    begin = f"as SPF's model of sd-scripts reads it, as sd-scripts at {host} cannot be asked: "
    assert report.read.startswith(begin)
    assert said in report.read
    assert len(report.read) < len(begin) + 1200
    assert report.images == 6
    assert not report.failed


@pytest.mark.parametrize(
    ("made", "more", "cannot", "stops"),
    [
        ("raise ValueError('nothing is right')", ", **others", "", "ValueError: nothing is right"),
        ("assert not blueprint, 'no\\nway'", ", **others", "", "AssertionError: no way"),
        ("return []", ", **others", "", "No data found. Please verify arguments"),
        # A copy that is another than those that are known: the call does not fit.
        ("return []", ", must=0, /", "TypeError", ""),
        ("return [1]", ", **others", "AttributeError", ""),
    ],
)
def test_the_hosts_words_are_told_from_calls_that_do_not_fit(
    made: str, more: str, cannot: str, stops: str, tmp_path: Path
) -> None:
    said = answer(stand_in(tmp_path / "host", made=made, more=more))
    assert said.datasets is None
    assert said.stops == stops
    assert cannot in said.cannot
    assert bool(cannot) == bool(said.cannot)


def test_python_of_the_users_own_is_not_run(tmp_path: Path) -> None:
    said = answer(stand_in(tmp_path / "host"), words={"dataset_class": "mine.Data"})
    assert said.cannot == "dataset_class is Python of its own, and not run here"


def test_bars_are_passed_on_and_prints_harm_nothing(tmp_path: Path) -> None:
    bars = (
        "for i in (1, 50, 100): print(f'read caption: {i}%|### | {1000 * i}/100000 [00:01<00:09, 9it/s]', end='\\r', "
    )
    host = stand_in(tmp_path / "host", f"{bars}file=sys.stderr)\nprint('[1, 2]')")
    seen = []
    answer(host, progress=lambda what, done, total: seen.append((what, done, total)))
    assert {what for what, _, _ in seen} == {"asking sd-scripts"}
    assert [(done, total) for _, done, total in seen[1:-1]] == [(1000, 100000), (50000, 100000), (100000, 100000)]


def test_it_is_asked_as_the_trainer_is_started(run: Run) -> None:
    """The working folder is the user's, the modules are the host's, and nothing is downloaded or written."""
    line = (
        "import json, os\n"
        "seen = [sys.argv, os.getcwd(), sys.path[0], [p for p in sys.path if p.endswith('kohya')]]\n"
        "raise RuntimeError(json.dumps([*seen, os.environ['HF_HUB_OFFLINE']]))"
    )
    host = stand_in(run.folder / "host", line)
    (run.folder / "library").mkdir()  # of the working folder, which Python does not look into
    before = everything(run.folder)
    words = {"output_config": True, "network_args": ["a=1", "b=2"], "sdpa": True, "xformers": False, "seed": 3}
    said = answer(host, config=run.config, words=words)
    given = ["train_network.py", "--config_file", str(run.config), "--network_args", "a=1", "b=2", "--sdpa", "--seed=3"]
    seen = json.loads(said.cannot.partition(": ")[2])
    assert seen == [given, str(run.folder), str(host), [], "1"]
    assert everything(run.folder) == before


# -- what becomes of the findings -------------------------------------------------------------------------------------


def test_what_the_host_takes_is_no_error(run: Run) -> None:
    """Its picture replaces ours; findings on what it would refuse are notes, those on what comes later stay."""
    run.caption(0, "")
    report = check(run.config, {})
    data = report.data
    data.add("note", "newer", "of another release")
    data.add("error", "caption-extension", "what comes later")
    subset = {"image_dir": "data/10_hair", "metadata_file": None, "num_repeats": 3, "class_tokens": "hair"}
    images = [
        ["./data/10_hair/p1.png", "./data/10_hair/p1.png", "a man, blonde hair", 3, False, 0],
        ["elsewhere/x.png", "elsewhere/x.png", "hair", 3, False, 0],
    ]
    values = {"width": 64, "height": 128, "batch_size": 2, "masked": False, "min_bucket_reso": None}
    told = {"subsets": [subset], "values": values, "images": images, "buckets": [[64, 128, 6]], "batches": 3}
    ours, read = heard.heard(data, asking.Answer(Path("/host"), [told]), whole=True)
    assert read == "as read by sd-scripts at /host"
    assert [(e.name, e.caption, e.source, e.shown) for e in ours.entries] == [
        ("10_hair/p1.png", "a man, blonde hair", "file", 3),
        ("elsewhere/x.png", "hair", "class", 3),
    ]
    (count,) = ours.counts
    assert (count.images, count.repeats, count.buckets, count.batches) == (2, 6, {(64, 128): 6}, 3)
    assert ours.datasets[0].resolution == (64, 128)
    assert ours.datasets[0].min_bucket_reso == 256  # what is not used has no value there
    assert [(f.level, f.code) for f in ours.findings] == [("note", "overruled"), ("error", "caption-extension")]
    assert ours.findings[0].message.endswith("(so SPF's model has it; sd-scripts at /host takes the data set)")


# -- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def importable(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launcher` does for runs of the tests is done in every Python that starts from here."""
    site = tmp_path_factory.mktemp("site")
    lines = (
        f"import sys\nsys.path.append({str(LAUNCHER.parent)!r})\nimport launcher\nlauncher._torchvision_importable()\n"
    )
    (site / "sitecustomize.py").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(site))


@pytest.mark.skipif(NEWEST is None, reason="NO sd-scripts CHECKOUT FOUND (see README, Tests)")
def test_a_real_copy_is_asked_and_nothing_is_written(run: Run, importable: None) -> None:
    assert NEWEST is not None
    run.set(cache_info=True, cache_latents_to_disk=True, enable_bucket=True)
    before = everything(run.folder), everything(NEWEST)
    result = CliRunner().invoke(app, [str(NEWEST / "train_network.py"), "run.toml", "--json", "--tokenizer", "none"])
    assert (everything(run.folder), everything(NEWEST)) == before
    report = json.loads(result.stdout)
    assert report["data_set"] == f"as read by sd-scripts at {NEWEST}"
    assert report["datasets"][0]["buckets"] == {"512x512": 60}
    assert report["images"] == 6
