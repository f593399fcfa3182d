"""A drawing style: the picture redrawn, and how much of it is read off a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from portraitlab import style
from portraitlab.autoencoder import to_tensor
from portraitlab.judge import accuracy, load_judge, predict
from portraitlab.lab import styled
from portraitlab.model_files import JUDGE_FILE
from portraitlab.portraits import BALANCED_RATES, render_batch, sample_person


def slow(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """`style.redrawn` pixel by pixel in float64, from its description."""
    height, width, _ = image.shape
    x = image.astype(np.float64) / 255

    def at(a: NDArray[np.float64], row: int, column: int) -> NDArray[np.float64]:
        return a[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]

    edges = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            across, down = at(x, i, j + 1) - at(x, i, j - 1), at(x, i + 1, j) - at(x, i - 1, j)
            length = max((a * a / 4 + d * d / 4) ** 0.5 for a, d in zip(across, down, strict=True))
            edges[i, j] = min(max((length - 0.06) * 6, 0), 1)
    out = np.zeros_like(x)
    weights = {-1: 1, 0: 2, 1: 1}
    for i in range(height):
        for j in range(width):
            near = sum(weights[a] * weights[b] * at(edges, i + a, j + b) for a in weights for b in weights) / 16
            ink = min(1.2 * float(near), 1)
            wash = 0.3 * np.array([0.96, 0.93, 0.85]) + 0.7 * x[i, j]
            out[i, j] = 255 * ((1 - ink) * wash + ink * np.array([0.12, 0.10, 0.14]))
    return out


def test_a_picture_is_redrawn_as_described() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    image[:, :4] = (200, 40, 90)  # flat, and an edge
    assert np.abs(style.redrawn(image) - slow(image)).max() <= 0.51
    assert np.array_equal(style.redrawn(np.stack([image, image]))[1], style.redrawn(image))
    flat = np.full((5, 5, 3), 100, np.uint8)
    assert len(np.unique(style.redrawn(flat).reshape(-1, 3), axis=0)) == 1  # paper shines through, and nothing is inked


def test_what_changed_beside_the_style() -> None:
    rng = np.random.default_rng(1)
    base = render_batch([sample_person(rng), sample_person(rng)])[0]
    for share in (0.0, 0.4, 1.0):  # the style alone, as far as eight bits go
        assert styled.beside(styled.blended(base, np.full(2, share)), base).max() < 1e-5
    other = styled.blended(base, np.full(2, 0.5))
    other[:, 20:60, 30:90] = rng.integers(0, 256, (2, 40, 60, 3))
    b, r, x = (a.astype(np.float64) / 255 for a in (base, style.redrawn(base), other))
    tried = [((x - (1 - s) * b - s * r) ** 2).mean((1, 2, 3)) for s in np.linspace(0, 1, 501)]
    assert styled.beside(other, base) == pytest.approx(np.min(tried, axis=0), rel=1e-4)


def test_the_style_is_read_off_other_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without the autoencoder's blur."""
    monkeypatch.setattr(styled, "encode", lambda _, images: to_tensor(images))
    monkeypatch.setattr(styled, "decode", lambda _, pixels: pixels)
    monkeypatch.setattr(styled, "_taught", lambda judge, *_: judge)
    reader = styled.StyleReader.fitted(load_judge(JUDGE_FILE), None, count=192)
    rng = np.random.default_rng(5)
    plain = render_batch(sample_person(rng, BALANCED_RATES) for _ in range(40))[0]
    read = [reader.share(styled.blended(plain, np.full(40, share))).mean() for share in (0.0, 0.5, 1.0)]
    assert read[0] < 0.25 < read[1] < 0.75 < read[2]


def test_the_judge_learns_to_read_redrawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as sixteen of them go; the judge of the other measurements stays as it was."""
    monkeypatch.setattr(styled, "EPOCHS", 24)
    monkeypatch.setattr(styled, "BATCH", 16)
    own = load_judge(JUDGE_FILE)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    rng = np.random.default_rng(5)
    people = [sample_person(rng, BALANCED_RATES) for _ in range(16)]
    redrawn = style.redrawn(render_batch(people)[0])
    taught = styled._taught(own, redrawn, people, 0)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    truth = [person.labels() for person in people]
    wrong, right = (np.mean(list(accuracy(predict(judge, redrawn), truth).values())) for judge in (own, taught))
    assert right > 0.95 > wrong
