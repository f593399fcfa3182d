"""What the pictures share: borders, and the demo's own pollution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portraitlab.captions import TARGETS
from portraitlab.customisation import write_set
from spf_plugin.tools.check import borders
from spf_plugin.tools.check.run import check


def shared(folder: Path, target: str, **options: Any) -> list[Any]:
    write_set(folder, target, **options)
    report = check(folder, {}, target=TARGETS[target].phrase, tokenizer=folder / "none")
    return [finding for finding in report.findings if finding.code == "same-border"]


@pytest.mark.parametrize("target", ["sunglasses", "blonde", "hat"])
def test_the_demos_pollution_is_seen(target: str, tmp_path: Path) -> None:
    (finding,) = shared(tmp_path, target)
    assert finding.level == "warning"
    assert "23 of 24 images" in finding.message
    assert "same red border, and none of their captions says anything of a background" in finding.message
    labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))["images"]
    polluted = {Path(row["file"]).name for row in labels if row["polluted"]}
    assert {Path(name).name for name in finding.images} == polluted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"pollution": 0.0}, {"mentioned": 1.0}, {"pollution": 0.5}])
def test_a_clean_or_well_captioned_set_is_not_accused(options: dict[str, float], seed: int, tmp_path: Path) -> None:
    assert not shared(tmp_path, "sunglasses", seed=seed, **options)


def test_a_border_that_images_without_the_target_have_too(tmp_path: Path) -> None:
    images = write_set(tmp_path, "sunglasses")
    for path in sorted(images.glob("*.txt"))[::2]:
        path.write_text("a woman in a coat\n", encoding="utf-8")
    found = check(tmp_path, {}, target="sunglasses", tokenizer=tmp_path / "none").findings
    assert "same-border" not in {finding.code for finding in found}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_has_a_border(mode: str) -> None:
    from PIL import Image

    image = Image.new("RGB", (40, 30), (250, 250, 250)).convert("L" if mode == "I;16" else mode).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(256)
    colour = borders.border(image)
    assert colour is not None
    assert borders.colour_name(colour) == "white"


def test_a_street_has_no_border() -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    assert borders.border(Image.fromarray(noise)) is None
    half = Image.new("RGB", (64, 64), "white")
    half.paste((20, 60, 20), (0, 0, 30, 64))
    assert borders.border(half) is None


def test_colours_are_measured_as_opencv_does() -> None:
    import cv2

    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    assert np.abs(borders.to_lab(colours) - theirs).max() < 0.5
    for name, rgb in (("white", (250, 250, 250)), ("red", (200, 30, 30)), ("brown", (90, 60, 40))):
        assert borders.colour_name(borders.to_lab(rgb)) == name
