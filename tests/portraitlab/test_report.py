"""The report's pieces: maps against a slow computation, pictures, and a page that stands alone."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from portraitlab.report import TEMPLATE
from portraitlab.report.figures import drift_curves, trade_off
from portraitlab.report.maps import separation
from spf_plugin.core.prompt import Target
from spf_plugin.tools.report import figures, maps, page
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.settings import Settings
from tests import tiny

CAPTION = "a woman, green shirt, street, blonde hair"


class Elements(HTMLParser):
    """Every start tag of a page with its attributes; remembers tags that are opened and not closed."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> Elements:
    """Alt texts on every picture, nothing fetched from elsewhere, no scripts, tags in order."""
    page = Elements(text)
    assert page.open == []
    images = [attributes for tag, attributes in page.found if tag == "img"]
    assert images
    for attributes in images:
        assert attributes["alt"]
        source = attributes["src"] or ""
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).verify()
    assert not {tag for tag, _ in page.found} & {"script", "link", "iframe", "object", "base"}
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=", without_images)
    assert '<meta name="viewport"' in text
    return page


@pytest.fixture(scope="module")
def pipeline(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model with a LoRA of a few steps."""
    from diffusers import StableDiffusionPipeline

    root = tmp_path_factory.mktemp("report")
    images = tiny.images(root / "images")
    result = train(
        Settings(str(tiny_sd15), images, root / "lora.safetensors", None, steps=3, rank=4, learning_rate=1e-2)
    )
    loaded = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None)
    loaded.load_lora_weights(str(result.path.parent), weight_name=result.path.name)
    return loaded


def test_the_difference_map_is_that_of_two_separate_predictions(pipeline: Any) -> None:
    """Against the pipeline called by hand: LoRA scaled to 0 for the base prompt, on for the full prompt."""
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    found = maps.explain(
        pipeline, image, CAPTION, Target("blonde hair"), timesteps=(200, 700), kinds=("difference",), gain=1.0, draws=1
    )
    assert list(found.phrases) == ["a woman", "green shirt", "street", "blonde hair"]
    assert set(found.distances) == {"a woman", "green shirt", "street"}
    assert all(m.shape == (16, 16) and m.min() >= 0 and m.max() <= 1 for m in found.phrases.values())

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        posterior = pipeline.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape[1:], generator=random)
        latents = latents * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=random)
        for step, m in found.control["difference"].items():
            noisy = pipeline.scheduler.add_noise(latents, noise, torch.tensor([step]))
            predictions = []
            for prompt, scale in (("a woman, green shirt, street", 0.0), (CAPTION, 1.0)):
                states = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
                out = pipeline.unet(
                    noisy, step, encoder_hidden_states=states, cross_attention_kwargs={"scale": scale}
                ).sample
                predictions.append(out)
            difference = (predictions[1] - predictions[0]).abs().mean(dim=1)[0].numpy()
            low, high = np.quantile(difference, [0.02, 0.98])
            stretched = np.clip((difference - low) / (high - low), 0, 1)
            stretched = np.clip(stretched / np.quantile(stretched, 0.98), 0, 1)
            grown = np.pad(stretched, 1)
            expected = np.max([grown[i : i + 16, j : j + 16] for i in range(3) for j in range(3)], axis=0)
            np.testing.assert_allclose(m, expected, atol=2e-3)


def test_what_is_subtracted_is_each_phrases_share_times_its_distance_or_half(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, torch.Tensor] = {}

    def seen(kind: str, **passed: Any) -> torch.Tensor:
        given.update(passed)
        return control_map(kind, **passed)

    control_map = maps.sfcm.control_map
    monkeypatch.setattr(maps.sfcm, "control_map", seen)
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    found = maps.explain(pipeline, image, CAPTION, Target("blonde hair"), timesteps=(300,), kinds=("soft",), draws=2)
    attention = torch.cat([given["phrase_maps"], given["target_map"]], dim=1).numpy()
    distances = list(found.distances.values())
    for y, x in ((0, 0), (3, 9), (15, 15)):
        places = attention[:, :, y, x]
        taken = [sum(min(w, 0.5) * a for w, a in zip(distances, draw, strict=False)) / draw.sum() for draw in places]
        assert found.subtracted[300][y, x] == pytest.approx(np.mean(taken), rel=1e-4)


def test_the_lora_is_on_again_afterwards(pipeline: Any) -> None:
    def predict() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.unet(torch.ones(1, 4, 16, 16), 500, encoder_hidden_states=torch.ones(1, 77, 64)).sample

    before = predict()
    maps.explain(pipeline, np.zeros((128, 128, 3), np.uint8), CAPTION, Target("blonde hair"), timesteps=(500,), draws=1)
    assert torch.equal(predict(), before)
    pipeline.disable_lora()
    assert not torch.allclose(predict(), before)
    pipeline.enable_lora()


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    heat = rng.integers(0, 4, (4, 4)).astype(np.float32)  # with ties
    region = np.zeros((32, 32), bool)
    region[:16, 8:] = True
    inside = [heat[i, j] for i in range(4) for j in range(4) if i < 2 and j >= 1]
    outside = [heat[i, j] for i in range(4) for j in range(4) if not (i < 2 and j >= 1)]
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert separation(region, heat) == pytest.approx(sum(pairs) / len(pairs))
    assert np.isnan(separation(np.zeros((32, 32), bool), heat))


def test_pictures() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    grid = figures.sheet([cells[:2], cells[2:]], gap=2)
    assert grid.shape == (18, 18, 3)
    assert np.array_equal(grid[10:, :8], cells[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(figures.png(grid)))), grid)
    cold = figures.heat_over(cells[0], np.zeros((2, 2)))
    assert (cold == cold[..., :1]).all()  # grey where the map is dark
    hot = figures.heat_over(cells[0], np.ones((2, 2)))
    assert (hot.max(axis=-1) > hot.min(axis=-1)).all()
    rows = [{"step": s, "spf/drift_outside": 0.1 * s} for s in range(4)]
    for content in (
        drift_curves({"plain": rows, "spf": [{"step": 1}]}, 2),
        trade_off({"base": [(0.1, 0.2)], "plain": [(0.3, 0.9)], "spf": [(0.1, 0.8)]}),
    ):
        assert min(Image.open(io.BytesIO(content)).size) > 300


def test_a_page_without_a_value_is_an_error_and_leaves_the_old_page(tmp_path: Path) -> None:
    import jinja2

    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(jinja2.UndefinedError):
        page.write(path, {"title": "x"}, TEMPLATE)
    assert path.read_text(encoding="utf-8") == "old"
