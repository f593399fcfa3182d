"""`spf check` asks musubi-tuner what it makes of a data set: its own answer beside that of SPF's model of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import toml
from PIL import Image
from typer.testing import CliRunner

from spf_plugin.hosts.musubi import preparing
from spf_plugin.hosts.musubi.scripts import named
from spf_plugin.tools.check.asking import Answer
from spf_plugin.tools.check.musubi import asking, data
from spf_plugin.tools.cli import app
from tests.hosts.musubi import classes

SIZES = ((96, 64), (64, 96), (128, 64), (64, 64), (200, 40))
IMAGES = {"image_directory": "images", "caption_extension": ".txt", "resolution": [96, 64], "cache_directory": "c"}
LINES = {"image_jsonl_file": "images.jsonl", "resolution": [96, 64], "cache_directory": "c"}
VIDEOS = {"video_directory": "videos", "caption_extension": ".txt", "cache_directory": "v", "target_frames": [1, 9]}
#: Data sets by what is particular of them; what both take has the same items, captions and buckets.
SETS: dict[str, list[dict[str, Any]]] = {
    "plain": [IMAGES],
    "buckets": [{**IMAGES, "enable_bucket": True}],
    "no upscale": [{**IMAGES, "enable_bucket": True, "bucket_no_upscale": True}],
    "batches and repeats": [{**IMAGES, "enable_bucket": True, "batch_size": 2, "num_repeats": 3}],
    "one number": [{**IMAGES, "resolution": 128}],
    "no resolution": [{key: value for key, value in IMAGES.items() if key != "resolution"}],
    "cache beside the images": [{key: value for key, value in IMAGES.items() if key != "cache_directory"}],
    "lines": [LINES],
    "lines without a cache": [{key: value for key, value in LINES.items() if key != "cache_directory"}],
    "two": [IMAGES, {**LINES, "cache_directory": "d"}],
    "two in one cache": [IMAGES, LINES],
    "two in one cache by other names": [IMAGES, {**LINES, "cache_directory": "./c"}],
    "videos": [VIDEOS],
    "images and videos": [IMAGES, VIDEOS],
    "other captions": [{**IMAGES, "caption_extension": ".caption"}],
    "no caption extension": [{key: value for key, value in IMAGES.items() if key != "caption_extension"}],
    "no folder": [{**IMAGES, "image_directory": "nowhere"}],
    "no source": [{"resolution": 64}],
    "a misspelling": [{**IMAGES, "batchsize": 2}],
    "a text": [{**IMAGES, "num_repeats": "2"}],
    "an old name": [{**IMAGES, "flux_kontext_no_resize_control": True}],
    "control images": [{**IMAGES, "control_directory": "control"}],
    "missing lines": [{**LINES, "image_jsonl_file": "nowhere.jsonl"}],
    "not UTF-8": [{**IMAGES, "image_directory": "latin"}],
    "nothing": [],
}
#: The host makes these, and fails at them later, or has nothing to train.
LATER = {"no-folder", "no-images", "no-caption", "one-cache"}
#: By name, what the host stops at at once.
STOPS = {"two in one cache"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: images with captions, of which some are cached, clips, and lines that name them."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for place in ("images", "control", "videos", "latin", "c", "d"):
        Path(place).mkdir()
    for i, size in enumerate(SIZES):
        for place in ("images", "control"):
            Image.new("RGB", size, (40 * i, 90, 120)).save(f"{place}/{i}.png")
        Path("images", f"{i}.txt").write_text(f" a woman, blonde hair,\n place {i} \n", encoding="utf-8")
        rows.append({"image_path": f"images/{i}.png", "caption": f"a man, blonde hair, line {i}"})
        for cache in ("c", "d", "images") if i else ():  # of the first nothing is cached
            Path(cache, f"{i}_{size[0]:04d}x{size[1]:04d}_zi.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
            Path(cache, f"{i}_zi_te.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    Image.new("RGB", (64, 64)).save("images/without.png")
    Image.new("RGB", (64, 64)).save("latin/a.png")
    Path("latin", "a.txt").write_bytes("a café, blonde hair".encode("latin-1"))
    Path("images.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    Path("videos", "a.mp4").touch()
    Path("videos", "a.txt").write_text("a woman walks, blonde hair", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("trainer", ["zimage", ""], ids=["trainer", "no-trainer"])
@pytest.mark.parametrize("name", SETS)
def test_the_model_says_what_the_host_says(name: str, trainer: str, folder: Path) -> None:
    classes.module("dataset.config_utils")
    Path("sets.toml").write_text(toml.dumps({"datasets": SETS[name]}), encoding="utf-8")
    request = {"config": "sets.toml", "code": "zi" if trainer else "", "timestep_buckets": None}
    told = json.loads(json.dumps(preparing.answer(request)))
    assert "cannot" not in told
    script = named(f"{trainer}_train_network.py") if trainer else None
    model = data.read(Path("sets.toml"), script)
    errors = {finding.code for finding in model.findings if finding.level == "error"}
    later = LATER if trainer else LATER | {"no-cache"}
    videos = "videos" in name and bool(trainer)  # which a rule of the run refuses by the trainer's name
    assert ("stops" in told) == bool(errors - later or videos or name in STOPS), (told, errors)
    answer = Answer(Path("/host"), told.get("datasets"), told.get("stops", ""))
    heard, read = asking.heard(model, answer)
    if "stops" in told:
        assert read.endswith("as musubi-tuner at /host stops")
        assert heard.findings[0].code == "musubi-stops"
        return
    assert read == "as read by musubi-tuner at /host"
    assert not [finding for finding in heard.findings if finding.code == "overruled"]
    before = data.read(Path("sets.toml"), script).found
    for ours, theirs in zip(before, heard.found, strict=True):
        assert theirs.data == ours.data
        assert theirs.repeats == ours.repeats
        assert (theirs.cache or "") == (ours.cache or "")
        if trainer and theirs.buckets is not None:
            cached = len(list(Path(theirs.cache or "").glob("*_zi.safetensors")))
            assert sum(theirs.buckets.values()) == cached * ours.repeats


def test_buckets_and_batches_are_the_hosts(folder: Path) -> None:
    classes.module("dataset.config_utils")
    Path("sets.toml").write_text(toml.dumps({"datasets": SETS["batches and repeats"]}), encoding="utf-8")
    (told,) = preparing.answer({"config": "sets.toml", "code": "zi", "timestep_buckets": None})["datasets"]
    bucket = classes.module("dataset.bucket")
    selector = bucket.BucketSelector((96, 64), True, False, "zi")
    wanted: dict[tuple[int, int], int] = {}
    for size in SIZES[1:]:
        place = tuple(map(int, selector.get_bucket_resolution(size)))
        wanted[place] = wanted.get(place, 0) + 3
    assert {(width, height): count for width, height, count in told["buckets"]} == wanted
    assert told["batches"] == sum(-(-count // 2) for count in wanted.values())


def test_the_copy_is_found_by_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tmp_path / "one"
    (one / "src" / "musubi_tuner" / "dataset").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "musubi_tuner").exists()])
    for module in [module for module in sys.modules if module.split(".")[0] == "musubi_tuner"]:
        monkeypatch.delitem(sys.modules, module)
    scripts = [Path("one/src/musubi_tuner/wan_train_network.py"), Path("one/wan_train_network.py")]
    assert [asking.at_hand(script) for script in scripts] == [None, None]
    text = "class BlueprintGenerator:\n def generate_dataset_group_by_blueprint(): ..."
    (one / "src" / "musubi_tuner" / "dataset" / "config_utils.py").write_text(text, encoding="utf-8")
    assert [asking.at_hand(script) for script in scripts] == [one / "src"] * 2
    assert asking.at_hand() is None
    monkeypatch.chdir(one)
    assert asking.at_hand() == one / "src"
    assert asking.at_hand(Path("wan_train_network.py")) == one / "src"


@pytest.mark.skipif(not classes.checkouts(), reason=classes.NO_CHECKOUT)
def test_a_real_copy_is_asked_and_nothing_is_written(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "av.py").touch()  # of which images need nothing
    monkeypatch.setenv("PYTHONPATH", str(site))
    host = classes.checkouts()[0]
    Path("sets.toml").write_text(toml.dumps({"datasets": SETS["batches and repeats"]}), encoding="utf-8")
    before = sorted(path for path in folder.rglob("*"))
    words = ["--dataset_config", "sets.toml", "--network_args", "spf_target=blonde hair", "--json"]
    result = CliRunner().invoke(app, ["check", str(host / "src" / "musubi_tuner" / "zimage_train_network.py"), *words])
    report = json.loads(re.sub(r"^[^{]*", "", result.stdout))
    assert report["data_set"] == f"as read by musubi-tuner at {host}"
    assert report["images"] == len(SIZES)
    (told,) = preparing.answer({"config": "sets.toml", "code": "zi", "timestep_buckets": None})["datasets"]
    assert report["datasets"][0]["batches"] == told["batches"]
    assert sum(report["datasets"][0]["buckets"].values()) == 3 * (len(SIZES) - 1)
    assert sorted(path for path in folder.rglob("*")) == before
