"""The tokenizer equals open_clip's, token for token."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from portraitlab.captions import caption
from portraitlab.model_files import MODEL_FOLDER
from portraitlab.portraits import BALANCED_RATES, sample_person
from portraitlab.text import (
    bpe_path,
    build_text_encoder,
    byte_symbols,
    clip_merges,
    merges_for,
    save_tokenizer,
    token_ids,
)

pytest.importorskip("ftfy")


@pytest.fixture(scope="module")
def reference():
    """open_clip's own tokenizer, loaded from its file alone: the package itself imports torchvision."""
    folder = Path(bpe_path()).parent
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_alone", folder / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.SimpleTokenizer()
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_vocabulary_equals_open_clips(reference, ours):
    vocabulary = ours.get_vocab()
    # open_clip spells the two special tokens differently; Stable Diffusion's spelling is <|startoftext|>.
    assert [vocabulary.pop("<|startoftext|>"), vocabulary.pop("<|endoftext|>")] == [49406, 49407]
    assert vocabulary == {token: index for token, index in reference.encoder.items() if index < 49406}
    assert byte_symbols() == list(reference.byte_encoder.values())


def test_token_ids_equal_open_clips(reference, ours):
    rng = np.random.default_rng(0)
    texts = [caption(sample_person(rng, BALANCED_RATES), rng) for _ in range(100)]
    texts += ["", "A Portrait, 3/4 view; it's (nice) 100%!", "naïve café, déjà vu", "x" * 300, "hat, " * 60]
    expected = reference(texts, context_length=77)
    found = token_ids(ours, texts)
    for text, a, b in zip(texts, expected.tolist(), found.tolist(), strict=True):
        end = b.index(49407)
        assert a[: end + 1] == b[: end + 1], text
        assert set(a[end + 1 :]) <= {0}  # open_clip pads with zeros,
        assert set(b[end + 1 :]) <= {49407}  # Stable Diffusion 1 with the end token


def test_shipped_tokenizer_is_this_one(ours):
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer", local_files_only=True)
    texts = ["a woman with black hair, green jacket", "beard"]
    assert shipped.pad_token_id == 49407
    assert token_ids(shipped, texts).equal(token_ids(ours, texts))


def test_text_encoder_takes_the_whole_vocabulary(ours):
    states = build_text_encoder()(token_ids(ours, ["a man, blonde hair"]))[0]
    assert states.shape == (1, 77, 64)


def test_few_merges_cut_known_words_as_all_merges_do(ours, tmp_path):
    """The small tokenizer of the portrait CLIPs: other numbers, the same pieces."""
    rng = np.random.default_rng(1)
    texts = [caption(sample_person(rng, BALANCED_RATES), rng) for _ in range(60)]
    words = {word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]+", text)}
    small = save_tokenizer(tmp_path, merges_for(words, clip_merges()))
    assert len(small) < 1000 < len(ours)
    for text in texts:
        assert small.tokenize(text) == ours.tokenize(text)
