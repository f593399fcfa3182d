"""What sd-scripts keeps of encoded captions, held against the captions: rounding passes, another word does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks import reencoding
from spf_plugin.hosts.kohya import cached_text
from spf_plugin.hosts.kohya.cached_text import ANOTHER_CAPTION, Encoded, by_encoding, by_time
from spf_plugin.hosts.kohya.images import Image

MODEL = Path(__file__).parents[1] / "portraitlab" / "model"
CAPTION = "a woman in a brown jacket, curtain background, smiling, sunglasses"


def encoder(dtype: torch.dtype = torch.float32) -> Callable[[str], Encoded]:
    """The embedded model's text encoder: trained, so that its states are about as far apart as a real one's."""
    model = CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=dtype)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")

    @torch.no_grad()
    def encode(caption: str) -> Encoded:
        ids = tokenizer(caption, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        out = model(ids)
        return out.last_hidden_state[0].float().numpy(), out.pooler_output[0].float().numpy()

    return encode


def cached(folder: Path, caption: str, encode: Callable[[str], Encoded] | None, dtype: Any = np.float32) -> Image:
    """An image whose caption file says `caption`."""
    image = Image((caption,), (caption,), path=str(folder / "a.png"), caption_extension=".txt")
    if encode is not None:
        hidden, pooled = (part.astype(dtype) for part in encode(CAPTION))
        np.savez(image.cache(), hidden_state1=hidden[:, :24], hidden_state2=hidden[:, 24:], pool2=pooled)
    Path(image.source).write_text(caption, encoding="utf-8")
    os.utime(image.source, (1000, 1000))  # before it was cached
    return image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_not_another_caption(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = np.float16 if dtype is torch.float16 else np.float32  # as the host writes them
    image = cached(tmp_path, CAPTION, encoder(dtype), kept)
    assert by_encoding([image], encoder()) is None


@pytest.mark.parametrize(
    "caption",
    [
        CAPTION.replace("sunglasses", "hat"),
        CAPTION.replace("woman", "man"),
        CAPTION + ", blonde hair",
        CAPTION.replace(", smiling", ""),
        "10_sunglasses",
        "",
    ],
)
def test_another_caption_is_found_though_its_file_is_older(tmp_path: Path, caption: str) -> None:
    image = cached(tmp_path, caption, encoder())
    assert by_time([image]) is None
    said = by_encoding([image], encoder())
    assert said is not None
    assert f"a_te_outputs.npz is not that of {caption[:80]!r}" in said
    assert "Delete the *_te_outputs.npz files" in said


def test_a_file_that_was_only_touched_is_none_of_it(tmp_path: Path) -> None:
    image = cached(tmp_path, CAPTION, encoder())
    os.utime(image.source)
    os.utime(image.cache(), (1001, 1001))
    assert by_time([image]) is not None
    assert by_encoding([image], encoder()) is None


def test_captions_of_a_metadata_file_have_a_time_too(tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text("{}", encoding="utf-8")
    cached(tmp_path, CAPTION, encoder())
    image = Image((CAPTION,), (CAPTION,), path=str(tmp_path / "a.png"), metadata=str(meta))
    os.utime(image.cache(), (1000, 1000))
    assert by_time([image]) is not None


def test_damage_another_length_and_nan(tmp_path: Path) -> None:
    image = cached(tmp_path, CAPTION, encoder())
    hidden, pooled = encoder()(CAPTION)
    for states in (np.concatenate([hidden, hidden]), hidden * np.nan):
        np.savez(image.cache(), hidden_state1=states[:, :24], hidden_state2=states[:, 24:], pool2=pooled)
        assert by_encoding([image], encoder()) is not None
    Path(image.cache()).write_bytes(b"cut off")
    assert by_encoding([image], encoder()) is not None


def test_of_many_every_changed_one_and_some_of_every_folder(tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(caption: str) -> Encoded:
        asked.append(caption)
        return np.ones((3, 4), np.float32) * len(asked), np.ones(4, np.float32)

    images = []
    for i in range(200):
        folder = tmp_path / ("few" if i == 150 else "many")
        folder.mkdir(exist_ok=True)
        image = Image((str(i),), (str(i),), path=str(folder / f"{i}.png"), caption_extension=".txt")
        Path(image.cache()).write_bytes(b"")
        np.savez(image.cache(), hidden_state1=np.ones((3, 2)), hidden_state2=np.ones((3, 2)), pool2=np.ones(4))
        Path(image.source).write_text(str(i), encoding="utf-8")
        os.utime(image.source, (1000, 1000))
        if i in (77, 99):
            os.utime(image.cache(), (999, 999))
        images.append(image)
    said = by_encoding(images, encode)
    assert said is not None
    assert {"77", "99", "150", "0"} <= set(asked)
    assert len(asked) <= 2 + 2 + cached_text.OTHERS + 1


def test_nothing_is_encoded_where_nothing_is_cached(tmp_path: Path) -> None:
    def encode(caption: str) -> Encoded:
        raise AssertionError(caption)

    assert by_encoding([cached(tmp_path, CAPTION, None)], encode) is None


def test_bf16_is_far_from_another_caption() -> None:
    """Of the figures in docs/method.md: what rounding makes stays far below what is taken for another caption."""
    found = reencoding.measured(8)
    (another, _) = found.pop(reencoding.ANOTHER)
    assert another > 2 * ANOTHER_CAPTION
    assert 0.005 < max(worst for worst, _ in found.values()) < ANOTHER_CAPTION / 4
