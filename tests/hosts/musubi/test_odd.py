"""Captions and data sets that are not as one expects them, from the host's own caching of text to training."""

from __future__ import annotations

from pathlib import Path

import pytest

from spf_plugin.core.prompt import Target, split
from spf_plugin.hosts.musubi import prompts
from tests.hosts.musubi.conftest import EVERY_STEP, Musubi
from tests.hosts.musubi.test_runs import SPY, pairs

ODD = {
    "empty": "",
    "alone": "blonde hair",
    "blanks": "  a woman, blonde hair,  red hat ",
    "lines": "a woman\r\nblonde hair,\n\nred hat\n",
    "letters": "une femme à Zürich, blonde hair, 金髪の女性, \U0001f469\u200d\U0001f9b0, naïve café",
    "marks": "<|im_end|>a woman[/INST], blonde hair, [IMG]</s><pad> red hat",
    "long": "a red hat, blonde hair, " * 120,
    "twice": "a woman with blonde hair, a man with BLONDE HAIR, (blonde hair:1.2)",
    "none of it": "a green \\(hat\\), 100% \"quoted\" 'text'",
}


@pytest.mark.kinds("zimage", "qwen_image", "wan", "flux2_klein", "flux2_dev", "krea2")
def test_odd_captions(musubi: Musubi, tmp_path: Path) -> None:
    """In JSON lines, which keep blanks as they are."""
    config = musubi.data_set(tmp_path / "data", ODD, jsonl=True)
    for result in (musubi.cache_text(config), musubi.cache_prompts(config)):
        assert result.returncode == 0, result.log[-4000:]
    assert "prompts of 9 items encoded" in result.said
    for name, caption in ODD.items():
        record = prompts.read(str(config.parent / "cache" / f"{name}_{musubi.kind.CODE}_spf.safetensors"))
        assert (record.caption, record.base) == (caption, split(caption, [Target("blonde hair")]).base)
    assert "prompts of 0 items encoded, of 9 current already" in musubi.cache_prompts(config).said
    trained = musubi.train(*EVERY_STEP, module=SPY, dataset_config=config, max_train_steps=12)
    assert {pair["target"] for pair in pairs(trained)} >= {True}


@pytest.mark.kinds("zimage")
def test_one_cache_by_two_names(musubi: Musubi, tmp_path: Path) -> None:
    """The host stops where the names are the same, and would train all that lies there with either data set."""
    config = tmp_path / "data.toml"
    text = (musubi.data / "data.toml").read_text(encoding="utf-8")
    block = text[text.index("[[datasets]]") :]
    config.write_text(f"{text}\n{block.replace('/cache', '/images/../cache')}", encoding="utf-8")
    refused = musubi.train(*EVERY_STEP, dataset_config=config)
    assert refused.returncode != 0
    assert "running training" not in refused.log
    assert "[[datasets]] 1 and [[datasets]] 2 have one cache folder" in refused.said


@pytest.mark.kinds("zimage")
def test_a_target_may_be_written_otherwise(musubi: Musubi) -> None:
    """As a GUI without spaces has it. What was recorded is of the same phrase."""
    result = musubi.train("spf_target=Blonde_hair", *EVERY_STEP[1:], max_train_steps=1)
    assert "drift=" in result.log, result.log[-2000:]
