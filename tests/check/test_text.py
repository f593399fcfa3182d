"""The split and the tokens are those that training makes; what of captions nearly says the target."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from spf_plugin.config import parse
from spf_plugin.families.unet import UNet
from spf_plugin.text import TextSide
from spf_plugin.tools.check import tokens
from spf_plugin.tools.check.run import check
from spf_plugin.tools.check.sets import together
from spf_plugin.tools.check.spelling import kind_of
from spf_plugin.tools.cli.check import app
from tests.check.conftest import codes, look
from tests.check_sets import CAPTIONS, Run

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "portraitlab" / "model" / "tokenizer"


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
