"""The embedded model in unmodified sd-scripts: it trains there, and the demo draws with what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from portraitlab.customisation import write_set
from portraitlab.demo import draw
from portraitlab.model_files import MODEL_FOLDER
from tests.hosts.conftest import Host


@pytest.mark.one_host  # both train a model of these blocks in test_training
@pytest.mark.skipif(not (MODEL_FOLDER / "model_index.json").exists(), reason="NO EMBEDDED MODEL in portraitlab/model")
def test_embedded_model_trains_in_sd_scripts(host: Host, tmp_path: Path) -> None:
    write_set(tmp_path / "set", "blonde", repeats=1, count=8, seed=0)
    result = host.train(
        "spf_target=blonde hair",
        "spf_stage2_start=1",
        "spf_log_every=1",
        pretrained_model_name_or_path=MODEL_FOLDER,
        train_data_dir=tmp_path / "set",
        max_train_steps=3,
        train_batch_size=4,
        learning_rate=1e-3,
        save_precision="fp16",
    )
    tensors = result.tensors()
    assert len(tensors) == 192 * 3
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert "drift=" in result.log

    prompts, seeds = ["a woman with black hair, blonde hair", "a man"], [0, 1]
    plain = draw(MODEL_FOLDER, None, prompts, seeds, "base", lambda *_: None)
    tuned = draw(MODEL_FOLDER, result.file, prompts, seeds, "tuned", lambda *_: None)
    assert tuned.shape == plain.shape == (2, 128, 128, 3)
    assert np.abs(tuned.astype(int) - plain).max() > 0
