"""The lab's bookkeeping: what a result is filed under, resuming, and the table. Rows themselves are run by people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from portraitlab import lab
from spf_plugin.config import PREFIX, parse


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    return tmp_path / "model"


def test_every_row_has_valid_settings() -> None:
    for row in lab.ROWS.values():
        config = parse({PREFIX + name: value for name, value in row.spf.items()})
        assert set(row.training) <= {"steps", "learning_rate", "rank"}
        assert config is not None


def test_a_result_is_filed_under_all_it_depends_on(model: Path) -> None:
    task, row = lab.Task(), lab.ROWS["spf"]
    keys = {
        lab.key(task, row, 0, model),
        lab.key(task, row, 1, model),
        lab.key(task, lab.ROWS["spf-100"], 0, model),
        lab.key(lab.Task(steps=100), row, 0, model),
        lab.key(lab.Task(clean=True), row, 0, model),
    }
    assert len(keys) == 5
    assert lab.key(task, row, 0, model) in keys
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"others")
    assert lab.key(task, row, 0, model) not in keys


def test_a_second_run_computes_only_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    class Measuring:
        base_without = base_with = None

        def __init__(self, *_: Any):
            pass

        def scores(self, *_: Any) -> dict[str, float]:
            return {"response": 0.0}

    def run_row(task: Any, row: Any, seed: int, *_: Any) -> dict[str, float]:
        if seed == 1 and len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(seed)
        return {"response": seed / 10}

    monkeypatch.setattr(lab, "Measuring", Measuring)
    monkeypatch.setattr(lab, "run_row", run_row)
    words = ["run", "--rows", "spf", "--seeds", "0,1,2", "--out", str(tmp_path / "lab"), "--model", str(model)]
    first = CliRunner().invoke(lab.app, words)
    assert first.exit_code == 130
    assert "the same command goes on" in first.output
    ran.append(-1)
    second = CliRunner().invoke(lab.app, words, env={"COLUMNS": "200"})
    assert second.exit_code == 0, second.output
    assert ran == [0, -1, 1, 2]
    assert "0.10 (0.06)" in second.output  # mean and standard error of 0, .1, .2
    files = list((tmp_path / "lab" / "results").glob("*.json"))
    assert len(files) == 4  # three seeds and the base model
    assert all(json.loads(f.read_text())["task"]["target"] == "blonde" for f in files)


def test_unknown_rows_and_targets_are_named_at_once(model: Path) -> None:
    done = CliRunner().invoke(lab.app, ["run", "--rows", "spff,plain", "--target", "wig", "--model", str(model)])
    assert done.exit_code == 2
    assert "no row 'spff'; did you mean spf?" in done.output
    assert "choose one of blonde" in done.output


def test_table_gives_mean_and_standard_error() -> None:
    found = [{"row": "spf", "scores": {"response": r, "drift": d}} for r, d in ((0.5, 0.001), (0.7, 0.003))]
    console = Console(width=200, record=True)
    console.print(lab.table_of(found))
    text = console.export_text()
    assert "0.60 (0.10)" in text
    assert f"2.0 ({math.sqrt(2) / math.sqrt(2):.1f})" in text
