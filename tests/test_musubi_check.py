"""`spf check` of runs inside musubi-tuner, without a copy of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin.errors import SPFError
from spf_plugin.hosts.musubi.scripts import named
from spf_plugin.tools.check.musubi.run import check
from spf_plugin.tools.check.run import Report
from spf_plugin.tools.cli import app

RUN = {
    "dit": "model.safetensors",
    "sdpa": True,
    "network_module": "spf_plugin.lora",
    "network_args": ["spf_target=blonde hair"],
    "output_dir": "out",
    "output_name": "hair",
    "max_train_steps": 100,
}
#: Everywhere here: nothing is cached.
NOT_CACHED = ["not-cached", "not-cached"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: four images with captions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i, place in enumerate(("street", "beach", "forest", "kitchen")):
        Image.effect_noise((64, 48), 40 + i).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"a woman, blonde hair, {place}", encoding="utf-8")
    write(tmp_path)
    return tmp_path


def write(folder: Path, run: dict[str, Any] | None = None, **own: Any) -> None:
    """The two files of a run; `own` are settings of the data set, and those that are None are left out."""
    values = {"image_directory": "images", "caption_extension": ".txt", "resolution": [64, 48], **own}
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "sets.toml").write_text(toml.dumps({"datasets": [kept]}), encoding="utf-8")
    said = {**RUN, "dataset_config": "sets.toml", **(run or {})}
    (folder / "run.toml").write_text(
        toml.dumps({key: value for key, value in said.items() if value is not None}), encoding="utf-8"
    )


def look(*words: str, script: str | None = "zimage_train_network.py", file: str = "run.toml") -> Report:
    return check(Path(file), list(words), script=named(script) if script else None)


def codes(report: Report, *levels: str) -> list[str]:
    return [finding.code for finding in report.findings if finding.level in (levels or ("error", "warning"))]


def test_a_run_that_is_right_but_for_what_is_not_cached(folder: Path) -> None:
    report = look()
    assert codes(report) == NOT_CACHED
    assert report.images == 4
    assert [row.prompt.target for row in report.rows] == ["blonde hair"] * 4
    assert "zimage_cache_latents.py" in report.findings[0].fix
    assert "zimage_cache_text_encoder_outputs.py" in report.findings[1].fix


def test_a_data_set_alone(folder: Path) -> None:
    assert codes(look("--network_args", "spf_target=blonde hair", script=None, file="sets.toml")) == []
    (folder / "sets.json").write_text(json.dumps(toml.load(folder / "sets.toml")), encoding="utf-8")
    assert codes(look("--network_args", "spf_target=blonde hair", script=None, file="sets.json")) == []
    (folder / "sets.json").write_text("{}", encoding="utf-8")
    report = look(script=None, file="sets.json")
    assert any("has no [[datasets]]" in finding.message for finding in report.findings), report.findings
    report = check(folder / "sets.toml", [], script=None, target="green hair")
    assert codes(report, "error") == ["stops"]
    assert "occurs in none of the 4 captions" in report.findings[0].message


def test_which_trainer_it_is_must_be_said(folder: Path) -> None:
    assert "no-trainer" in codes(look(script=None))
    assert "stops" in codes(look(script="hv_train_network.py"))


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        ({"spf_target": "hair"}, "spf-outside-network-args", "spf_target stands by itself"),
        ({"sdpaa": True}, "unknown-option", "no option 'sdpaa'"),
        ({"task": "t2v-14B"}, "unknown-option", "no option 'task' here"),
        ({"learning_rate": "1e-4"}, "quoted-number", "learning_rate"),
        ({"network_args": "spf_target=blonde hair"}, "no-list", "network_args"),
        ({"gradient_checkpointing": "true"}, "quoted-boolean", "gradient_checkpointing"),
        ({"network_dim": 4.5}, "wrong-type", "network_dim"),
        ({"timestep_sampling": "shifted"}, "wrong-choice", "timestep_sampling"),
        ({"training_comment": "a\nb"}, "backslash", "training_comment"),
        ({"network_module": "networks.lora_zimage"}, "other-module", "SPF would not run"),
        ({"network_module": None}, "no-module", "names no network_module"),
        ({"dit": None}, "no-part", "no dit"),
        ({"sample_prompts": "prompts.txt"}, "no-part", "sample_prompts needs vae and text_encoder"),
        ({"dataset_config": None}, "no-data", "no dataset_config"),
        ({"sdpa": False}, "stops", "no attention is chosen"),
        ({"output_name": None}, "stops", "no --output_name"),
        ({"network_args": ["spf_target=blonde hair", "spf_response=anchor"]}, "stops", "spf_response=anchor"),
        ({"network_args": ["spf_traget=blonde hair"]}, "setting", "spf_traget"),
        ({"dim_from_weights": "old.safetensors"}, None, ""),  # a switch to the parser, a path to the trainer
        ({"max_train_epochs": 2, "network_args": [*RUN["network_args"], "spf_stage2_start=20"]}, "never-aligned", ""),
    ],
)
def test_mistakes_in_a_run(folder: Path, run: dict[str, Any], code: str | None, said: str) -> None:
    write(folder, run)
    if code is None:
        assert codes(look()) == NOT_CACHED
        return
    found = [finding for finding in look().findings if finding.code == code]
    assert any(said in finding.message for finding in found), codes(look())


@pytest.mark.parametrize(
    ("own", "code", "said"),
    [
        ({"image_dir": "images"}, "dataset-config", "refuses 'image_dir'"),
        ({"batch_size": "2"}, "dataset-config", "must be a whole number"),
        ({"resolution": [64, 48, 3]}, "dataset-config", "must be one whole number, or two in a list"),
        ({"batch_size": True}, "dataset-config", "counts as 1"),
        ({"num_repeats": 0}, "batch-size", "num_repeats = 0"),
        ({"resolution": None}, "no-resolution", "960 x 544"),
        ({"caption_extension": None}, "caption-extension", "has no caption_extension"),
        ({"caption_extension": ".caption"}, "no-caption", "4 of 4 images have no .caption file"),
        ({"image_directory": "elsewhere"}, "no-folder", "there is no such folder"),
        ({"image_directory": None}, "dataset-config", "names neither image_directory"),
        ({"image_jsonl_file": "none.jsonl"}, "ignored-option", "image_jsonl_file is ignored beside image_directory"),
        ({"image_directory": None, "image_jsonl_file": "none.jsonl"}, "metadata", "none.jsonl"),
        ({"control_directory": "images"}, "stops", "has control images or videos"),
        ({"multiple_target": True}, "stops", "multiple_target"),
        ({"bucket_no_upscale": True}, "ignored-option", "bucket_no_upscale does nothing"),
        ({"image_directory": None, "video_directory": "images"}, "no-images", "there are no videos in images"),
        ({"image_directory": None, "video_directory": "images", "source_fps": 24}, "dataset-config", "with a point"),
        ({"image_directory": None, "video_directory": "images", "target_frames": [24]}, "frames", "rounds down"),
        ({"image_directory": None, "video_directory": "images", "frame_extraction": "tail"}, "frames", "'tail'"),
    ],
)
def test_mistakes_in_a_data_set(folder: Path, own: dict[str, Any], code: str, said: str) -> None:
    write(folder, **own)
    found = [finding for finding in look().findings if finding.code == code]
    assert any(said in finding.message for finding in found), codes(look())


def test_the_ending_that_captions_have_is_named(folder: Path) -> None:
    write(folder, caption_extension=".caption")
    (found,) = (finding for finding in look().findings if finding.code == "no-caption")
    assert found.fix == 'Set caption_extension = ".txt".'


def test_of_wan_samples_need_its_own_encoder(folder: Path) -> None:
    write(folder, {"sample_prompts": "prompts.txt"})
    (found,) = (f for f in look(script="wan_train_network.py").findings if f.code == "no-part")
    assert "sample_prompts needs vae and t5" in found.message


def test_clips(folder: Path) -> None:
    """They are not opened as pictures. The host fails at one without a caption."""
    (folder / "videos").mkdir()
    for name in "ab":
        (folder / "videos" / f"{name}.mp4").touch()
        (folder / "videos" / f"{name}.txt").write_text(f"a woman, blonde hair, {name} street", encoding="utf-8")
        (folder / "videos" / f"{name}_00000-009_0064x0048_wan.safetensors").touch()
        (folder / "videos" / f"{name}_wan_te.safetensors").touch()
    write(folder, image_directory=None, video_directory="videos", target_frames=[9], num_repeats=3)
    report = look(script="wan_train_network.py")
    assert codes(report) == ["no-prompts"]
    assert "the prompts of all 2 cached items are missing" in report.findings[0].message
    assert (report.images, report.steps_per_epoch) == (2, 6)
    (folder / "videos" / "b.txt").unlink()
    report = look(script="wan_train_network.py")
    (found,) = (finding for finding in report.findings if finding.code == "no-caption")
    assert (found.level, "fails at them" in found.message) == ("error", True)


def test_images_without_a_caption_are_left_out(folder: Path) -> None:
    (folder / "images" / "3.txt").unlink()
    report = look()
    assert report.images == 3
    assert "no-caption" in codes(report, "warning")


def test_a_caption_is_all_lines_of_its_file(folder: Path) -> None:
    (folder / "images" / "0.txt").write_text("a woman, street,\nblonde hair\n", encoding="utf-8")
    assert look().rows[0].prompt.full == "a woman, street,\nblonde hair"
    (folder / "images" / "0.txt").write_text("\ufeffa woman, street, blonde hair", encoding="utf-8")
    assert "bom" in codes(look(), "warning")
    (folder / "images" / "0.txt").write_bytes("a woman, straße, blonde hair".encode("cp1252"))
    assert "not-utf8" in codes(look(), "error")


def lines(folder: Path, *rows: dict[str, Any]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


def test_json_lines(folder: Path) -> None:
    own = {"image_directory": None, "image_jsonl_file": "data.jsonl"}
    write(folder, **own)
    lines(folder, {"image_path": "images/0.png", "caption": "a woman, blonde hair"})
    assert "no-cache" in codes(look(), "error")
    write(folder, **own, cache_directory="cache")
    assert codes(look(), "error") == NOT_CACHED
    lines(folder, {"image_path_0": "images/0.png", "caption": "a woman,\u2028blonde hair"})  # no end of a line
    assert codes(look(), "error") == NOT_CACHED
    lines(folder, {"image_path": "images/0.png", "caption": "blonde hair, a", "control_path": "images/1.png"})
    assert "stops" in codes(look(), "error")
    (folder / "data.jsonl").write_text('{"image_path": "images/0.png"', encoding="utf-8")
    assert any("a line is no JSON" in finding.message for finding in look().findings)
    lines(folder, {"image_path": "images/9.png", "caption": "a woman, blonde hair"}, {"image_path": "images/0.png"})
    assert {"metadata", "image-missing"} <= set(codes(look(), "error"))


def test_two_data_sets_in_one_cache(folder: Path) -> None:
    one = {"image_directory": "images", "caption_extension": ".txt", "resolution": 64}
    two = {**one, "cache_directory": "./images"}
    (folder / "sets.toml").write_text(toml.dumps({"datasets": [one, two]}), encoding="utf-8")
    assert "one-cache" in codes(look(), "error")


def test_what_is_cached_is_held_against_the_data_set(folder: Path) -> None:
    for name in ("0", "1", "2", "gone"):
        (folder / "images" / f"{name}_0064x0048_zi.safetensors").touch()
        (folder / "images" / f"{name}_zi_te.safetensors").touch()
    (folder / "images" / "3_zi_te.safetensors").touch()  # whose latents are not there
    report = look()
    found = {finding.code: finding for finding in report.findings}
    assert found["not-cached"].level == "warning"
    assert "1 of 4 items have no cached" in found["not-cached"].message
    assert found["stale-cache"].images == ("gone",)
    assert "the prompts of all 3 cached items are missing" in found["no-prompts"].message
    wanted = 'spf cache-prompts --arch zimage --target "blonde hair" --dataset_config "sets.toml" --text_encoder "PATH"'
    script = "Run zimage_cache_text_encoder_outputs.py first, which caches the text itself. "
    assert found["no-prompts"].fix == f"{script}Run {wanted}"  # empty files are no text of any caption
    for name in "012":
        caption = (folder / "images" / f"{name}.txt").read_text(encoding="utf-8")
        save_file({}, folder / "images" / f"{name}_zi_te.safetensors", {"caption1": caption})
    (fix,) = (finding.fix for finding in look().findings if finding.code == "no-prompts")
    assert fix == f"Run {wanted}"


def test_the_other_model_of_a_trainer_has_a_cache_of_its_own(folder: Path) -> None:
    for name in "0123":
        (folder / "images" / f"{name}_0064x0048_f2k4b.safetensors").touch()
        (folder / "images" / f"{name}_f2k4b_te.safetensors").touch()
    of = "flux_2_train_network.py"
    assert codes(look(script=of), "error") == NOT_CACHED
    assert codes(look("--model_version", "klein-base-4b", script=of), "error") == ["no-prompts"]


def test_control_images_in_the_cache_are_shown_to_the_model(folder: Path) -> None:
    for name in "0123":
        tensors = {f"latents_control_{i}_3x4_float32": torch.zeros(128, 3, 4) for i in range(name == "2")}
        path = folder / "images" / f"{name}_0064x0048_f2d.safetensors"
        save_file({"latents_3x4_float32": torch.zeros(128, 3, 4), **tensors}, path)
    report = look(script="flux_2_train_network.py")
    (said,) = (finding.message for finding in report.findings if finding.code == "stops")
    assert "1 of the cached latents have control images with them, e.g. " in said
    assert "2_0064x0048_f2d.safetensors" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fp8_bas", "--fp8_llama"], "--fp8_llama is no option of zimage_train_network.py"),
        (["--task", "t2v-14B"], "--task is no option of zimage_train_network.py"),
        (["--network_dim", "four"], "--network_dim takes a whole number"),
        (["--mixed_precision", "bf8"], "--mixed_precision takes one of no, fp16, bf16"),
        (["--network_args", "a=b", "--network_args", "c=d"], "musubi-tuner reads only the last"),
        (["hair"], "stray word 'hair'"),
        (["--network_dim"], "musubi-tuner would not take these options: argument --network_dim"),
    ],
)
def test_mistakes_on_a_command_line(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(SPFError) as caught:
        look(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["zimage_train_network.py", "run.toml"], 1, "musubi-tuner finds nothing to train"),
        (["src/musubi_tuner/krea2_train_network.py", "--config_file", "run"], 1, "as SPF's model of musubi-tuner"),
        (["sets.toml", "--target", "blonde hair"], 0, "ready to train"),
        (["zimage_train_network.py", "none.toml"], 2, "none.toml"),
        (["zimage_train_network.py", "images"], 2, "is a folder"),
    ],
)
def test_the_command(folder: Path, words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    done = CliRunner().invoke(app, ["check", *words])
    assert done.exit_code == code, done.output
    assert said in done.output


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("sets.txt", "", "only as .toml or .json. Rename it."), ("sets.json", "[]", "is no data set configuration")],
)
def test_a_file_that_is_no_data_set(folder: Path, name: str, text: str, said: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    write(folder, {"dataset_config": name})
    with pytest.raises(SPFError) as caught:
        look()
    assert said in str(caught.value)


def test_as_json(folder: Path) -> None:
    done = CliRunner().invoke(app, ["check", "zimage_train_network.py", "run.toml", "--json"])
    said = json.loads(done.output)
    assert [row["target"] for row in said["captions"]] == ["blonde hair"] * 4
    assert said["images"] == 4


PRESETS = Path(__file__).parents[1] / "presets" / "musubi"


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*-*gb.toml")))
def test_a_preset_says_nothing_that_a_run_would_refuse(folder: Path, preset: str) -> None:
    """With what its first lines say is on the command line."""
    first = (PRESETS / f"{preset}.toml").read_text(encoding="utf-8")
    used = re.search(r"src/musubi_tuner/(\w+\.py) --config_file PATH/presets/musubi/(\S+)\.toml", first)
    assert used is not None
    assert used[2] == preset
    words = ["--dataset_config", "sets.toml", "--network_args", "spf_target=blonde hair", "--output_dir", "out"]
    report = check(PRESETS / f"{preset}.toml", [*words, "--output_name", "hair"], script=named(used[1]))
    assert codes(report) == NOT_CACHED
    assert re.search(r"dataset\.toml as presets/musubi/(dataset(?:-wan)?)\.toml", first)


@pytest.mark.parametrize("name", ["dataset", "dataset-wan"])
def test_a_presets_data_set(folder: Path, name: str) -> None:
    report = check(PRESETS / f"{name}.toml", [], script=None, target="blonde hair")
    assert set(codes(report)) == {"no-folder"}  # it is for the user to name them


def test_every_finding_is_on_the_page() -> None:
    sources = (Path(__file__).parents[1] / "spf_plugin" / "tools" / "check" / "musubi").glob("*.py")
    made = r'(?:Finding\(|\.add\()\s*(?:"\w+"|level),\s*"([a-z0-9-]+)"'
    found = {code for path in sources for code in re.findall(made, path.read_text(encoding="utf-8"))}
    assert len(found) > 20
    page = (Path(__file__).parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
    assert found <= set(re.findall(r"^\| `([a-z0-9-]+)`", page, re.MULTILINE))
