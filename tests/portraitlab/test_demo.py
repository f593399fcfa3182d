"""The demo from end to end on an untrained model, and its measures on images whose answer is known."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from portraitlab import demo
from portraitlab.captions import TARGETS
from portraitlab.customisation import neutral_person
from portraitlab.judge import Judge, save_judge
from portraitlab.measure import score, shows, untouched_region
from portraitlab.portraits import counterfactual
from spf_plugin.tools import cli
from tests.portraitlab.test_report import check_page


@pytest.fixture(scope="module")
def finished(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with two seeds and hardly any steps."""
    root = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    save_judge(Judge(), root / "judge.safetensors")
    words = ["--target", "blonde", "--model", str(tiny_sd15), "--judge", str(root / "judge.safetensors")]
    words += ["--out", str(root / "out")]
    words += ["--steps", "4", "--prompts", "1", "--seeds", "0,1", "--spf", "output_multiplier=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SAMPLER_STEPS", 2)
        patch.setattr(demo, "BATCH", 2)
        result = CliRunner().invoke(demo.app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return root, result


def test_the_demo_writes_files_a_page_and_a_table(finished: tuple[Path, Any]) -> None:
    root, result = finished
    out = root / "out"
    assert "blonde hair: what each model does" in result.output
    assert "report.html" in result.output
    for name in ("report.html", "sfcm.png", "phrases.png", "samples.png", "drift.png", "trade-off.png"):
        assert (out / name).stat().st_size > 1000, name
    assert not list(out.rglob("*.part"))
    numbers = json.loads((out / "numbers.json").read_text(encoding="utf-8"))
    assert set(numbers["plain"]) == set(numbers["spf"]) == {"0", "1"}
    assert numbers["base"]["drift_without"] == 0.0
    assert numbers["spf"]["0"]["drift"] > 0
    text = (out / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert "Means over seeds 0, 1" in text
    assert "spf_output_multiplier 2" in text


def test_the_page_names_the_commands_that_make_its_loras(finished: tuple[Path, Any], tiny_sd15: Path) -> None:
    """The very command of the page, with this test's model for the embedded one, gives the same weights."""
    root, _ = finished
    text = unescape((root / "out" / "report.html").read_text(encoding="utf-8"))
    commands = re.findall(r"^(?:<pre>)?(spf train .*)$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    for command, name in zip(commands, ("plain", "spf"), strict=True):
        words = shlex.split(command)[1:]
        assert words[words.index("--model") + 1] == tiny_sd15.as_posix()
        words[words.index(f"{name}.safetensors")] = str(root / f"{name}.safetensors")
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
        ours = load_file(root / "out" / "seed0" / f"blonde-{name}.safetensors")
        theirs = load_file(root / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_bad_options_give_one_sentence(tmp_path: Path) -> None:
    for words, said in (
        (["--target", "wings"], "choose one of blonde"),
        (["--seeds", "a,b"], "write whole numbers"),
        (["--base", "dits"], "choose one of unet, dit"),
        (["--spf", "map=sofft"], "must be one of"),
        (["--model", str(tmp_path)], "is missing"),
    ):
        result = CliRunner().invoke(demo.app, [*words, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_untouched_region_holds_what_no_portrait_changes() -> None:
    goal = TARGETS["sunglasses"]
    region = untouched_region(goal, people=30, tolerance=0.0, seed=5)
    rng = np.random.default_rng([5, 91])
    for _ in range(30):
        assert not (counterfactual(neutral_person(rng, goal), 128, **goal.changes).region & region).any()
    assert 0.7 < region.mean() < 1.0


def test_scores_of_images_whose_answer_is_known() -> None:
    goal = TARGETS["blonde"]
    base = np.zeros((4, 2, 2, 3), np.uint8)
    without, with_ = base.copy(), base.copy()
    without[0, 0, 0] = 255  # 1 of the 2 untouched pixels in 1 of 4 images
    with_[:, 1] = 255  # only where it may
    untouched = np.array([[True, True], [False, False]])

    def seen(hair: list[str], background: list[str], clothes: list[str]) -> list[dict[str, Any]]:
        rows = zip(hair, background, clothes, strict=True)
        return [{"hair_colour": h, "background": b, "clothes_colour": c} for h, b, c in rows]

    scores = score(
        goal,
        base=base,
        without=without,
        with_=with_,
        seen_base=seen(["black"] * 4, ["red", "blue", "blue", "grey"], ["purple", "red", "red", "red"]),
        seen_without=seen(["black", "blonde", "red", "red"], ["red"] * 4, ["red"] * 4),
        seen_with=seen(["blonde", "blonde", "blonde", "red"], ["red", "red", "blue", "blue"], ["red"] * 4),
        untouched=untouched,
    )
    assert scores.response == 0.75
    assert scores.leak == 0.25
    assert scores.drift == 0.0
    assert scores.drift_without == pytest.approx(1 / 8)
    assert scores.uninvited_background == pytest.approx(1 / 3)
    assert scores.uninvited_clothes == 0.0
    assert scores.background_kept == 0.5
    assert scores.clothes_kept == 0.75


def test_sunglasses_count_whatever_the_judge_thinks_of_glasses() -> None:
    goal = TARGETS["sunglasses"]
    assert shows(goal, {"sunglasses": 0.9, "glasses": 0.9})
    assert not shows(goal, {"sunglasses": 0.2, "glasses": 0.0})
