"""`spf check`: a good run passes, every planted mistake is found, and the split is the one that training makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toml
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from portraitlab.captions import TARGETS
from portraitlab.customisation import write_set
from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.families.unet import UNet
from spf_plugin.hosts.kohya import scripts
from spf_plugin.hosts.kohya.loop import KohyaHost
from spf_plugin.hosts.kohya.scripts import SCRIPTS, named
from spf_plugin.hosts.kohya.trainers import DITS
from spf_plugin.network_args import read_words
from spf_plugin.text import TextSide
from spf_plugin.tools.check import borders, family, tokens
from spf_plugin.tools.check.host_options import CHOICES, LISTS, OF_SCRIPT, OPTIONS, SDXL_ONLY, SWITCHES, TYPES
from spf_plugin.tools.check.run import Report, check
from spf_plugin.tools.check.sets import together
from spf_plugin.tools.check.source import parse_words
from spf_plugin.tools.check.spelling import kind_of
from spf_plugin.tools.cli import check as cli_check
from spf_plugin.tools.cli.check import app
from tests.check_sets import CAPTIONS, MISTAKES, Run, anima, everything, good
from tests.hosts.conftest import HOSTS, LAUNCHER
from tests.messages import all_messages

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "portraitlab" / "model" / "tokenizer"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return good(tmp_path)


def look(run: Run, **words: Any) -> Report:
    return check(run.config, words, tokenizer=run.folder / "none")  # estimated tokens: loading a tokenizer takes long


def codes(report: Report, *levels: str) -> set[str]:
    return {f.code for f in report.findings if f.level in (levels or ("error", "warning", "note"))}


def test_nothing_is_wrong_with_a_good_run(run: Run) -> None:
    report = look(run)
    assert not report.findings
    assert (report.images, report.steps_per_epoch) == (6, 60)


@pytest.mark.parametrize(
    ("code", "level", "spoil"), MISTAKES, ids=[f"{i}-{code}" for i, (code, _, _) in enumerate(MISTAKES)]
)
def test_planted_mistake(run: Run, code: str, level: str, spoil: Callable[[Run], object]) -> None:
    spoil(run)
    report = look(run)
    found = [f for f in report.findings if f.code == code]
    assert [f.level for f in found][:1] == [level], report.findings
    assert report.failed == any(f.level == "error" for f in report.findings)
    if level != "error":
        assert not report.failed, report.findings
    result = CliRunner().invoke(app, [str(run.config), "--tokenizer", "none"], env={"COLUMNS": "80"})
    assert result.exit_code == int(report.failed), result.output
    said = re.sub(r"\W+", "", result.output)  # the terminal wraps
    assert re.sub(r"\W+", "", found[0].message) in said
    assert max(map(len, result.output.splitlines())) <= 80


def codes_of_the_source() -> set[str]:
    """The second argument of every `Finding(...)` and `data.add(...)`, and the codes that stand in tables."""
    found = set()
    for path in (REPOSITORY / "spf_plugin" / "tools" / "check").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(
            re.findall(r'(?:Finding|data\.add)\(\s*(?:"\w+"|"error" if [^,]+ else "\w+"),\s*"([a-z0-9-]+)"', text)
        )
        found |= set(re.findall(r'": \("([a-z0-9-]+)", "[A-Z]', text)) | set(
            re.findall(r'\((?:classes|nothing|missing|other_size), "([a-z-]+)"', text)
        )
    return found


def test_a_trainer_that_spf_has_not_been_taught(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that sd-scripts has today are known: one is forgotten here."""
    known = {name: dit for name, dit in DITS.items() if not name.startswith("Hunyuan")}
    monkeypatch.setattr(scripts, "DITS", known)
    run.set(text_encoder="t.safetensors", byt5="b.safetensors", vae="v.safetensors")
    found = [finding for finding in look(run).findings if finding.code == "other-model"]
    assert [finding.level for finding in found] == ["error"]
    assert "this is a run of hunyuan_image_train_network.py (HunyuanImage-2.1)" in found[0].message


def test_every_finding_is_planted_and_on_the_page() -> None:
    planted = {code for code, _, _ in MISTAKES}
    assert len(planted) >= 20
    others = {"images-not-read", "sd-scripts-stops", "overruled"}  # Pillow is here, and no sd-scripts is asked
    assert codes_of_the_source() - planted == others
    assert len(codes_of_the_source()) > 60
    page = (REPOSITORY / "docs" / "check.md").read_text(encoding="utf-8")
    own = page[page.index("## In musubi-tuner") : page.index("## Settings")]  # tests/test_musubi_check.py has them
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", page.replace(own, ""), re.MULTILINE)) == planted | others


# -- the split and the tokens are training's --------------------------------------------------------------------------


def test_spans_are_those_of_training(run: Run) -> None:
    report = check(run.config, {}, tokenizer=TOKENIZER)
    assert report.tokenizer == str(TOKENIZER)
    loaded = CLIPTokenizer.from_pretrained(TOKENIZER)

    def tokenize(text: str) -> list[int]:
        return loaded(text, add_special_tokens=False).input_ids

    host: Any = SimpleNamespace(tokenize=tokenize, prefix="")
    side = TextSide(host, UNet(torch.nn.Module()), parse({"spf_target": "blonde hair"}).target, lambda: None)
    batch = side.for_batch(CAPTIONS, {"hidden": torch.zeros(len(CAPTIONS), 77, 4)})
    for i, row in enumerate(report.as_json()["captions"]):
        assert row["base"] == batch.base[i]
        assert batch.full_groups[i, :, -1].nonzero().flatten().tolist() == row["target_tokens"]
        for p, phrase in enumerate(row["phrases"]):
            assert batch.full_groups[i, :, p].nonzero().flatten().tolist() == phrase["tokens"]
            assert batch.base_groups[i, :, p].nonzero().flatten().tolist() == phrase["tokens_in_base"]
            ids = loaded(row["caption"]).input_ids
            assert loaded.decode([ids[t] for t in phrase["tokens"]]).strip() == phrase["text"]


@pytest.mark.parametrize(("length", "cut"), [(None, 75), (75, 75), (150, 150), (225, 225), (255, 225)])
def test_the_limits_of_the_text_encoder(run: Run, length: int | None, cut: int) -> None:
    run.caption(0, "a woman" + ", a tree" * ((cut - 6) // 3) + ", blonde hair")
    assert "caption-cut" not in codes(check(run.config, {"max_token_length": length}, tokenizer=TOKENIZER))
    run.caption(0, "a woman" + ", a tree" * (cut // 3) + ", blonde hair")
    report = check(run.config, {"max_token_length": length}, tokenizer=TOKENIZER)
    assert {"caption-cut", "target-cut"} <= codes(report)
    (first, *_) = [row for row in report.rows if row.cut]
    assert (first.limit, first.full.target) == (cut, ())


def test_tokens_are_estimated_and_said_so(run: Run) -> None:
    result = CliRunner().invoke(app, [str(run.config), "--tokenizer", "none"])
    assert "estimates" in result.output
    assert "~" in result.output
    assert look(run).as_json()["tokens_estimated"] is True
    loaded = CLIPTokenizer.from_pretrained(TOKENIZER)
    for caption in CAPTIONS:
        real = len(loaded(caption, add_special_tokens=False).input_ids)
        assert abs(len(tokens.estimate(caption)) - real) <= 2


def test_where_a_tokenizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = tmp_path / "hf" / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    (tmp_path / "cache" / "openai_clip-vit-large-patch14").mkdir(parents=True)
    found = list(tokens.folders(str(tmp_path / "model"), str(tmp_path / "cache")))
    assert found.index(tmp_path / "model" / "tokenizer") < found.index(
        tmp_path / "cache" / snapshot.parent.parent.name[8:].replace("--", "_")
    )
    assert snapshot in found
    assert found[-1] == TOKENIZER


# -- the host's rules -------------------------------------------------------------------------------------------------


def test_dataset_toml_and_folders_say_the_same(run: Run) -> None:
    by_folder = look(run)
    run.dataset(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = [512, 512]\n"
        "[[datasets.subsets]]\nimage_dir = 'data/10_hair'\nnum_repeats = 10\n"
    )
    by_config = look(run)
    assert not by_config.findings
    assert [row.prompt for row in by_config.rows] == [row.prompt for row in by_folder.rows]
    assert by_config.steps_per_epoch == by_folder.steps_per_epoch


def test_metadata_prefix_suffix_wildcards_and_targets_of_subsets(run: Run) -> None:
    rows = {"p0": {"caption": "a woman", "tags": "hat"}, "p1.png": {"tags": "{red|blue} scarf"}}
    (run.folder / "meta.json").write_text(json.dumps(rows), encoding="utf-8")
    run.dataset(
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'data/10_hair'\n"
        "metadata_file = 'meta.json'\ncaption_prefix = 'photo,'\ncaption_suffix = ', end'\nenable_wildcard = true\n"
        "custom_attributes = { spf_target = 'hat|red scarf|blue scarf' }\n"
    )
    report = look(run)
    assert not codes(report, "error")
    assert [row.prompt.full for row in report.rows] == [
        "photo, a woman,hat , end",
        "photo, red scarf , end",
        "photo, blue scarf , end",
    ]
    assert [row.prompt.target for row in report.rows] == ["hat", "red scarf", "blue scarf"]


def test_the_command_line_wins_and_is_read_as_the_host_reads_it(run: Run) -> None:
    words = ["--network_args", "spf_target=green hair", "conv_dim=4", "--max_train_steps=7"]
    result = CliRunner().invoke(app, [str(run.config), *words, "--json", "--tokenizer", "none"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 1
    assert answer["settings"]["spf_target"] == "green hair"
    assert answer["findings"][0]["code"] == "stops"


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--optimizer_args a=1 b=2 --seed 1", {"optimizer_args": ["a=1", "b=2"], "seed": 1}),
        ("--base_weights A B --base_weights_multiplier 0.5 -1", {"base_weights_multiplier": [0.5, -1.0]}),
        ("--text_encoder_lr 1e-5 1e-5", {"text_encoder_lr": [1e-5, 1e-5]}),
        ("--lr_warmup_steps 10% --sdp --learning_rate -1", {"lr_warmup_steps": 0.1, "sdpa": True}),
        ("--network_args spf_target=a --seed 1", {"network_args": ["spf_target=a"]}),
    ],
)
def test_lists_numbers_and_switches_of_the_command_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, values: dict[str, Any]
) -> None:
    """Through the program, whose own parser sees the words first."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(cli_check, "look", lambda path, options, **_: seen.update(options) or look(run))
    assert CliRunner().invoke(app, [str(run.config), *words.split()]).exit_code == 0
    assert values.items() <= seen.items()


def test_a_quantised_base_that_the_run_cannot_have(run: Run) -> None:
    run.args("spf_target=blonde hair", "spf_base=int8", "spf_network=lycoris.kohya", "dora_wd=True")
    run.set(fp8_base=True)
    said = [finding.message for finding in look(run).findings if finding.code == "stops"]
    assert len(said) == 3
    for words in ("cannot go with dora_wd", "Add bypass_mode=True", "--fp8_base both shrink the frozen UNet"):
        assert any(words in message for message in said)
    run.args("spf_target=blonde hair", "spf_base=int8")
    run.set(fp8_base=None)
    assert "stops" not in codes(look(run))


def test_a_data_folder_alone(run: Run) -> None:
    result = CliRunner().invoke(app, ["data", "--target", "blonde hair", "--json", "--tokenizer", "none"])
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["images"], answer["findings"]) == (0, 6, [])
    result = CliRunner().invoke(app, ["data/10_hair", "--target", "blonde hair", "--json", "--tokenizer", "none"])
    assert result.exit_code == 0  # spf train takes such a folder
    assert [f["code"] for f in json.loads(result.stdout)["findings"]] == ["loose-images"]
    assert CliRunner().invoke(app, ["data", "--tokenizer", "none"]).exit_code == 1  # no target


def test_a_dataset_toml_alone(run: Run) -> None:
    run.dataset("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'data/10_hair'\ncaption_extension = '.txt'\n")
    result = CliRunner().invoke(app, ["dataset.toml", "--target", "blonde hair", "--json", "--tokenizer", "none"])
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["images"], answer["findings"]) == (0, 6, [])


_watching: list[str] = []  # what changes the disk, while a test has put a first entry here


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python reports here whatever it asks of the system; a hook stays as long as the process."""
    if not _watching or event.split(".")[0] not in ("open", "os", "shutil", "tempfile"):
        return
    if event == "open":
        path, _, flags = arguments
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not written or path in (os.devnull, 1, 2) or "__pycache__" in str(path):
            return
    elif event in ("os.listdir", "os.scandir", "os.fwalk", "os.walk", "os.putenv", "os.unsetenv", "os.chdir"):
        return
    _watching.append(f"{event} {arguments}")


def test_a_check_changes_nothing_on_the_disk(run: Run) -> None:
    (run.folder / "spf.toml").write_text("spf_base = 'nf4'\n", encoding="utf-8")
    run.args("spf_target=blonde hair", "spf_config=spf.toml", "spf_preview_every=10", "spf_network=lycoris.kohya")
    run.set(output_dir="out/new", logging_dir="logs", tokenizer_cache_dir="cache", cache_latents_to_disk=True)
    before = everything(run.folder)
    sys.addaudithook(_audit)
    _watching.append("begin")
    try:
        CliRunner().invoke(app, [str(run.config), "--tokenizer", str(TOKENIZER)])
        found = _watching[1:]
    finally:
        _watching.clear()
    assert found == []
    assert everything(run.folder) == before


@pytest.mark.parametrize(
    ("start", "options", "level"),
    [
        ("1000", {"max_train_epochs": 3}, "error"),  # 60 images an epoch
        ("180", {"max_train_epochs": 3}, "error"),
        ("179", {"max_train_epochs": 3}, None),
        ("45", {"max_train_epochs": 3, "train_batch_size": 4}, "error"),
        ("39", {"max_train_epochs": 3, "train_batch_size": 4, "validation_split": 0.2}, "warning"),  # unless buckets
        ("54", {"max_train_epochs": 3, "train_batch_size": 4}, "error"),
        ("44", {"max_train_epochs": 3, "train_batch_size": 4}, None),
        ("60", {"max_train_epochs": 3, "gradient_accumulation_steps": 3}, "error"),
        ("59", {"max_train_epochs": 3, "gradient_accumulation_steps": 3}, None),
        ("0.999", {"max_train_epochs": 3}, "error"),
        ("0.5", {"max_train_epochs": 3}, None),
    ],
)
def test_an_alignment_after_the_last_epoch(run: Run, start: str, options: dict[str, Any], level: str | None) -> None:
    run.args("spf_target=blonde hair", f"spf_stage2_start={start}")
    run.set(max_train_steps=None, **options)
    found = [finding.level for finding in look(run).findings if finding.code == "never-aligned"]
    assert found == ([level] if level else [])


def test_the_batch_size_of_a_dataset_and_regularisation_images_count(run: Run) -> None:
    run.args("spf_target=blonde hair", "spf_stage2_start=30")
    run.dataset(_own_subset(num_repeats=10).replace("resolution = 512", "resolution = 512\nbatch_size = 6"))
    run.set(max_train_steps=None, max_train_epochs=1, train_batch_size=1)
    (finding,) = [finding for finding in look(run).findings if finding.code == "never-aligned"]
    assert "the run ends at about step 10" in finding.message
    both = {"image_dir": "data/10_hair", "caption_extension": ".txt", "num_repeats": 10}
    shutil.copytree(run.images, run.folder / "reg")
    reg = {**both, "image_dir": "reg", "is_reg": True, "num_repeats": 1}
    run.dataset(toml.dumps({"datasets": [{"resolution": 512, "batch_size": 6, "subsets": [both, reg]}]}))
    (finding,) = [finding for finding in look(run).findings if finding.code == "never-aligned"]
    assert "about step 20" in finding.message


@pytest.mark.parametrize(
    ("caption", "options", "lost"),
    [
        ("a man, tree, blonde hair", {"caption_tag_dropout_rate": 0.2}, True),
        ("blonde hair, a man, tree", {"caption_tag_dropout_rate": 0.2, "keep_tokens": 1}, False),
        ("a man ||| blonde hair, tree", {"caption_tag_dropout_rate": 0.2, "keep_tokens_separator": "|||"}, True),
        ("blonde hair ||| a man, tree", {"caption_tag_dropout_rate": 0.2, "keep_tokens_separator": "|||"}, False),
        ("a man ||| tree ||| blonde hair", {"caption_tag_dropout_rate": 0.2, "keep_tokens_separator": "|||"}, False),
        ("blonde hair, a man", {"caption_tag_dropout_rate": 0.2, "keep_tokens_separator": "|||"}, True),
        ("a man, tree, blonde hair", {"token_warmup_step": 0.5}, True),
        ("blonde hair, a man, tree", {"token_warmup_step": 100}, False),
        ("a man, blonde hair, tree", {"token_warmup_step": 100, "token_warmup_min": 2}, False),
        ("a man, blonde hair, tree", {"token_warmup_step": 100, "keep_tokens": 1}, False),
        ("a man;;;blonde hair, tree", {"token_warmup_step": 100, "secondary_separator": ";;;"}, False),
        ("a man, blonde hair, tree", {}, False),
    ],
)
def test_a_target_that_dropout_or_warm_up_takes_away(
    run: Run, caption: str, options: dict[str, Any], lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run.captions(lambda _: caption)
    run.dataset(_own_subset(**options))
    assert ("target-dropped" in codes(look(run))) == lost
    with caplog.at_level("WARNING"):
        assert stops_of_the_run(run) == []
    assert ("takes the target out of 6 of 6 captions" in caplog.text) == lost


def test_epochs_without_captions(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for every, much in ((2, True), (5, False)):
        caplog.clear()
        run.dataset(_own_subset(caption_dropout_every_n_epochs=every))
        assert ("caption-dropout" in codes(look(run))) == much
        stops_of_the_run(run)
        assert ("up to 50% of the captions of 6 of 6 images are dropped" in caplog.text) == much


def test_captions_that_cache_info_keeps(run: Run) -> None:
    """The host reads them and no file, the edited one and new images neither; not where there is nothing yet."""
    run.dataset(_own_subset(cache_info=True))
    assert not look(run).findings
    _kept_info(run)
    (run.images / "p6.png").write_bytes((run.images / "p0.png").read_bytes())
    report = look(run)
    assert report.rows[0].prompt.full == CAPTIONS[0]
    assert report.images == 6
    assert "1 captions are not those of their files, e.g. p0.txt" in str(report.findings)
    run.caption(0, CAPTIONS[0])
    assert "stops" not in codes(look(run))
    (run.images / "metadata_cache.json").write_text("[", encoding="utf-8")
    assert "metadata" in codes(look(run), "error")


def test_an_output_folder_that_the_run_could_not_make(run: Run) -> None:
    run.set(output_dir="run.toml/loras")
    assert "output_dir run.toml/loras: nothing can be written there: Not a directory." in str(look(run).findings)
    run.set(output_dir="new/loras")
    assert not look(run).findings


def test_spf_config_is_found_beside_the_data(run: Run) -> None:
    (run.folder / "data" / "hair.toml").write_text("spf_target = 'blonde hair'\nspf_map = 'paper'\n", encoding="utf-8")
    run.args("spf_config=hair.toml")
    report = look(run)
    assert not report.findings
    assert report.config is not None
    assert report.config.map == "paper"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope.toml"], "there is no such file"),
        (["run.toml", "--taget", "x"], "did you mean target"),
        (["run.toml", "stray"], "stray word 'stray'"),
        (["run.toml", "--seed", "1", "2"], "stray word '2'"),
        (["run.toml", "--max-train-steps", "7"], "did you mean max_train_steps"),
        (["run.toml", "--seed"], "argument --seed: expected one argument"),
        (["run.toml", "--seed", "x", "--max_train_steps"], "2 problems"),
        (["run.toml", "--sdpa", "true"], "stray word 'true'"),
        (["run.toml", "--network_args", "spf_map=soft", "--network_args", "conv_dim=4"], "is given 2 times"),
        (["run.toml", "--seed", "x"], "--seed takes a whole number, not 'x'"),
        (["run.toml", "--mixed_precision", "fp8"], "--mixed_precision takes one of no, fp16, bf16, not 'fp8'"),
        (["bad.toml"], "bad.toml is not valid TOML"),
        (["windows.toml"], "write paths with / or in single quotes"),
    ],
)
def test_what_cannot_be_read(run: Run, words: list[str], says: str) -> None:
    (run.folder / "bad.toml").write_text("seed = \n", encoding="utf-8")
    (run.folder / "windows.toml").write_text('train_data_dir = "C:\\photos"\n', encoding="utf-8")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert says in result.output


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "kind"),
    [
        ("hats", "hat", "plural"),
        ("sunglass", "sunglasses", "plural"),
        ("dresses", "dress", "plural"),
        ("t shirt", "t-shirt", "hyphen"),
        ("tshirt", "T-shirt", "hyphen"),
        ("blond hair", "blonde hair", "typo"),
        ("frekcles", "freckles", "typo"),
        ("hair blonde", "blonde hair", "order"),
        ("brown hair", "blonde hair", None),
        ("red jacket", "red hat", None),
        ("cat", "hat", None),
        ("bald", "beard", None),
    ],
)
def test_near_misses(text: str, target: str, kind: str | None) -> None:
    assert kind_of(text, target) == kind


def test_what_goes_with_the_target(run: Run) -> None:
    """27 of 28 with sunglasses also say beach; the word counts through different phrases, and is counted by images."""
    for path in run.images.iterdir():
        path.unlink()
    from PIL import Image

    for i in range(36):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(run.images / f"p{i}.png")
        place = ("on a beach", "beach at night", "sunny beach")[i % 3] if i < 27 else f"room number {chr(97 + i % 9)}"
        run.caption(i, f"a woman, {place}" + (", sunglasses" if i < 28 else ", hat"))
    run.args("spf_target=sunglasses")
    report = look(run)
    assert together(report.rows)[0] == ("beach", 27, 28, 0, 8)
    assert "27 of 28 images with 'sunglasses' also say 'beach' (without it 0 of 8)" in str(report.findings)


# -- the run's own rules -----------------------------------------------------------------------------------------------


def _xl(run: Run, **options: object) -> None:
    run.set(pretrained_model_name_or_path="sd_xl_base_1.0.safetensors", cache_text_encoder_outputs=True, **options)


def _changed_caption(run: Run) -> None:
    _xl(run, cache_text_encoder_outputs_to_disk=True)
    (run.images / "p0_te_outputs.npz").write_bytes(b"")
    os.utime(run.images / "p0_te_outputs.npz", (1000, 1000))


def _kept_info(run: Run) -> None:
    """What the host wrote at an earlier run; then a caption was edited."""
    rows = {}
    for path in sorted(run.images.glob("*.png")):
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        rows[str(path)] = {"caption": caption, "resolution": [16, 16]}
    (run.images / "metadata_cache.json").write_text(json.dumps(rows), encoding="utf-8")
    run.caption(0, "a boy, blonde hair")


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
    "prefix not cached": lambda r: (r.dataset(_own_subset(caption_prefix="a photo of")), _xl(r)),
    "old cache": _changed_caption,
    "network on a base": lambda r: r.args("spf_target=blonde hair", "spf_base=int8", "spf_network=networks.dylora"),
    "algorithm on a base": lambda r: r.args(
        "spf_target=blonde hair", "spf_base=int8", "spf_network=lycoris.kohya", "algo=full", "bypass_mode=True"
    ),
    "decomposed base": lambda r: r.args(
        "spf_target=blonde hair", "spf_base=int8", "spf_network=lycoris.kohya", "dora_wd=True"
    ),
    "two small bases": lambda r: (r.args("spf_target=blonde hair", "spf_base=int8"), r.set(fp8_base=True)),
    "unreadable target": lambda r: r.dataset(_own_subset(custom_attributes={"spf_target": "hat->"})),
    "no target": lambda r: r.args("spf_map=soft"),
    "absent target": lambda r: r.args("spf_target=green hair"),
    "absent target of a subset": lambda r: r.dataset(_own_subset(custom_attributes={"spf_target": "hat|wings"})),
    "empty captions": lambda r: r.captions(lambda caption: ""),
    "cut targets": lambda r: r.captions(lambda caption: "a tree, " * 40 + caption),
    "cut targets of a longer text": lambda r: (
        r.captions(lambda caption: "a tree, " * 80 + caption),
        r.set(max_token_length=225),
    ),
    "no caption at any step": lambda r: r.dataset(_own_subset(caption_dropout_every_n_epochs=1)),
    "captions kept by cache_info": lambda r: (r.dataset(_own_subset(cache_info=True)), _kept_info(r)),
    "nothing but the target": lambda r: r.captions(lambda caption: "blonde hair"),
    "masks drop a target": lambda r: r.dataset(
        _own_subset(custom_attributes={"spf_target": "hat"}, conditioning_data_dir="masks")
    ),
    "wildcards not read": lambda r: (
        r.dataset(_own_subset(enable_wildcard=True)),
        r.caption(0, "a {man|woman}, blonde hair"),
        _xl(r),
    ),
    "separator not read": lambda r: (
        r.dataset(_own_subset(secondary_separator=";;;")),
        r.caption(0, "a man;;;blonde hair"),
        _xl(r),
    ),
    "many": _every_option,
}


def _own_subset(**options: object) -> str:
    own = {"image_dir": "data/10_hair", "caption_extension": ".txt", **options}
    return toml.dumps({"datasets": [{"resolution": 512, "subsets": [own]}]})


def _estimating(text: str, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(input_ids=tokens.estimate(text))


def stops_of_the_run(run: Run) -> list[str]:
    """What the running host says of this run, over a training frame in small."""
    options = toml.loads(run.config.read_text(encoding="utf-8"))
    defaults: dict[str, Any] = dict.fromkeys(("network_train_text_encoder_only", "train_data_dir", "dataset_config"))
    args = SimpleNamespace(**{**defaults, **options})
    subset = SimpleNamespace(caption_extension=".txt")
    if args.dataset_config:
        own = toml.loads((run.folder / args.dataset_config).read_text(encoding="utf-8"))["datasets"][0]["subsets"][0]
        subset = SimpleNamespace(**own)
    images = {
        path.name: SimpleNamespace(
            caption=path.with_suffix(".txt").read_text(encoding="utf-8"), absolute_path=str(path), is_reg=False
        )
        for path in sorted(run.images.glob("*.png"))
    }
    kept = run.images / "metadata_cache.json"
    if kept.is_file():
        for key, row in json.loads(kept.read_text(encoding="utf-8")).items():
            images[Path(key).name].caption = row["caption"]
    subsets = {"image_to_subset": dict.fromkeys(images, subset)}
    data = SimpleNamespace(image_data=images, **subsets)
    if hasattr(subset, "conditioning_data_dir"):  # the host's ControlNetDataset
        subset.custom_attributes = {}
        data = SimpleNamespace(image_data=images, dreambooth_dataset_delegate=SimpleNamespace(**subsets))
    trainer = SimpleNamespace(is_sdxl="xl" in args.pretrained_model_name_or_path)
    args.weighted_captions = False
    names = {"self": trainer, "args": args, "train_dataset_group": SimpleNamespace(datasets=[data])}
    host = KohyaHost({**names, "tokenizers": _estimating}, [])
    return host.problems(read_words(args.network_args, host.folders()).config)


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


# -- trainers of diffusion transformers -------------------------------------------------------------------------------


def test_the_trainer_is_found(run: Run) -> None:
    anima = {"qwen3": "q.safetensors", "vae": "v.safetensors"}
    assert check(run.config, {}).limit == 75
    assert check(run.config, anima).limit == 511
    assert check(run.config, {**anima, "t5_max_token_length": 100}).limit == 99
    run.config.write_text(run.config.read_text() + "# accelerate launch anima_train_network.py\n")
    run.set(pretrained_model_name_or_path="model.safetensors")
    run.config.write_text(run.config.read_text() + "# accelerate launch anima_train_network.py\n")
    assert check(run.config, {}).limit == 511
    assert check(run.config, {}, script=named("sdxl_train_network.py")).limit == 75


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_the_script_may_come_first_as_on_the_line_that_starts_it(run: Run, script: Any) -> None:
    run.set(**{part: f"{part}.safetensors" for part in script.parts})
    words = [f"sd-scripts/{script.file}", str(run.config), "--tokenizer", "none"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    known = not script.is_dit or script.trainer in DITS
    assert ("ready to train" in result.output) == (known and script.name != "flux_train_network"), result.output
    assert f"{script.text_limit(SimpleNamespace())} fit" in result.output
    assert known or f"this is a run of {script.file}" in result.output
    unknown = CliRunner().invoke(app, [*words, "--nothing", "1"])
    assert unknown.exit_code == 2
    assert f"--nothing is no option of {script.file}" in unknown.stderr


def test_every_transformer_lacks_what_it_is_not_told(run: Run) -> None:
    for script in SCRIPTS:
        report = check(run.config, {}, script=script)
        missing = [f.message for f in report.findings if f.code == "no-part"]
        assert bool(missing) == bool(script.parts and script.supported), script.name
        assert all(part in missing[0] for part in script.parts if missing)


def test_a_model_of_another_trainer(run: Run) -> None:
    write_header(run.folder / "model.safetensors", "net.blocks.0.cross_attn.q_proj.weight", "net.llm_adapter.x.weight")
    run.set(pretrained_model_name_or_path=str(run.folder / "model.safetensors"))
    report = check(run.config, {}, script=named("sdxl_train_network"))
    (found,) = [f for f in report.findings if f.code == "other-model"]
    assert found.message.endswith("is a model of Anima, and sdxl_train_network.py trains SDXL")
    assert "anima_train_network.py" in found.fix


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("anima", "llm_adapter.blocks.0.cross_attn.q_proj.weight"),
        ("sd3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        ("flux", "double_blocks.0.img_attn.qkv.weight"),
        ("chroma", "distilled_guidance_layer.in_proj.weight"),
        ("lumina", "noise_refiner.0.attention.qkv.weight"),
        ("hunyuan_image", "byt5_in.layernorm.weight"),
    ],
)
def test_a_file_says_what_it_is(tmp_path: Path, model: str, key: str) -> None:
    also = ["double_blocks.0.img_attn.qkv.weight"] if model == "chroma" else []
    write_header(tmp_path / "m.safetensors", key, *also)
    assert family.of_model(str(tmp_path / "m.safetensors")) == model


def test_cached_text_of_a_transformer_that_is_older_than_its_caption(run: Run) -> None:
    anima(run, cache_text_encoder_outputs_to_disk=True)
    cache = run.images / "p0_anima_te.npz"
    cache.write_bytes(b"x")
    os.utime(cache, (1, 1))
    (found,) = [f.message for f in look(run).findings if f.level == "error"]
    assert "p0_anima_te.npz" in found
    assert "Delete the *_anima_te.npz files" in found


def write_header(path: Path, *names: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, path)


# -- against the real host --------------------------------------------------------------------------------------------

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
        ("kept", "", lambda r: (r.dataset(_own_subset(cache_info=True)), _kept_info(r))),
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


# -- what the pictures share ------------------------------------------------------------------------------------------


def shared(folder: Path, target: str, **options: Any) -> list[Any]:
    write_set(folder, target, **options)
    report = check(folder, {}, target=TARGETS[target].phrase, tokenizer=folder / "none")
    return [finding for finding in report.findings if finding.code == "same-border"]


@pytest.mark.parametrize("target", ["sunglasses", "blonde", "hat"])
def test_the_demos_pollution_is_seen(target: str, tmp_path: Path) -> None:
    (finding,) = shared(tmp_path, target)
    assert finding.level == "warning"
    assert "23 of 24 images" in finding.message
    assert "same red border, and none of their captions says anything of a background" in finding.message
    labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))["images"]
    polluted = {Path(row["file"]).name for row in labels if row["polluted"]}
    assert {Path(name).name for name in finding.images} == polluted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"pollution": 0.0}, {"mentioned": 1.0}, {"pollution": 0.5}])
def test_a_clean_or_well_captioned_set_is_not_accused(options: dict[str, float], seed: int, tmp_path: Path) -> None:
    assert not shared(tmp_path, "sunglasses", seed=seed, **options)


def test_a_border_that_images_without_the_target_have_too(tmp_path: Path) -> None:
    images = write_set(tmp_path, "sunglasses")
    for path in sorted(images.glob("*.txt"))[::2]:
        path.write_text("a woman in a coat\n", encoding="utf-8")
    found = check(tmp_path, {}, target="sunglasses", tokenizer=tmp_path / "none").findings
    assert "same-border" not in {finding.code for finding in found}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_has_a_border(mode: str) -> None:
    from PIL import Image

    image = Image.new("RGB", (40, 30), (250, 250, 250)).convert("L" if mode == "I;16" else mode).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(256)
    colour = borders.border(image)
    assert colour is not None
    assert borders.colour_name(colour) == "white"


def test_a_street_has_no_border() -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    assert borders.border(Image.fromarray(noise)) is None
    half = Image.new("RGB", (64, 64), "white")
    half.paste((20, 60, 20), (0, 0, 30, 64))
    assert borders.border(half) is None


def test_colours_are_measured_as_opencv_does() -> None:
    import cv2

    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    assert np.abs(borders.to_lab(colours) - theirs).max() < 0.5
    for name, rgb in (("white", (250, 250, 250)), ("red", (200, 30, 30)), ("brown", (90, 60, 40))):
        assert borders.colour_name(borders.to_lab(rgb)) == name
