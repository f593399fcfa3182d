"""`spf decoder`: the matrix it fits is the least-squares one, the response term takes it, mistakes are one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from portraitlab.customisation import write_set
from spf_plugin.tools import cli
from spf_plugin.trainer import models

MODEL = Path(__file__).parents[1] / "portraitlab" / "model"


def spf(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["decoder", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), "sunglasses", count=6)


def test_a_matrix_for_the_embedded_model(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    done = spf("--model", MODEL, "--data", images, "--out", out)
    assert done.exit_code == 0, done.output
    assert "on 6 images" in done.output
    assert f"spf_decoder={out}" in done.output.replace("\n", "")

    model = models.load(str(MODEL))
    random = torch.Generator().manual_seed(0)
    rows, colours = [], []
    for path in sorted(images.glob("*.png")):
        picture = np.asarray(Image.open(path), np.float64) / 127.5 - 1
        latents = model.to_latents(torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1), random).double()
        side = latents.shape[-1]
        rows.append(latents.permute(1, 2, 0).reshape(-1, 4).numpy())
        cells = picture.reshape(side, 128 // side, side, 128 // side, 3).mean(axis=(1, 3))
        colours.append(cells.reshape(-1, 3))
    x, y = np.concatenate(rows), np.concatenate(colours)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    found = load_file(out)
    fitted = np.concatenate([found["weight"].double().numpy(), found["bias"].double().numpy()[None]])
    error = np.sqrt(((x @ best - y) ** 2).mean())
    assert np.sqrt(((x @ fitted - y) ** 2).mean()) == pytest.approx(error, rel=0.01)
    said = re.search(r"misses ([\d.]+)", done.output)
    assert said
    assert float(said[1]) == pytest.approx(error, abs=0.002)


def test_mistakes_give_one_sentence(images: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for words, said in (
        (["--data", images, "--out", tmp_path / "m.pt"], "must end in .safetensors"),
        (["--data", tmp_path / "none", "--out", tmp_path / "m.safetensors"], "there is no such folder"),
        (["--data", tmp_path / "few", "--out", tmp_path / "m.safetensors"], "at least 4 are needed"),
    ):
        done = spf("--model", MODEL, *words)
        assert done.exit_code == 2
        assert said in done.output
        assert "Traceback" not in done.output
    assert not list(tmp_path.glob("m.*"))
