"""The lab's bookkeeping: what a result is filed under, resuming, curves, tables, plots. Rows are trained by people."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from portraitlab.captions import find_target
from portraitlab.judge import load_judge, predict, probability
from portraitlab.lab import app, peers, plots, results, running, tables, training
from portraitlab.lab.curves import at_response
from portraitlab.lab.measuring import Evaluator, kernel_distance
from portraitlab.lab.results import Result
from portraitlab.lab.rows import ROWS, Row
from portraitlab.lab.tasks import Task
from portraitlab.measure import untouched_region
from portraitlab.model_files import JUDGE_FILE
from portraitlab.portraits import render, sample_person
from spf_plugin.core import losses, sfcm


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    return tmp_path / "model"


def made(row: str, rate: float, shows: float, drift: float, seed: int = 0, task: Task | None = None) -> Result:
    scores = dict.fromkeys(tables.COMMON, 0.0) | {
        "response_explicit": shows, "response_partial": shows, "drift_explicit": drift, "drift_partial": 2 * drift
    }  # fmt: skip
    return Result(f"{row}-{rate}-{seed}-{task}", row, rate, seed, (task or Task()).facts, scores)


# -- rows and results -------------------------------------------------------------------------------------------------


def test_a_set_of_one_person_is_a_task_of_its_own(tmp_path: Path) -> None:
    """What is shared and looked for is hers, and where the jacket is, is known."""
    task = Task("jacket", data="one-person")
    assert task.shared == {"hair_colour": "red", "skin": "light"}
    assert Task("jacket").shared == {"background": "red"}  # the jacket of a polluted set is the target's own
    assert Task().shared == {"background": "red", "clothes_colour": "purple"}
    assert Task("blonde", data="one-person").shared == {"skin": "light"}
    images = task.write(tmp_path, 0)
    labels = json.loads((images / "labels.json").read_text(encoding="utf-8"))
    assert labels["pollution"]["hair_colour"] == "red"
    assert {row["labels"]["skin"] for row in labels["images"]} == {"light"}
    masks = task.masks(0)
    assert masks[:, :, 13:].mean() > 0.5  # below the face
    assert masks[:, :, :9].max() == 0
    assert task.evaluation() == Task.of(task.facts).evaluation()


def test_two_targets_and_a_style_are_tasks(tmp_path: Path) -> None:
    """Each picture's mask is its own target's; a style is everywhere, and its jacket is looked for, too."""
    both = Task("sunglasses+blonde")
    assert torch.equal(both.masks(0), torch.cat([Task("sunglasses").masks(0), Task("blonde").masks(0)]))
    assert len(list(both.write(tmp_path, 0).glob("10_*/*.png"))) == 48
    assert [str(target) for target in ROWS["spf"].config(both).target] == ["sunglasses", "blonde hair"]
    ink = Task("ink", data="one-person")
    assert ink.masks(0).min() == 1
    assert ink.shared == {"hair_colour": "red", "skin": "light", "clothes_colour": "purple"}
    assert Task("ink").shared == {"background": "red", "clothes_colour": "purple"}


def test_what_shows_where_only_one_of_two_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws blonde hair with the sunglasses, sunglasses by their word alone, and all clothes blue."""
    task = Task("sunglasses+blonde", prompts=4)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.task, evaluator.style, evaluator.judge = task, None, load_judge(JUDGE_FILE)
    evaluator.prompts, evaluator.bare = task.evaluation(), [0, 1, 4, 5]
    evaluator.untouched = {part.name: untouched_region(part, people=20) for part in task.goal.parts}
    people = [prompt.person.with_(clothes_colour="red", hair_colour="black") for prompt in evaluator.prompts]
    evaluator.base = np.stack([render(person)[0] for person in people])
    drawn: list[Any] = []

    def draw(_: Any, texts: list[str], seeds: list[int], label: str) -> Any:
        assert seeds == [evaluator.prompts[i].seed for i in evaluator.bare]
        changes = {"hair_colour": "blonde", "clothes_colour": "blue", "sunglasses": label == "sunglasses"}
        assert all(text.endswith(f", {find_target(label).phrase}") for text in texts)
        drawn.append(np.stack([render(people[i].with_(**changes))[0] for i in evaluator.bare]))
        return drawn[-1]

    monkeypatch.setattr(evaluator, "_draw", draw)
    found = evaluator._at_once(None)
    assert found["first_alone"] > 0.9
    assert found["second_alone"] > 0.9
    assert found["first_bled"] < 0.1
    assert found["second_bled"] > 0.9
    change = [
        (((images / 255 - evaluator.base[evaluator.bare] / 255) ** 2)[:, evaluator.untouched[name]]).mean()
        for images, name in zip(drawn, ("sunglasses", "blonde"), strict=True)
    ]
    assert found["drift_alone"] == pytest.approx(np.mean(change), rel=1e-5)


def test_every_row_can_be_trained() -> None:
    for name, row in ROWS.items():
        config = row.config(Task())
        assert str(config.target[0]) == "sunglasses"
        if row.peer:
            assert config.active == row.with_spf, name
            peers.KINDS[row.peer](**row.options)
    assert ROWS["spf"].config(Task("shades")).target[0].replacement == "glasses"


def test_a_result_is_filed_under_all_it_depends_on(model: Path, tmp_path: Path) -> None:
    task, row = Task(), ROWS["spf"]
    keys = {
        results.key(task, row, 1e-3, 0, model),
        results.key(task, row, 1e-3, 1, model),
        results.key(task, row, 2e-3, 0, model),
        results.key(task, None, 0, 0, model),
        results.key(task, ROWS["dop-1"], 1e-3, 0, model),
        results.key(task, ROWS["dop-10"], 1e-3, 0, model),
        results.key(task, ROWS["spf-map-paper"], 1e-3, 0, model),
        results.key(replace(task, steps=100), row, 1e-3, 0, model),
        results.key(replace(task, data="clean"), row, 1e-3, 0, model),
        results.key(replace(task, sequence=("hat", "sunglasses")), row, 1e-3, 0, model),
    }
    assert len(keys) == 10
    assert results.key(Task.of(json.loads(json.dumps(task.facts))), row, 1e-3, 0, model) in keys
    other = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"others")
    assert results.key(task, row, 1e-3, 0, tmp_path / "other") not in keys


def test_a_row_may_change_a_constant_while_it_trains(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the package, for the one training; and its result has a name of its own."""
    seen = []
    monkeypatch.setattr(training, "timed_training", lambda *_: (seen.append(losses.MAX_NOISE_WEIGHT), 0.0))
    before = losses.MAX_NOISE_WEIGHT
    for name in ("spf", "spf-noise-weight-1"):
        training.train_row(Task(), ROWS[name], 1e-3, 0, model, tmp_path / "loras" / "x", "cpu", "x", lambda *_: None)
    assert seen == [before, 1]
    assert before == losses.MAX_NOISE_WEIGHT
    keys = {results.key(Task(), ROWS[name], 1e-3, 0, model) for name in ("spf", "spf-noise-weight-1")}
    assert len(keys) == 2


def test_results_are_read_back_and_published_in_a_stable_order(tmp_path: Path) -> None:
    found = [made("spf", 2e-3, 0.8, 0.002, seed) for seed in (1, 0)]
    found.append(made("plain", 2e-3, 0.9, 0.01, task=Task("beard", sequence=("hat", "beard"))))
    for result in found:
        results.write(tmp_path / "results", result)
    assert not list((tmp_path / "results").glob("*.part"))
    published = tmp_path / "lab.jsonl"
    results.publish(results.read(tmp_path / "results", published).values(), published)
    first = published.read_bytes()
    read = results.read(tmp_path / "nothing", published)
    assert {key: read[key] for key in read} == {result.key: result for result in found}
    results.publish(reversed(list(read.values())), published)
    assert published.read_bytes() == first
    assert {task.sequence for task in results.tasks(read.values())} == {(), ("hat", "beard")}


class FakeEvaluator:
    """Draws nothing and scores everything alike."""

    base = np.zeros((4, 8, 8, 3), np.uint8)

    def __init__(self, task: Task, *_: Any):
        self.task = task

    def draw(self, *_: Any) -> tuple[Any, Any]:
        return self.base, self.base

    def scores(self, *_: Any) -> dict[str, float]:
        return dict(made("spf", 0, 0.5, 0.0).scores)


def test_a_second_run_computes_only_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    class Evaluator(FakeEvaluator):
        def scores(self, *_: Any) -> dict[str, float]:
            return dict(made("spf", 0, (ran or [0])[-1] / 10, 0.0).scores)

    def train_row(task: Task, row: Row, rate: float, seed: int, *_: Any) -> float:
        if seed == 1 and len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(seed)
        return 0.1

    monkeypatch.setattr(running, "Evaluator", Evaluator)
    monkeypatch.setattr(running, "train_row", train_row)
    monkeypatch.setattr(running, "load_with", lambda *_: None)
    words = ["run", "--rows", "spf", "--seeds", "0,1,2", "--out", str(tmp_path / "lab"), "--model", str(model)]
    first = CliRunner().invoke(app.app, words)
    assert first.exit_code == 130
    assert "the same command goes on" in first.output
    ran.append(-1)
    second = CliRunner().invoke(app.app, words, env={"COLUMNS": "300"})
    assert second.exit_code == 0, second.output
    assert "1 of 3 LoRAs are measured already" in second.output
    assert ran == [0, -1, 1, 2]
    assert "0.10 (0.06)" in second.output  # mean and standard error of 0, .1, .2
    assert len(list((tmp_path / "lab" / "results").glob("*.json"))) == 4  # three seeds and the untuned model

    # Published, they count as measured for everybody, and can be measured again all the same.
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "lab.jsonl")
    results.publish(results.stored(tmp_path / "lab" / "results").values())
    words[words.index("--out") + 1] = str(tmp_path / "anew")
    third = CliRunner().invoke(app.app, words)
    assert "3 of 3 LoRAs are measured already" in third.output
    assert ran == [0, -1, 1, 2]
    fourth = CliRunner().invoke(app.app, [*words, "--fresh"])
    assert "0 of 3 LoRAs are measured already" in fourth.output
    assert ran == [0, -1, 1, 2, 0, 1, 2]
    assert len(list((tmp_path / "anew" / "results").glob("*.json"))) == 4
    fifth = CliRunner().invoke(app.app, [*words, "--fresh"])
    assert "3 of 3 LoRAs are measured already" in fifth.output


def test_all_present_rows_are_one_word(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train_row(task: Task, row: Row, *_: Any) -> float:
        trained.extend(name for name, known in ROWS.items() if known is row)
        return 0.1

    monkeypatch.setattr(running, "Evaluator", FakeEvaluator)
    monkeypatch.setattr(running, "train_row", train_row)
    monkeypatch.setattr(running, "load_with", lambda *_: None)
    words = ["run", "--rows", "all", "--fresh", "--seeds", "0", "--out", str(tmp_path / "lab"), "--model", str(model)]
    assert CliRunner().invoke(app.app, words).exit_code == 0
    assert trained == [name for name in ROWS if not name.startswith("spf-phrase-weight-1")]


def test_the_list_names_everything_that_a_row_changes() -> None:
    shown = {line.split()[0]: line.split()[1:] for line in CliRunner().invoke(app.app, ["list"]).output.splitlines()}
    assert set(shown) == set(ROWS)
    assert shown["spf"] == []
    assert shown["dop-10"] == ["dop", "multiplier=10.0"]
    assert shown["spf-noise-weight-3-300-steps"] == ["losses.MAX_NOISE_WEIGHT=3", "steps=300"]
    assert shown["spf-phrase-weight-1-batch-1"] == ["batch_1", "sfcm.MAX_PHRASE_WEIGHT=1.0"]


def test_earlier_defaults_of_the_map_can_be_trained_again() -> None:
    """Every way of SPF with the `soft` map, and no other: nothing of it depends on a map that takes no shares."""
    former = {name: row for name, row in ROWS.items() if name.startswith("spf-phrase-weight-1")}
    for name, row in former.items():
        now = ROWS[name.replace("-phrase-weight-1", "", 1)]
        assert row == replace(now, constants={**now.constants, "sfcm.MAX_PHRASE_WEIGHT": 1.0})
        assert row.config(Task()).map == "soft"
    others = {
        name for name in ROWS if name.startswith("spf") and name.replace("spf", "spf-phrase-weight-1", 1) not in ROWS
    }
    assert {name for name in others - set(former) if ROWS[name].config(Task()).map == "soft"} == {
        "spf-phrase-weight-0.75-300-steps"
    }


def test_targets_are_taught_one_after_the_other(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, Path]] = []
    loaded: list[tuple[Path, int]] = []

    class Pipeline:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "model_index.json").write_text("{}")

    def train_row(task: Task, row: Row, rate: float, seed: int, on: Path, *_: Any) -> float:
        trained.append((task.target, on))
        return 0.1

    def load_with(on: Path, loras: list[Path], device: str) -> Pipeline:
        loaded.append((on, len(loras)))
        return Pipeline()

    monkeypatch.setattr(running, "Evaluator", FakeEvaluator)
    monkeypatch.setattr(running, "train_row", train_row)
    monkeypatch.setattr(running, "load_with", load_with)
    out = tmp_path / "lab"
    words = ["sequence", "--targets", "blonde,beard,hoodie", "--rows", "spf", "--out", str(out), "--model", str(model)]
    done = CliRunner().invoke(app.app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert [name for name, _ in trained] == ["blonde", "beard", "hoodie"]
    assert trained[0][1] == model
    assert all(on.parent == out / "merged" for _, on in trained[1:])  # the earlier LoRAs are part of the model
    assert trained[1][1] != trained[2][1]
    assert {on for on, _ in loaded} == {model}  # measured on the untuned model with all LoRAs so far
    found = results.read(out / "results", tmp_path / "none").values()
    assert sorted((len(r.task["sequence"]), r.task["target"]) for r in found) == [
        (1, "blonde"), (2, "beard"), (2, "blonde"), (3, "beard"), (3, "blonde"), (3, "hoodie")
    ]  # fmt: skip
    assert "3. hoodie" in done.output


def test_mistakes_are_named_at_once() -> None:
    done = CliRunner().invoke(app.app, ["run", "--rows", "spff,plain", "--target", "wig", "--data", "dirty"])
    assert done.exit_code == 2
    assert "no row 'spff'; did you mean spf?" in done.output
    assert "unknown target 'wig'" in done.output
    assert "--data 'dirty': choose one of polluted, named, clean" in done.output


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_drift_at_equal_response_is_interpolated_seed_by_seed() -> None:
    sweep = [made("spf", 1e-3, 0.4, 0.1), made("spf", 4e-3, 0.9, 0.5), made("spf", 2e-3, 0.8, 0.3)]
    found = at_response(sweep, "drift_explicit", 0.6)  # half way between .4 and .8
    assert found.mean is not None
    assert found.mean.value == pytest.approx(0.2)
    assert math.isnan(found.mean.error)
    second = [made("spf", 1e-3, 0.6, 0.4, 1), made("spf", 2e-3, 0.7, 0.9, 1)]
    both = at_response([*sweep, *second], "drift_explicit", 0.6)
    assert both.mean is not None
    assert both.mean.value == pytest.approx(0.3)
    assert both.mean.error == pytest.approx(0.1)  # standard error of .2 and .4
    assert both.bound == ""
    assert at_response(sweep, "drift_explicit", 0.3).bound == "<="
    never = at_response([*sweep, *second], "drift_explicit", 0.75)
    assert never.missed == 1
    assert at_response(second, "drift_explicit", 0.75).mean is None


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(7, 3)) + 1
    k = lambda x, y: (float(np.dot(x, y)) / 3 + 1) ** 3  # noqa: E731
    slow = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    slow += np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    slow -= 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(slow)


def test_probability_agrees_with_what_the_judge_predicts() -> None:
    rng = np.random.default_rng(3)
    images = np.stack([render(sample_person(rng))[0] for _ in range(6)])
    judge = load_judge(JUDGE_FILE)
    seen = predict(judge, images)
    hair = seen[0]["hair_colour"]
    found = probability(judge, images, {"hair_colour": hair, "sunglasses": True, "hat": False}, batch=4)
    for i, (value, read) in enumerate(zip(found, seen, strict=True)):
        flags = read["sunglasses"] * (1 - read["hat"])
        if read["hair_colour"] == hair:
            assert value == pytest.approx(read["hair_colour_probability"] * flags, rel=1e-5), i
        else:
            assert value <= (1 - read["hair_colour_probability"]) * flags + 1e-6


def test_tables_and_plot(tmp_path: Path) -> None:
    found = [made("base", 0, 0.2, 0.002)]
    found += [
        made("plain", rate, s, d, seed) for rate, s, d in ((1e-3, 0.5, 0.01), (2e-3, 0.9, 0.03)) for seed in (0, 1)
    ]
    found += [made("spf", 2e-3, 0.8, 0.003, seed) for seed in (0, 1)]
    head, lines = tables.rows(found)
    assert [line[:2] for line in lines] == [["base", ""], ["plain", "0.001"], ["plain", "0.002"], ["spf", "0.002"]]
    assert lines[2][head.index("drift, explicit")] == "30.0 (0.0)"
    head, lines = tables.equal_response(found, 0.7)
    assert lines[0][head.index("drift, explicit")] == "20.0 (0.0)"
    assert lines[1][head.index("drift, explicit")] == "<=3.0 (0.0)"
    assert tables.markdown(head, lines).splitlines()[2].startswith("| `plain` | 2 | 0.90 | 20.0 (0.0) |")
    for width, columns in ((500, [len(head)]), (60, [len(lines) + 1]), (40, [2, 2])):
        shown = tables.terminal(head, lines, "the title", width)
        assert [len(table.columns) for table in shown.renderables] == columns
        with Console(width=width, file=io.StringIO()) as console:
            console.print(shown)
        words = console.file.getvalue().split()
        assert {word for line in lines for cell in line for word in cell.split()} <= set(words)  # nothing is cut off
    drawing = plots.response_against_drift(found, "sunglasses")
    assert drawing is not None
    Image.open(io.BytesIO(drawing)).verify()
    assert plots.response_against_drift(found[-2:], "sunglasses") is None


def test_one_table_across_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hats, beards = Task("hat"), Task("beard")
    found = [made("base", 0, 0.2, 0.002, task=hats)]
    found += [made("plain", 1e-3, 0.5, 0.010, seed, hats) for seed in (0, 1)]
    found += [made("plain", 2e-3, 0.9, 0.030, 0, hats)]  # fewer sets: left out
    found += [made("spf", 4e-3, 0.8, drift, seed, hats) for seed, drift in ((0, 0.008), (1, 0.012), (2, 0.001))]
    found += [made("spf", 4e-3, 0.8, 0.003, 0, beards), made("plain", 4e-3, 0.8, 0.003, 1, beards)]
    found += [made("plain", 1e-3, 0.8, 0.1, 0, replace(hats, prompts=99))]  # another way to measure
    found += [made("former-spf", 1e-3, 0.7, 0.2, 0, replace(hats, evaluation_seed=7))]  # another: other persons
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "lab.jsonl")
    results.publish(found)

    def table(*words: str) -> list[list[str]]:
        only = ["--prompts", "24", *([] if "--evaluation-seed" in words else ["--evaluation-seed", "0"])]
        done = CliRunner().invoke(app.app, ["table", "--published", "--markdown", *only, *words])
        assert done.exit_code == 0, done.output
        lines = [line for line in done.output.splitlines() if line.startswith("|") and "---" not in line]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    both = ["--columns", "response_explicit,drift_explicit"]
    assert table("--across", *both) == [
        ["row", "beard", "hat"],
        ["`base`", "", "0.20 / 2.0"],
        ["`plain`", "0.80 / 3.0", "0.50 / 10.0"],
        ["`spf`", "0.80 / 3.0", "0.80 / 7.0"],
    ]
    assert table("--across", "--evaluation-seed", "7", *both)[1:] == [["`former-spf`", "0.70 / 200.0"]]
    assert table("--seeds", "1,2", "--target", "hat", *both)[1:] == [
        ["`base`", "", "1", "0.20", "2.0"],
        ["`plain`", "0.001", "1", "0.50", "10.0"],
        ["`spf`", "0.004", "2", "0.80 (0.00)", "6.5 (5.5)"],
    ]
    assert table("--together", *both) == [
        ["target", "row", "learning rate", "seeds", "response, explicit", "drift, explicit"],
        ["`beard`", "plain", "0.004", "1", "0.80", "3.0"],
        ["`beard`", "spf", "0.004", "1", "0.80", "3.0"],
        ["`hat`", "base", "", "1", "0.20", "2.0"],
        ["`hat`", "plain", "0.001", "2", "0.50 (0.00)", "10.0 (0.0)"],
        ["`hat`", "spf", "0.004", "3", "0.80 (0.00)", "7.0 (3.2)"],
    ]
    untuned = made("base", 0, 0.1, 0.001, task=Task("scarf"))
    results.publish([*found, untuned])  # and nothing that was trained beside it
    assert {line[0] for line in table("--together", *both)[1:]} == {"`beard`", "`hat`"}
    # Nobody can train this row any more; its results are there to be compared with.
    assert table("--beside", "former-spf", "--columns", "drift_explicit") == [
        ["row", "beard", "hat"], ["`plain`", "", ""], ["`spf`", "", ""]
    ]  # fmt: skip
    # Seed by seed: less in the first set, more in the second; the third has no plain LoRA, the beards share no set.
    assert table("--beside", "spf", "--columns", "drift_explicit") == [
        ["row", "beard", "hat"],
        ["`plain`", "", "1 of 2"],
    ]
    assert table("--beside", "spf", "--rows", "plain", "--columns", "drift_explicit")[1] == ["`plain`", "", "1 of 2"]
    # 8 of 10 and 12 of 10: a mean of one, a standard error of a fifth. The floor is divided by both plain LoRAs.
    assert table("--relative", "plain", "--columns", "drift_explicit") == [
        ["row", "beard", "hat"],
        ["`base`", "", "0.20 (0.00)"],
        ["`spf`", "", "1.00 (0.20)"],
    ]
    assert table("--ranges", "plain", "--columns", "drift_explicit") == [
        ["row", "beard", "hat", "all"],
        ["`base`", "", "0.20 to 0.20", "0.20 to 0.20"],
        ["`spf`", "", "0.80 to 1.20", "0.80 to 1.20"],
    ]
    results.publish([*found, made("plain", 4e-3, 0.8, 0.006, 0, beards)])  # half of it, and nobody leaks
    assert table("--ranges", "plain", "--rows", "spf", "--columns", "drift_explicit,leak")[-1] == [
        "`spf`", "0.50 to 0.50", "0.80 to 1.20", "0.50 to 1.20"
    ]  # fmt: skip
    # Of two targets at once alone, and where it is asked for, nothing else.
    once = Task("hat+beard")
    results.publish([*found, replace(made("spf", 1e-3, 0.5, 0.1, 0, once), scores=dict.fromkeys(tables.COLUMNS, 0.25))])
    assert table("--columns", "first_bled,drift_alone") == [
        ["row", "learning rate", "seeds", "first uninvited", "drift, one alone"],
        ["`spf`", "0.001", "1", "0.250", "250.0"],
    ]
    heads = [len(line) for line in table() if line[0] == "row"]
    assert sorted(set(heads)) == [3 + len(tables.COMMON), 3 + len(tables.COLUMNS)]
    done = CliRunner().invoke(app.app, ["table", "--beside", "spff", "--at", "0.8", "--seeds", "one"])
    assert done.exit_code == 2
    assert "--seeds 'one': write numbers with commas." in done.output
    assert "no row 'spff'; did you mean spf?" in done.output
    assert "are different tables" in done.output


def test_the_same_loras_of_two_machines_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "lab.jsonl")
    here = [made("base", 0, 0.2, 0.002), *(made("spf", 2e-3, 0.5 + 0.2 * seed, 0.01, seed) for seed in (0, 1, 2))]
    results.publish([*here, made("masked", 2e-3, 0.9, 0.05)])
    there = [replace(r, scores={**r.scores, "leak": 0.01, "drift_explicit": 0.012}) for r in here[:3]]
    there.append(made("plain", 4e-3, 1.0, 0.03))  # nobody else has it
    for result in there:
        results.write(tmp_path / "other", result)
    together = tmp_path / "other.jsonl"
    results.publish(there, together)
    words = ["table", "--markdown", "--columns", "response_explicit,leak,drift_explicit", "--compare"]
    shown = [CliRunner().invoke(app.app, [*words, str(place)]).output for place in (tmp_path / "other", together)]
    assert shown[0] == shown[1]
    lines = [line for line in shown[0].splitlines() if line.startswith("| `")]
    assert lines == [
        "| `base` |  | 1 | 0.20 / 0.20 | 0.000 / 0.010 | 2.0 / 12.0 |",
        "| `plain` | 0.004 | 1 | - / 1.00 | - / 0.000 | - / 30.0 |",
        "| `spf` | 0.002 | 2 | 0.60 / 0.60 | 0.000 / 0.010 | 10.0 / 12.0 |",  # not the third seed, which one side lacks
        "| `mean difference` |  | 2 | 0.00 | 0.010 | 2.0 |",
        "| `largest difference` |  | 2 | 0.00 | 0.010 | 2.0 |",
    ]
    only = CliRunner().invoke(app.app, [*words, str(together), "--rows", "plain"]).output
    assert [line.split("|")[1].strip() for line in only.splitlines() if line.startswith("| `")] == ["`base`", "`plain`"]
    only = CliRunner().invoke(app.app, [*words, str(together), "--rows", "spf,plain", "--seeds", "1"]).output
    lines = [line for line in only.splitlines() if line.startswith(("| `plain`", "| `spf`"))]
    assert lines == ["| `spf` | 0.002 | 1 | 0.70 / 0.70 | 0.000 / 0.010 | 10.0 / 12.0 |"]
    wrong = CliRunner().invoke(app.app, [*words, str(tmp_path / "none"), "--across"])
    assert wrong.exit_code == 2
    assert "--compare: there is no file or folder" in wrong.output
    assert "are different tables" in wrong.output


def test_the_plot_of_one_task(tmp_path: Path) -> None:
    """Of what is published: one picture, and none of a task that has no sweep."""
    chosen = [
        "--data",
        "polluted",
        "--prompts",
        "24",
        "--evaluation-seed",
        "0",
        "--out",
        str(tmp_path),
        "--into",
        str(tmp_path / "plots"),
    ]
    for target, expected in (("sunglasses", ["sunglasses-polluted-150-24-0.png"]), ("hoodie", [])):
        (tmp_path / "plots").mkdir(exist_ok=True)
        for old in (tmp_path / "plots").iterdir():
            old.unlink()
        assert CliRunner().invoke(app.app, ["plot", "--target", target, *chosen]).exit_code == 0
        assert [path.name for path in (tmp_path / "plots").iterdir()] == expected


def test_pictures_of_measured_loras(model: Path, tmp_path: Path) -> None:
    """Those of the training pictures that are asked for, and nothing where one was not drawn."""
    task, out = Task("jacket", data="one-person"), tmp_path / "out"
    untuned = results.key(task, None, 0, 0, model)
    (out / "pictures").mkdir(parents=True)
    for i, key in enumerate((f"{untuned}-without", untuned, results.key(task, ROWS["spf"], 2e-3, 0, model))):
        Image.new("RGB", (64, 32), (50 * i, 0, 0)).save(out / "pictures" / f"{key}.png")
    words = ["pictures", "--points", "spf:2e-3", "--target", "jacket", "--out", str(out), "--model", str(model)]
    shown = tmp_path / "shown.png"
    missing = CliRunner().invoke(app.app, [*words, "--into", str(shown)])
    assert missing.exit_code == 2
    assert missing.output.count("run it first") == 3
    assert "`spf lab run --fresh`" in missing.output
    found = CliRunner().invoke(app.app, [*words, "--into", str(shown), "--data", "one-person"])
    assert found.exit_code == 0, found.output
    with Image.open(shown) as image:
        assert image.height > 3 * 32
        assert {colour for _, colour in image.getcolors(2**16)} >= {(0, 0, 0), (50, 0, 0), (100, 0, 0)}


def test_a_sequence_shows_every_word_taught_so_far_once() -> None:
    taught = ("blonde", "hat", "sunglasses", "shades")  # the last two are one word
    found = [
        made("spf", 2e-3, 0.8, 0.003, task=Task("blonde", sequence=taught[:1])),
        made("spf", 2e-3, 0.6, 0.005, task=Task("blonde", sequence=taught[:2])),
        made("spf", 2e-3, 0.9, 0.004, task=Task("hat", sequence=taught[:2])),
        *(made("spf", 2e-3, value, 0.006, task=Task(name, sequence=taught)) for name, value in (
            ("blonde", 0.5), ("hat", 0.3), ("sunglasses", 0.7), ("shades", 0.7)
        )),
    ]  # fmt: skip
    head, lines = tables.sequences(found, taught)
    assert head[3:7] == ["response, all words", "blonde hair", "hat", "sunglasses"]
    assert [line[:7] for line in lines] == [
        ["spf", "1. blonde", "1", "0.80", "0.80", "", ""],
        ["spf", "2. hat", "1", "0.75", "0.60", "0.90", ""],
        ["spf", "4. shades", "1", "0.50", "0.50", "0.30", "0.70"],
    ]
    assert [line[head.index("drift, explicit")] for line in lines] == ["3.0", "4.0", "6.0"]


def test_map_quality_knows_a_perfect_map_from_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from portraitlab.lab import maps

    task = Task()
    masks = task.masks(0)[:, 0].numpy()

    class Pipeline:
        def load_lora_weights(self, folder: str, weight_name: str) -> None:
            assert Path(folder, weight_name) == tmp_path / "x.safetensors"

    class Seen:
        def __init__(self, index: int):
            self.control = {"soft": {100: masks[index]}, "paper": {100: np.zeros((16, 16))}}
            self.subtracted = {100: 0.75 - masks[index] / 2}

    monkeypatch.setattr(maps, "load_pipeline", lambda _: Pipeline())
    monkeypatch.setattr(maps.maps, "explain", lambda *_, seed, **__: Seen(seed))
    config = ROWS["spf"].config(task)
    head, lines = maps.quality(
        task, tmp_path / "x.safetensors", tmp_path, config, ("soft", "paper"), 3, lambda *_: None
    )
    assert head == ["map", "timestep", "separation", "inside", "outside", "subtracted inside", "outside"]
    taken = ["0.25", "0.75"]
    assert lines == [["soft", "100", "1.00", "1.00", "0.00", *taken], ["paper", "100", "0.50", "0.00", "0.00", *taken]]
    ink = Task("ink")  # is everywhere: there is no outside, and nothing to keep apart
    masks[:] = np.linspace(0, 1, 16)
    config = ROWS["spf"].config(ink)
    _, lines = maps.quality(ink, tmp_path / "x.safetensors", tmp_path, config, ("soft",), 3, lambda *_: None)
    assert lines == [["soft", "100", "", "0.50", "", "0.50", ""]]


def test_maps_are_made_as_their_row_makes_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def quality(*_: Any) -> tables.Cells:
        seen.append(sfcm.MAX_PHRASE_WEIGHT)
        return ["map"], []

    monkeypatch.setattr(app.maps, "quality", quality)
    monkeypatch.setattr(running.Bench, "trained", lambda *_: tmp_path / "x.safetensors")
    before = sfcm.MAX_PHRASE_WEIGHT
    for row in ("plain", "spf-phrase-weight-1", "spf"):
        words = ["maps", "--row", row, "--out", str(tmp_path / "lab"), "--model", str(model)]
        assert CliRunner().invoke(app.app, words).exit_code == 0
    assert seen == [before, 1, before]
    assert before == sfcm.MAX_PHRASE_WEIGHT


def test_map_quality_by_layer_shows_each_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from portraitlab.lab import maps

    task, names = Task(), ("blocks.1.attn", "blocks.11.attn")
    masks = task.masks(0)[:, 0].numpy()

    def explain(*_: Any, seed: int, layers: str, **__: Any) -> SimpleNamespace:
        (seen,) = [name for name in names if re.search(layers, name)]
        heat = masks[seed] if seen == names[1] else np.zeros((16, 16))
        return SimpleNamespace(control={"soft": {100: heat}}, subtracted={100: heat})

    every = [SimpleNamespace(name=name) for name in names]
    family = SimpleNamespace(layers=lambda which: every if which == "all" else [])
    pipeline = SimpleNamespace(load_lora_weights=lambda *_, **__: None)
    monkeypatch.setattr(maps, "load_pipeline", lambda _: pipeline)
    monkeypatch.setattr(maps, "from_pipeline", lambda _: SimpleNamespace(denoiser=None))
    monkeypatch.setattr(maps, "find", lambda _: family)
    monkeypatch.setattr(maps, "TIMESTEPS", (100,))
    monkeypatch.setattr(maps.maps, "explain", explain)
    config = ROWS["spf"].config(task)
    head, lines = maps.quality(task, tmp_path / "x", tmp_path, config, ("soft",), 2, lambda *_: None, by_layer=True)
    assert head == ["map", "layer", "separation at 100"]
    assert lines == [["soft", names[0], "0.50"], ["soft", names[1], "1.00"]]


@pytest.mark.parametrize("page", app.PAGES, ids=lambda page: page.name)
def test_the_documentations_tables_are_what_its_commands_print(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page.parents[1])
    text = page.read_text(encoding="utf-8")
    assert app.BLOCK.findall(text)
    assert app.filled(text) == text, "run `spf lab document`"
