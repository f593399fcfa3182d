"""SDXL's text that is cached on the disk, in the releases' own runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.hosts.conftest import Host

TARGET = "spf_target=blonde hair"
ON_DISK: dict[str, Any] = {
    "model": "sdxl",
    "cache_text_encoder_outputs": True,
    "cache_text_encoder_outputs_to_disk": True,
}


@pytest.mark.contract  # with how each release encodes and keeps captions
def test_an_extension_that_was_forgotten_when_the_text_was_cached(host: Host, tmp_path: Path) -> None:
    """In bfloat16, whose rounding is no other caption."""
    data = tiny.images(tmp_path / "data")
    options: dict[str, Any] = {**ON_DISK, "train_data_dir": data, "max_train_steps": 1, "mixed_precision": "bf16"}
    forgotten = host.train(TARGET, caption_extension=".caption", **options)
    assert "occurs in none of the" in forgotten.message
    caches = list(data.rglob("*_te_outputs.npz"))
    assert caches
    corrected = host.train(TARGET, **options)
    assert "of 4 cached encodings that were looked at are not those of their captions" in corrected.message
    assert "steps:" not in corrected.log
    for cache in caches:
        cache.unlink()
    again = host.train(TARGET, **options)  # what the host has cached now
    assert again.returncode == 0, again.log[-3000:]


def test_captions_of_metadata_that_changed(host: Host, tmp_path: Path) -> None:
    data, meta = tiny.images(tmp_path / "data"), tmp_path / "meta.json"
    folder = next(path for path in data.iterdir() if path.is_dir())
    options: dict[str, Any] = {**ON_DISK, "train_data_dir": folder, "in_json": meta, "max_train_steps": 1}

    def write(caption: str) -> None:
        rows = {str(path): {"caption": f"{caption}, blonde hair"} for path in sorted(folder.glob("*.png"))}
        meta.write_text(json.dumps(rows), encoding="utf-8")

    write("a woman in a park")
    assert host.train(TARGET, **options).returncode == 0
    write("a man in a park")
    assert (
        "cached encodings that were looked at are not those of their captions" in host.train(TARGET, **options).message
    )
