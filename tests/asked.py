"""Runs of which sd-scripts itself is asked: its words for what it refuses, and its data set where SPF's model is wrong.

`spf check` starts a process for each, with imports of seconds. Here what it would ask is kept (`requests`), one process
answers all (`test_data_sets.ask`), and `hear` checks what is shown of the answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
import toml
from PIL import Image

from spf_plugin.hosts.kohya.scripts import SCRIPTS
from spf_plugin.tools.check import asking, registered
from spf_plugin.tools.check.run import Report, check
from tests.check_sets import Run, good, masks, regularisation, subset

REPOSITORY = Path(__file__).parents[1]


@dataclass
class Case:
    """A run, and what must be shown of it.

    Attributes:
        make: spoils a good run, or changes it.
        words: of the host, where it stops.
        also: what else holds of the report.
        options: of `check`.
        path: what is checked, in the run's folder.
    """

    make: Callable[[Run], object]
    words: str = ""
    also: Callable[[Report], bool] = lambda report: True
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "run.toml"


def _two_sizes(run: Run) -> None:
    own = {"image_dir": "data/10_hair", "caption_extension": ".txt", "num_repeats": 2}
    run.dataset(toml.dumps({"datasets": [{"resolution": size, "subsets": [own]} for size in (512, 768)]}))


def _json(run: Run) -> None:
    own = {"image_dir": "data/10_hair", "caption_extension": ".txt"}
    content = {"datasets": [{"resolution": 512, "subsets": [own]}]}
    (run.folder / "set.json").write_text(json.dumps(content), encoding="utf-8")
    run.set(train_data_dir=None, dataset_config="set.json")


def _kept(run: Run) -> None:
    """What cache_info wrote when the captions were others."""
    paths = sorted(run.images.glob("*.png"))
    row = {"caption": "a hat, blonde hair", "resolution": [64, 64]}
    kept = {str(path.relative_to(run.folder)): row for path in paths}
    (run.images / "metadata_cache.json").write_text(json.dumps(kept), encoding="utf-8")
    run.set(cache_info=True)


def _preset(run: Run) -> None:
    shutil.copy(REPOSITORY / "presets" / "guis" / "lora-easy-sd15.toml", run.folder / "preset.toml")
    for path in run.images.glob("*.png"):
        Image.new("RGB", (256, 256)).save(path)


def _captions(report: Report) -> set[str]:
    return {entry.caption for entry in report.data.entries}


CERTAIN = {"pretrained_model_name_or_path": "v1-5-pruned.ckpt"}
CASES: dict[str, Case] = {
    "a good run": Case(lambda r: None, also=lambda p: p.steps_per_epoch == 60 and not p.findings),
    "a mask is missing": Case(
        lambda r: (masks(r), (r.folder / "masks" / "p0.png").unlink()), "missing conditioning data for 1 images"
    ),
    "limits of the buckets": Case(
        lambda r: r.set(enable_bucket=True, min_bucket_reso=640), "min_bucket_reso must be equal or less than"
    ),
    "steps of the buckets": Case(
        lambda r: r.set(enable_bucket=True, bucket_reso_steps=32, **CERTAIN), "it must be divisible by 64"
    ),
    "a crop range": Case(lambda r: r.set(face_crop_aug_range="4.0,2.0"), "face_crop_aug_range must be two floats"),
    "an unknown name": Case(lambda r: r.dataset(subset("num_repeat = 3")), "extra keys not allowed @ data"),
    "no UTF-8": Case(lambda r: (r.images / "p0.txt").write_bytes(b"\xe9t\xe9"), "illegal char in file (not UTF-8)"),
    "no folder": Case(lambda r: r.set(train_data_dir="dataa"), "No data found. Please verify arguments"),
    "the command line": Case(
        lambda r: None, "argument --max_token_length: invalid choice: 77", options={"words": {"max_token_length": 77}}
    ),
    "a data set in JSON": Case(_json, also=lambda p: p.images == 6 and not p.failed),
    "one folder in two resolutions": Case(
        _two_sizes, also=lambda p: [c.buckets for c in p.data.counts] == [{(512, 512): 12}, {(768, 768): 12}]
    ),
    "cache_info": Case(lambda r: r.set(cache_info=True), also=lambda p: p.images == 6),
    "kept information": Case(_kept, also=lambda p: _captions(p) == {"a hat, blonde hair"}),
    "regularisation": Case(regularisation, also=lambda p: p.data.counts[0].regular == 60),
    "the data alone": Case(
        lambda r: r.dataset(subset().replace("resolution = 512\n", "")),
        also=lambda p: p.images == 6 and p.data.counts[0].buckets is None and p.data.datasets[0].resolution is None,
        path="dataset.toml",
    ),
    "a preset of a GUI": Case(
        _preset,
        also=lambda p: p.images == 6 and p.data.datasets[0].resolution == (512, 512),
        options={"words": {"train_data_dir": "data", "caption_extension": ".txt"}},
        path="preset.toml",
    ),
    **{script.name: Case(lambda r: None, options={"script": script}) for script in SCRIPTS if script.is_dit},
}


def _wrong_sizes(path: Path) -> tuple[int, int]:
    return (64, 128)


class Asked:
    """The cases, asked of one sd-scripts."""

    def __init__(self, host: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.folder, self.monkeypatch = host, folder, monkeypatch
        self.requests: list[dict[str, Any]] = []
        self.cases = {name: case for name, case in CASES.items() if not name.endswith("network") or self._has(name)}
        self.kept = folder.with_name("kept")
        self.kept.mkdir()
        for name, case in self.cases.items():
            (folder / name).mkdir(parents=True)
            case.make(good(folder / name))
            self._check(name, self._keep)

    def _has(self, script: str) -> bool:
        return (self.host / f"{script}.py").is_file()

    def _check(self, name: str, run: Callable[..., str]) -> Report:
        self.monkeypatch.chdir(self.folder / name)
        self.monkeypatch.setattr(asking, "_run", run)
        options = {"words": {}, **self.cases[name].options}
        return check(Path(self.cases[name].path), tokenizer=Path("none"), host=self.host, **options)

    def _keep(self, request: dict[str, Any], answers: IO[bytes], limit: float, progress: Any) -> str:
        words = list(request["words"])
        if "--config_file" in words:  # one of a preset lies in a folder that goes away
            place = self.kept / f"{len(self.requests)}.toml"
            shutil.copy(words[1], place)
            words[1] = str(place)
        self.requests.append({**request, "words": words, "folder": str(Path.cwd())})
        return "kept"

    def hear(self, told: list[dict[str, Any]]) -> None:
        """Every case with its answer; then the first with a model that is wrong."""
        for (name, case), answer in zip(self.cases.items(), told, strict=True):
            self._heard(name, case, answer)
        first = next(iter(self.cases))
        self.monkeypatch.setattr(registered, "size_of", _wrong_sizes)
        self.monkeypatch.setattr("spf_plugin.tools.check.entries.of_file", lambda text, wildcards: "what is not there")
        right = self._heard(first, self.cases[first], told[0])
        assert "what is not there" not in _captions(right)
        self.monkeypatch.setattr(asking, "_run", lambda *_: "not today")
        wrong = check(Path("run.toml"), {}, tokenizer=Path("none"), host=self.host)
        assert wrong.read == (
            f"as SPF's model of sd-scripts reads it, as sd-scripts at {self.host} cannot be asked: not today"
        )
        assert _captions(wrong) == {"what is not there"}

    def _heard(self, name: str, case: Case, answer: dict[str, Any]) -> Report:
        def replay(request: dict[str, Any], answers: IO[bytes], limit: float, progress: Any) -> str:
            answers.write(json.dumps(answer).encode())
            return ""

        report = self._check(name, replay)
        stops = [finding.message for finding in report.findings if finding.code == "sd-scripts-stops"]
        if case.words:
            assert len(stops) == 1, (name, answer)
            assert case.words in stops[0], (name, stops)
            assert report.read == f"as SPF's model of sd-scripts reads it, as sd-scripts at {self.host} stops", name
        else:
            assert report.read == f"as read by sd-scripts at {self.host}", (name, report.read, stops)
        assert case.also(report), (name, report.as_json())
        return report
