"""What a run really did, as its file says it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from spf_plugin.lorafile import inspect
from spf_plugin.lorafile.record import KEY, Run

FULL = Run(
    batches={"aligned": 198, "second": 198, "before": 3, "dropped": 1},
    samples=792,
    with_target=780,
    map_mean=0.1234,
    drift=(0.004, 0.0061),
    terms={"output": 0.0021, "base_preservation": 0.0007},
    skipped=5,
)


def test_a_file_gives_it_back() -> None:
    for run in (FULL, Run(), Run(batches={"plain": 4})):
        assert Run.of(json.loads(json.dumps(run.as_json()))) == run
    assert Run().as_json() == {}


def test_the_page_shows_what_a_log_says() -> None:
    run = Run(
        batches={"aligned": 200, "second": 200},
        samples=800,
        with_target=800,
        map_mean=0.09,
        drift=(0.0041, 0.006),
        terms={"text_consistent": 0.002, "fine_grained": 0.03, "output": 0.0012, "base_preservation": 0.0011},
    )
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert f"SPF: {run}" in " ".join(page.split())


def test_every_number_is_said() -> None:
    said = str(FULL)
    for number in (
        "400 batches",
        "198 aligned",
        "3 plain, before",
        "1 plain, every",
        "780 of 792",
        "12%",
        "0.0061",
        "of 5",
    ):
        assert number in said, number
    assert FULL.problem is None


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Run(batches={"before": 7}), "nothing was aligned: this is a plain LoRA (7 plain, before alignment began)"),
        (Run(batches={"plain": 7}, samples=7, with_target=7), "nothing was aligned: this is a plain LoRA (7 plain"),
        (Run(batches={"dropped": 2, "before": 1}), "nothing was aligned"),
        (Run(batches={"aligned": 7}, samples=7), "no sample had a target"),
        (Run(), None),  # a file that was saved before the first step
    ],
)
def test_a_run_that_was_none_of_ours(run: Run, said: str | None) -> None:
    assert (run.problem or "").startswith(said or "\0") or run.problem is said
    shown = inspect.settings({"ss_network_args": json.dumps({KEY: run.as_json(), "spf_target": "hat"})})
    assert shown["what SPF did"] == str(run)
    assert shown.get("not as it says") == run.problem
    assert shown["spf_target"] == "hat"


JUNK = [
    None,
    "x",
    3,
    -1,
    1.5,
    True,
    [],
    [1, 2, 3],
    ["a", 1],
    {},
    {"aligned": -1},
    {"aligned": "1"},
    {"odd": 1},
    {"a": []},
]


def test_what_others_write_there_is_no_record() -> None:
    dice = random.Random(0)
    for junk in JUNK:
        assert Run.of(junk) is None or junk == {} or isinstance(junk, dict)
        for name in FULL.as_json():
            changed = Run.of({**FULL.as_json(), name: junk})
            assert changed is None or str(changed)  # whatever it is, it can be shown
    for _ in range(300):
        made = {name: dice.choice(JUNK) for name in FULL.as_json() if dice.random() < 0.7}
        found = Run.of(made)
        assert found is None or str(found)
        inspect.settings({"ss_network_args": json.dumps({KEY: made})})
    assert Run.of({**FULL.as_json(), "samples": True}) is None
    assert Run.of({**FULL.as_json(), "map_mean": float("nan")}) is None
    assert Run.of({**FULL.as_json(), "drift": [1]}) is None
