"""What of sd-scripts' own rules the check knows: subsets, options, epochs, folders."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import toml
from typer.testing import CliRunner

from spf_plugin.tools.cli import check as cli_check
from spf_plugin.tools.cli.check import app
from tests.check.conftest import codes, kept_info, look, own_subset, stops_of_the_run
from tests.check_sets import CAPTIONS, Run, everything

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "portraitlab" / "model" / "tokenizer"


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
    before, words = everything(run.folder), [str(run.config), "--tokenizer", str(TOKENIZER)]
    CliRunner().invoke(app, words)  # what torch makes for itself when it is imported is not the check's
    sys.addaudithook(_audit)
    _watching.append("begin")
    try:
        CliRunner().invoke(app, words)
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
    run.dataset(own_subset(num_repeats=10).replace("resolution = 512", "resolution = 512\nbatch_size = 6"))
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
    run.dataset(own_subset(**options))
    assert ("target-dropped" in codes(look(run))) == lost
    with caplog.at_level("WARNING"):
        assert stops_of_the_run(run) == []
    assert ("takes the target out of 6 of 6 captions" in caplog.text) == lost


def test_epochs_without_captions(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for every, much in ((2, True), (5, False)):
        caplog.clear()
        run.dataset(own_subset(caption_dropout_every_n_epochs=every))
        assert ("caption-dropout" in codes(look(run))) == much
        stops_of_the_run(run)
        assert ("up to 50% of the captions of 6 of 6 images are dropped" in caplog.text) == much


def test_captions_that_cache_info_keeps(run: Run) -> None:
    """The host reads them and no file, the edited one and new images neither; not where there is nothing yet."""
    run.dataset(own_subset(cache_info=True))
    assert not look(run).findings
    kept_info(run)
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
        (["nope.toml"], "there is no such file or folder. Relative paths begin in "),
        (["sdxl_train_netwrok.py", "run.toml"], "did you mean sdxl_train_network.py? Name one such as"),
        (["zimage_train.py", "run.toml"], "zimage_train.py is no trainer of LoRAs that SPF knows"),
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
        (["marked.toml"], "marked.toml begins with a byte order mark"),
        (["--dataset_config", "marked.json"], "marked.json begins with a byte order mark"),
        (["windows.toml"], "write paths with / or in single quotes"),
    ],
)
def test_what_cannot_be_read(run: Run, words: list[str], says: str) -> None:
    (run.folder / "bad.toml").write_text("seed = \n", encoding="utf-8")
    (run.folder / "marked.toml").write_text("seed = 1\n", encoding="utf-8-sig")
    (run.folder / "marked.json").write_text("{}", encoding="utf-8-sig")
    (run.folder / "windows.toml").write_text('train_data_dir = "C:\\photos"\n', encoding="utf-8")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert says in result.output
