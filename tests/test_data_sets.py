"""`spf check`'s picture of a data set is the host's: what it refuses, each image, repeat, caption, bucket and batch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toml
from PIL import Image

from spf_plugin.errors import SPFError
from spf_plugin.hosts.kohya.scripts import script_of
from spf_plugin.tools.check import heard
from spf_plugin.tools.check.asking import Answer
from spf_plugin.tools.check.dataset import Data
from spf_plugin.tools.check.run import Report, check
from tests.asked import Asked
from tests.check_sets import Run, everything, good
from tests.data_sets import COUNT, DataSet, Maker
from tests.hosts.conftest import HOSTS, LAUNCHER

REPOSITORY = Path(__file__).parents[1]
#: Errors of what the host prepares and then fails at, or trains otherwise than asked for; and of what only SPF needs.
LATER = heard.LATER | {"stops", "unreadable"}

ASK = """
import inspect, json, logging, os, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{tests!r}, {host!r}]
import launcher
launcher.prepare(Path({host!r}))
import sdxl_train_network, train_network
from library import config_util, train_util
logging.disable(logging.CRITICAL)
try:
    from library import strategy_base, strategy_sd
    strategy_base.LatentsCachingStrategy.set_strategy(
        strategy_sd.SdSdxlLatentsCachingStrategy(True, False, 1, False))
except ImportError:
    pass
scripts = [train_network, sdxl_train_network]
trainers = [train_network.NetworkTrainer(), sdxl_train_network.SdxlNetworkTrainer()]
parsers = [script.setup_parser() for script in scripts]

def prepared(config, sdxl):
    "As the trainers' train() does, up to where models are loaded."
    sys.argv = ["train_network.py", "--config_file", config]
    args = train_util.read_config_from_file(parsers[sdxl].parse_args(), parsers[sdxl])
    train_util.verify_training_args(args)
    train_util.prepare_dataset_args(args, True)
    sanitizer = config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    if args.dataset_config is not None:
        user = config_util.load_user_config(args.dataset_config)
    elif args.in_json is None:
        user = {{"datasets": [{{"subsets": config_util.generate_dreambooth_subsets_config_by_subdirs(
            args.train_data_dir, args.reg_data_dir)}}]}}
    else:
        user = {{"datasets": [{{"subsets": [{{"image_dir": args.train_data_dir, "metadata_file": args.in_json}}]}}]}}
    tokenizer = SimpleNamespace(model_max_length=77)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(user, args, tokenizer=tokenizer)
    group = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    group = group[0] if isinstance(group, tuple) else group
    if len(group) == 0:
        raise ValueError("No data found")
    if args.cache_latents:
        assert group.is_latent_cacheable(), "when caching latents"
    extra = trainers[sdxl].assert_extra_args
    extra(args, group, None) if len(inspect.signature(extra).parameters) == 3 else extra(args, group)
    found = []
    for dataset in group.datasets:
        dataset = getattr(dataset, "dreambooth_dataset_delegate", dataset)
        rows = [[os.path.basename(info.absolute_path), info.num_repeats, info.is_reg, info.caption]
                for info in dataset.image_data.values()]
        buckets = {{"%dx%d" % tuple(size): len(bucket) for size, bucket in
                   zip(dataset.bucket_manager.resos, dataset.bucket_manager.buckets) if bucket}}
        found.append({{"rows": sorted(rows), "buckets": buckets, "batches": len(dataset)}})
    return found

answers = []
for config, sdxl in {runs!r}:
    try:
        answers.append(prepared(config, sdxl))
    except BaseException as error:
        answers.append(f"{{type(error).__name__}}: {{error}}")

sys.path.append({repository!r})
from spf_plugin.hosts.kohya import preparing
told = []
logging.disable(logging.NOTSET)
for request in {requests!r}:
    os.chdir(request.get("folder", {folder!r}))
    try:
        strategy_base.LatentsCachingStrategy._strategy = None  # a process of its own would have none
    except NameError:
        pass
    told.append(preparing.answer(request))
print("ANSWER" + json.dumps([answers, told]))
"""


def ask(host: Path, runs: list[DataSet], requests: list[Any], folder: Path) -> tuple[list[Any], list[Any]]:
    """What the host makes of each: its data sets, or why it stops; and what it is told to say by `preparing`."""
    code = ASK.format(
        tests=str(LAUNCHER.parent),
        host=str(host),
        runs=[[str(run.config), run.sdxl] for run in runs],
        repository=str(REPOSITORY),
        requests=requests,
        folder=str(folder),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    answers, told = json.loads(done.stdout.split("ANSWER")[1])
    return answers, told


def picture(data: Data) -> list[dict[str, Any]]:
    """Ours, in the words of `ask`."""
    out = []
    left = list(data.entries)
    for dataset, count in zip(data.datasets, data.counts, strict=True):
        mine = {id(subset) for subset in dataset.subsets}
        rows = sorted([e.path.name, e.shown, e.subset.is_reg, e.caption] for e in left if id(e.subset) in mine)
        buckets = None if count.buckets is None else {f"{w}x{h}": n for (w, h), n in count.buckets.items()}
        out.append({"rows": rows, "buckets": buckets, "batches": count.batches, "count": count})
    return out


def disagreement(report: Report, theirs: Any) -> str:
    """In what the check and the host differ; empty where they agree."""
    errors = [f for f in report.findings if f.level == "error"]
    if isinstance(theirs, str):
        depends = [f for f in report.findings if f.code == "newer"]
        return "" if errors or depends else f"the host refuses, and nothing is said: {theirs}"
    strict = [f for f in errors if f.code not in LATER]
    if strict:
        return f"refused, and the host takes it: {strict[0]}"
    for ours, host in zip(picture(report.data), theirs, strict=True):
        count = ours.pop("count")
        if sum(row[1] for row in host["rows"] if not row[2]) != count.repeats:
            return f"repeats: {count}, {host}"
        if ours["buckets"] is None:  # which images validation_split takes is drawn, and a broken image has no size
            continue
        if any("enable_wildcard loses" in f.message for f in report.findings):
            for row in (*ours["rows"], *host["rows"]):
                row[3] = ""
        if ours != host:
            return f"{ours}\n{host}"
    return ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[DataSet, Report]]:
    maker = Maker(tmp_path_factory.mktemp("sets"))
    made = [maker.make(number) for number in range(COUNT)]
    return [(run, check(run.config, {}, tokenizer=maker.root / "none")) for run in made]


def request_of(run: DataSet) -> dict[str, Any]:
    script = script_of("sdxl" if run.sdxl else "sd1")
    words = ["--config_file", str(run.config)]
    return {"script": script.name, "trainer": script.trainer, "words": words, "certain": True}


def difference(report: Report, theirs: Any, told: dict[str, Any]) -> str:
    """In what the data set that `spf check` shows differs from the host's, where it has asked; empty where nothing."""
    answer = Answer(Path("sd-scripts"), told.get("datasets"), told.get("stops", ""), told.get("cannot", ""))
    data = replace(report.data, findings=list(report.data.findings))
    data, read = heard.heard(data, answer, whole=True)
    errors = [finding for finding in data.findings if finding.level == "error" and finding.code not in LATER]
    if isinstance(theirs, str):
        own = theirs.partition(": ")[2]
        said = errors[0].message if errors else ""
        return "" if theirs.startswith("SystemExit") or own in said else f"{theirs}, and not: {said}"
    if read != "as read by sd-scripts at sd-scripts" or errors:
        return f"{read}: {errors}"
    ours = [{**rows, "count": None} for rows in picture(data)]
    return "" if ours == [{**rows, "count": None} for rows in theirs] else f"{ours}\n{theirs}"


@pytest.mark.skipif(not HOSTS, reason="NO sd-scripts CHECKOUT FOUND (see README, Tests)")
@pytest.mark.parametrize("host", HOSTS, ids=lambda p: p.name)
def test_the_host_makes_the_same_of_it(
    host: Path, runs: list[tuple[DataSet, Report]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPF's model of it; what `spf check` shows where it asks the host; and the faults that it tells in its words."""
    asked = Asked(host, tmp_path / "asked", monkeypatch)
    half = runs[::2]
    pool = runs[0][0].config.parent
    before = everything(pool), everything(asked.folder)
    answers, told = ask(
        host, [run for run, _ in runs], [*(request_of(run) for run, _ in half), *asked.requests], tmp_path
    )
    assert (everything(pool), everything(asked.folder)) == before
    taken = [answer for answer in answers if not isinstance(answer, str)]
    assert COUNT / 5 < len(taken) < 4 * COUNT / 5  # both sides are seen
    wrong = {
        run.config.name: said
        for (run, report), answer, one in zip(half, answers[::2], told[: len(half)], strict=True)
        if (said := difference(report, answer, one))
    }
    assert not wrong, f"{len(wrong)} of {len(half)}:\n" + "\n".join(f"{k}: {v}" for k, v in wrong.items())
    wrong = {
        run.config.name: said
        for (run, report), answer in zip(runs, answers, strict=True)
        if (said := disagreement(report, answer))
    }
    assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n".join(f"{k}: {v}" for k, v in wrong.items())
    asked.hear(told[len(half) :])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return good(tmp_path)


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.level != "note"}


def test_the_json_of_a_data_set_is_read_as_its_toml(run: Run) -> None:
    content = {
        "datasets": [{"resolution": 512, "subsets": [{"image_dir": "data/10_hair", "caption_extension": ".txt"}]}]
    }
    reports = []
    for name, text in (("set.toml", toml.dumps(content)), ("set.json", json.dumps(content))):
        (run.folder / name).write_text(text, encoding="utf-8")
        reports.append(check(run.folder / name, {}, target="blonde hair", tokenizer=run.folder / "none"))
    assert not any(codes(report) for report in reports)
    assert reports[0].as_json() == reports[1].as_json()
    assert reports[0].images == 6


def test_one_folder_in_two_resolutions_is_no_duplicate(run: Run) -> None:
    subset = {"image_dir": "data/10_hair", "caption_extension": ".txt", "num_repeats": 2}
    run.dataset(toml.dumps({"datasets": [{"resolution": size, "subsets": [subset]} for size in (512, 768)]}))
    report = check(run.config, {}, tokenizer=run.folder / "none")
    assert not codes(report)
    assert [count.buckets for count in report.data.counts] == [{(512, 512): 12}, {(768, 768): 12}]


@pytest.mark.parametrize("preset", sorted((REPOSITORY / "presets" / "guis").iterdir()), ids=lambda path: path.name)
def test_our_presets_of_guis_are_read(preset: Path, run: Run) -> None:
    words = {"train_data_dir": "data", "caption_extension": ".txt", "pretrained_model_name_or_path": "m.safetensors"}
    for i, path in enumerate(sorted(run.images.glob("*.png"))):  # the presets enlarge no image
        Image.new("RGB", (256, 256), (40 * i, 90, 9)).save(path)
    if "kohya_ss" in preset.name:  # its target is one word, as its field is cut at spaces
        run.captions(lambda caption: caption.replace("blonde hair", "blonde_hair"))
    report = check(preset, words, tokenizer=run.folder / "none")
    assert report.config is not None
    assert [target.phrase for target in report.targets] == [
        "blonde_hair" if "kohya_ss" in preset.name else "blonde hair"
    ]
    assert not [finding for finding in report.findings if finding.level == "error"]
    assert report.images == 6
    assert report.data.datasets[0].resolution == ((1024, 1024) if "sdxl" in preset.name else (512, 512))


def test_what_is_no_preset_and_no_data_set_is_said(run: Run) -> None:
    (run.folder / "other.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(SPFError, match="neither the JSON of a data set"):
        check(run.folder / "other.json", {})
    run.dataset("")
    (run.folder / "dataset.toml").rename(run.folder / "dataset.conf")
    run.set(dataset_config="dataset.conf")
    with pytest.raises(SPFError, match=r"only as \.toml or \.json"):
        check(run.config, {})
