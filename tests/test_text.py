"""The text side of a run: what is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from spf_plugin import text
from spf_plugin.core.prompt import Target
from spf_plugin.families.base import Text
from spf_plugin.families.unet import UNet
from spf_plugin.text import Cache, TextSide


class Host:
    """Words for tokens; counts how often each prompt is encoded."""

    prefix = ""

    def __init__(self) -> None:
        self.encoded: Counter[str] = Counter()

    def tokenize(self, words: str) -> Sequence[int]:
        return list(range(len(words.replace(",", " , ").split())))

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        self.encoded.update(prompts)
        return {"hidden": torch.ones(len(prompts), 16, 4)}


def epoch(side: TextSide, captions: Sequence[str]) -> None:
    for caption in captions:
        like = {"hidden": torch.zeros(1, 16, 4)}
        batch = side.for_batch([caption], like)
        side.base_text(batch, like, text_encoder_trained=False)
        side.distances(batch)


def test_a_whole_data_set_is_split_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"a woman, coat number {i}, blonde hair" for i in range(1500)]
    host, splits = Host(), []
    side, split = TextSide(host, UNet(torch.nn.Module()), (Target("blonde hair"),), nullcontext), text.split
    monkeypatch.setattr(text, "split", lambda caption, targets: splits.append(caption) or split(caption, targets))
    for _ in range(2):
        epoch(side, captions)
    assert set(host.encoded.values()) == {1}
    assert len(host.encoded) == 1500 * 2 + len(text.ANCHORS) + 2  # bases, coats, "a woman" and the target
    assert splits == captions


def test_what_does_not_fit_is_said_once_and_leaves_the_rest_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text, "CACHED_BYTES", 3 * 16 * 4 * 4)  # three prompts
    host, captions = Host(), [f"a woman {i}, blonde hair" for i in range(5)]
    side = TextSide(host, UNet(torch.nn.Module()), (Target("blonde hair"),), nullcontext)
    for _ in range(3):
        for caption in captions:
            like = {"hidden": torch.zeros(1, 16, 4)}
            side.base_text(side.for_batch([caption], like), like, text_encoder_trained=False)
    assert [host.encoded[f"a woman {i}"] for i in range(5)] == [1, 1, 1, 3, 3]
    assert caplog.text.count("3 encoded base prompts fill") == 1


def test_a_cache_counts_values_or_weighs_them() -> None:
    counted: Cache[int, str] = Cache(2)
    assert [counted.get_or(i, lambda: "x") for i in range(4)] == ["x"] * 4
    assert list(counted) == [0, 1]
    weighed: Cache[int, str] = Cache(4, len)
    for i, value in enumerate(["abc", "de", "f"]):
        weighed.get_or(i, lambda value=value: value)  # type: ignore[misc]
    assert list(weighed) == [0, 2]
    assert weighed.used == 4


def test_the_vector_of_a_phrase() -> None:
    hidden = torch.arange(12.0).view(1, 3, 4)
    pooled = torch.ones(1, 2)
    assert torch.equal(text.vectors({"hidden": hidden, "pooled": pooled}, 1, [1]), pooled)
    assert torch.equal(text.vectors({"hidden": hidden}, 1, [1]), hidden[:, 1])
    mask = torch.tensor([[1, 1, 0]])
    language = {"hidden": hidden, "hidden_mask": mask}
    assert torch.equal(text.vectors(language, 0, [1]), hidden[:, :2].mean(dim=1))
    assert torch.equal(text.vectors(language, 1, [1]), hidden[:, 1])


def test_words_before_every_prompt_belong_to_no_phrase() -> None:
    caption, like = "a woman in a jacket, blonde hair", {"hidden": torch.zeros(1, 20, 4)}
    host = Host()
    side = TextSide(host, UNet(torch.nn.Module()), (Target("blonde hair"),), nullcontext)
    without = side.for_batch([caption], like)
    host.prefix = "draw what is said , "
    behind = TextSide(host, UNet(torch.nn.Module()), (Target("blonde hair"),), nullcontext).for_batch([caption], like)
    assert behind.full == without.full == [caption]
    for name in ("base_groups", "full_groups"):
        moved = getattr(without, name).roll(5, dims=1)
        moved[:, :5] = 0
        assert torch.equal(getattr(behind, name), moved)


def test_prompts_of_different_lengths_are_padded_behind() -> None:
    class Growing(Host):
        def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
            (prompt,) = prompts
            return {"hidden": torch.ones(1, len(self.tokenize(prompt)), 4)}

    side = TextSide(Growing(), UNet(torch.nn.Module()), (Target("blonde hair"),), nullcontext)
    like = {"hidden": torch.full((3, 7, 4), 2.0)}
    batch = side.for_batch(["a woman, blonde hair", "a man in a long black coat, blonde hair", "a dog"], like)
    hidden = side.base_text(batch, like, text_encoder_trained=False)["hidden"]
    assert hidden[..., 0].tolist() == [[1, 1, *[0] * 5], [1] * 7, [2] * 7]
