"""The judge: a faithful file, and good marks on portraits it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from portraitlab.judge import (
    CHOICES,
    OUTPUTS,
    Judge,
    accuracy,
    judge_loss,
    label_tensors,
    load_judge,
    predict,
    save_judge,
    split,
)
from portraitlab.model_files import JUDGE_FILE
from portraitlab.portraits import BALANCED_RATES, FLAGS, render_batch, sample_person


def people(count: int, seed: int):
    rng = np.random.default_rng(seed)
    return [sample_person(rng, BALANCED_RATES) for _ in range(count)]


def test_weights_survive_the_file(tmp_path):
    torch.manual_seed(0)
    judge = Judge().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    x = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(again(x), judge(x), atol=0.03, rtol=0.03)
    assert (tmp_path / "judge.safetensors").stat().st_size < 1e6
    assert [p.name for p in tmp_path.iterdir()] == ["judge.safetensors"]


def test_labels_round_trip_through_the_outputs():
    """Logits that shout the labels have no loss left but the smoothing, and are read back as the labels."""
    persons = people(12, 1)
    classes, flags = label_tensors(persons)
    logits = torch.full((12, OUTPUTS), -20.0)
    blocks, flag_block = split(logits)
    for row, person in enumerate(persons):
        for index, (name, values) in enumerate(CHOICES.items()):
            blocks[name][row, values.index(getattr(person, name))] = 20
            assert values[classes[row, index]] == getattr(person, name)
        for index, flag in enumerate(FLAGS):
            flag_block[row, index] = 20 if getattr(person, flag) else -20

    class Shouts(Judge):
        def forward(self, pixels):
            return logits

    images, _ = render_batch(persons, 64)
    seen = predict(Shouts(), images)
    assert set(accuracy(seen, [p.labels() for p in persons]).values()) == {1.0}
    assert judge_loss(logits, classes, flags) < judge_loss(-logits, classes, flags)


@pytest.mark.skipif(not JUDGE_FILE.exists(), reason="no judge exported yet")
def test_shipped_judge_reads_unseen_renders():
    persons = people(200, 4321)
    scores = accuracy(predict(load_judge(JUDGE_FILE), render_batch(persons)[0]), [p.labels() for p in persons])
    for name in ("hair_colour", "clothes_colour", "background", *FLAGS):
        assert scores[name] >= 0.93, (name, scores[name])
