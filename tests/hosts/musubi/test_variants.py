"""Inside a real musubi-tuner: clips, the two models of Wan 2.2, 8 bits, and what of a known trainer is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.musubi.conftest import CAPTIONS, EVERY_STEP, SIZES, TARGET, Musubi, equal
from tests.hosts.musubi.test_runs import OFF, SPY, pairs

FRAMES = 3  # as the model has them: of 9
pytestmark = pytest.mark.kinds("wan")


@pytest.fixture(scope="module")
def clips(musubi: Musubi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of clips with a target, and of a few that have none; returns its configuration."""
    folder = tmp_path_factory.mktemp("clips")
    videos, cache = folder / "videos", folder / "cache"
    videos.mkdir()
    cache.mkdir()
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        (videos / f"{name}.mp4").touch()  # whose latents are cached already
        (videos / f"{name}.txt").write_text(caption, encoding="utf-8")
        musubi.done("latents", cache, name, *SIZES[i % 2], i, FRAMES)
    config = folder / "clips.toml"
    config.write_text(
        "[general]\nresolution = [192, 128]\nbatch_size = 2\nenable_bucket = true\n[[datasets]]\n"
        f'video_directory = "{videos}"\ncaption_extension = ".txt"\ntarget_frames = [9]\nnum_repeats = 2\n'
        f'cache_directory = "{cache}"\n',
        encoding="utf-8",
    )
    for result in (musubi.cache_text(config), musubi.cache_prompts(config)):
        assert result.returncode == 0, result.log[-4000:]
    return config


def test_clips(musubi: Musubi, clips: Path) -> None:
    """The reference is the base model, and all frames of a clip are compared."""
    seen = pairs(musubi.train(*EVERY_STEP, module=SPY, dataset_config=clips))
    assert len(seen) >= 2
    latent = {(16, FRAMES * height // 8, width // 8) for width, height in SIZES}
    assert {tuple(pair["shape"][1:]) for pair in seen} <= latent
    measured = musubi.train(TARGET, *OFF, "spf_log_every=1", dataset_config=clips, gradient_checkpointing=True)
    plain = musubi.plain(dataset_config=clips, gradient_checkpointing=True)
    assert "drift=" in measured.log
    assert equal(measured.tensors(), plain.tensors())


def test_pictures_beside_clips(musubi: Musubi, clips: Path, tmp_path: Path) -> None:
    """In one run, as in `presets/musubi/dataset-wan.toml`: a pair begins with a clip while the next batch is of
    pictures, and the other way round."""
    general, pictures = (musubi.data / "data.toml").read_text(encoding="utf-8").split("[[datasets]]")
    ours = clips.read_text(encoding="utf-8").split("[[datasets]]")[1]
    config = tmp_path / "both.toml"
    config.write_text(f"{general}[[datasets]]{pictures}[[datasets]]{ours}", encoding="utf-8")
    seen = pairs(musubi.train(*EVERY_STEP, module=SPY, dataset_config=config, max_train_steps=16))
    assert len({pair["shape"][-2] > 24 for pair in seen}) == 2  # frames lie one above the other
    measured = musubi.train(TARGET, *OFF, dataset_config=config)
    assert equal(measured.tensors(), musubi.plain(dataset_config=config).tensors())


def test_pictures_of_a_clip_show_its_frames(musubi: Musubi, clips: Path) -> None:
    from PIL import Image

    result = musubi.train(
        TARGET, "spf_log_every=1", "spf_preview_every=1", dataset_config=clips, min_timestep=300, max_timestep=600
    )
    assert result.returncode == 0, result.log[-4000:]
    assert "no more pictures" not in result.said
    (first, *_) = sorted(result.folder.rglob("sample*.png"))
    with Image.open(first) as picture:
        assert picture.width > 0


@pytest.mark.parametrize("forced", [False, True], ids=["own", "forced-2.1"])
def test_one_model_of_wan_2_2(musubi: Musubi, forced: bool) -> None:
    flags = {"task": "t2v-A14B", "dit": musubi.models / "dit22.safetensors", "max_timestep": 875}
    assert len(pairs(musubi.train(*EVERY_STEP, module=SPY, force_v2_1_time_embedding=forced, **flags))) >= 2


def test_both_models_of_wan_2_2_at_once_are_refused(musubi: Musubi) -> None:
    model = musubi.models / "dit22.safetensors"
    result = musubi.train(*EVERY_STEP, task="t2v-A14B", dit=model, dit_high_noise=model)
    assert result.returncode != 0
    assert "--dit_high_noise" in result.said
    assert "epoch 1" not in result.log


@pytest.mark.kinds("zimage", "flux2_klein")
def test_8_bits_alone(musubi: Musubi) -> None:
    """Two samples in a batch. Without SPF the host fails, so with it the run is refused."""
    flags = {"fp8_base": True, "mixed_precision": "bf16", "max_train_steps": 1}
    plain = musubi.plain(**flags)
    assert plain.returncode != 0
    assert "Float8" in plain.log
    refused = musubi.train(TARGET, **flags)
    assert "--fp8_base needs --fp8_scaled beside it" in refused.said
    assert "epoch 1" not in refused.log


@pytest.mark.kinds("qwen_image")
@pytest.mark.parametrize("version", ["edit", "edit-2509", "edit-2511", "layered"])
def test_models_that_are_given_a_picture_are_refused(musubi: Musubi, version: str) -> None:
    """Before an encoder is loaded."""
    result = musubi.cache_prompts(musubi.data / "data.toml", model_version=version)
    assert result.returncode != 0
    assert f"Qwen-Image {version}" in result.said
    assert "Loading state dict" not in result.log
