"""Commands of the embedded model that write what is shipped: here into another folder, and small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from portraitlab import evaluate_base, model_card
from portraitlab.captions import TARGETS
from portraitlab.judge import CHOICES, load_judge, predict
from portraitlab.model_files import DIT_FOLDER, JUDGE_FILE, MODEL_FOLDER, load_pipeline, sample
from portraitlab.portraits import FLAGS


@pytest.mark.parametrize(
    ("folder", "facts"),
    [
        (MODEL_FOLDER, ("training.json", "scores.json", "judge/accuracy.json")),
        (DIT_FOLDER, ("training.json", "scores.json")),  # the judge is the first model's
    ],
)
def test_the_shipped_card_is_what_its_command_writes(tmp_path: Path, folder: Path, facts: tuple[str, ...]) -> None:
    for name in facts:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, tmp_path / name)
    done = CliRunner().invoke(model_card.app, ["--model", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for file in (tmp_path, folder):
        assert (file / "README.md").is_file()
    assert (tmp_path / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert not (tmp_path / "README.part").exists()


def test_the_second_base_is_fit() -> None:
    """Its card's own claims: colours are those of the caption, new words are never drawn, weak ones sometimes."""
    scores = json.loads((DIT_FOLDER / "scores.json").read_text(encoding="utf-8"))
    assert all(scores["shares"][name] >= 0.9 for name in ("hair_colour", "clothes_colour", "background"))
    kinds = {kind: [n for n, target in TARGETS.items() if target.kind == kind] for kind in ("weak", "new")}
    assert all(scores["targets"][name]["with"] == 0 for name in kinds["new"])
    assert any(scores["targets"][name]["with"] > 0 for name in kinds["weak"])


def test_the_second_base_draws_each_colour_where_it_belongs() -> None:
    """What is shipped does, and not its card alone: two colours, either way round, and a hat that it never saw."""
    texts = [
        "a woman, black hair, red jacket, yellow background",
        "a woman, black hair, yellow jacket, red background",
        "a man, grey hair, blue hoodie, green background",
        "a man, grey hair, green hoodie, blue background",
        "a man, grey hair, blue hoodie, green background, hat",
    ]
    images = sample(load_pipeline(DIT_FOLDER), texts, [4, 4, 4, 4, 4], steps=10)
    seen = predict(load_judge(JUDGE_FILE), images)
    colours = [(one["hair_colour"], one["clothes_colour"], one["background"]) for one in seen[:4]]
    assert colours == [
        ("black", "red", "yellow"),
        ("black", "yellow", "red"),
        ("grey", "blue", "green"),
        ("grey", "green", "blue"),
    ]
    assert seen[4]["hat"] < 0.5


def test_scores_of_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures of two steps: what is written is a share for each attribute, and a sheet."""
    monkeypatch.chdir(tmp_path)  # the default picture is the shipped one
    words = ["--count", "2", "--targets", "0", "--steps", "2", "--picture", "a/sheet.png", "--scores", "b/scores.json"]
    done = CliRunner().invoke(evaluate_base.app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "b" / "scores.json").read_text(encoding="utf-8"))
    assert (found["prompts"], found["steps"]) == (2, 2)
    assert set(found["shares"]) <= {*CHOICES, *FLAGS, "all"}
    assert len(found["shares"]) > 4
    assert all(share in (0, 0.5, 1) or 0 < share < 1 for share in found["shares"].values())
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.height >= 128
        assert len(set(sheet.convert("L").getdata())) > 20  # something is drawn
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("a", "b")] == []
