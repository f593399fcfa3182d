"""What tests of the transformer's base share."""

from __future__ import annotations

import json

import pytest
import torch

from portraitlab.text import clip_merges, merges_for, save_tokenizer
from portraitlab.train_clip import build, words
from portraitlab.train_dit import ENCODERS
from portraitlab.train_text import LAYERS, claims


@pytest.fixture(scope="session")
def random_encoders(tmp_path_factory):
    """The folders of two untrained text encoders, as training leaves them; their scores are chance."""
    from transformers import CLIPTextModelWithProjection

    folders = [tmp_path_factory.mktemp("work") / name for name in ENCODERS]
    for seed, folder in enumerate(folders):
        tokenizer = save_tokenizer(folder, merges_for(words(), clip_merges()))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            CLIPTextModelWithProjection(build(len(tokenizer), LAYERS).config.text_config).half().save_pretrained(folder)
        facts = {"seed": seed, "portraits": 0, "images": 0, "batch": 1, "lr": 0.0}
        (folder / "scores.json").write_text(json.dumps({**facts, "separation": dict.fromkeys(claims(), 0.5)}))
    return folders
