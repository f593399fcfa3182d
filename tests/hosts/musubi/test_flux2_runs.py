"""Inside a real musubi-tuner: what of FLUX.2's data is refused, and the host's own caching of latents."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hosts.musubi.conftest import EVERY_STEP, Musubi, words


@pytest.mark.kinds("flux2_klein")
def test_control_images_in_the_cache_are_refused(musubi: Musubi, tmp_path: Path) -> None:
    """The host shows the model what it finds there, also where the data set has no such images any more."""
    folder = tmp_path / "data"
    shutil.copytree(musubi.data, folder)
    config = folder / "data.toml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(musubi.data), str(folder)), encoding="utf-8")
    first, second, *_ = sorted((folder / "cache").glob(f"*x*_{musubi.kind.CODE}.safetensors"))
    for path in (first, second):
        save_file({**load_file(path), "latents_control_0_8x8_float32": torch.zeros(128, 8, 8)}, path)
    refused = musubi.train(*EVERY_STEP, dataset_config=config)
    assert refused.returncode != 0
    assert "running training" not in refused.log
    assert f"2 of the cached latents have control images with them, e.g. {first}" in refused.said


@pytest.mark.kinds("flux2_klein", "krea2")
def test_all_that_the_hosts_own_scripts_cache(musubi: Musubi, tmp_path: Path) -> None:
    """From images and captions on: latents, text, prompts, training."""
    config = musubi.data_set(tmp_path / "data")
    cache = config.parent / "cache"
    for path in cache.iterdir():
        path.unlink()
    options = musubi.kind.options(musubi.models)
    flags = {"dataset_config": config, "vae": options["vae"], "num_workers": 1}
    if "model_version" in options:
        flags["model_version"] = options["model_version"]
    script = musubi.kind.SCRIPT.replace("train_network", "cache_latents")
    for result in (musubi.run(script, words(flags)), musubi.cache_text(config), musubi.cache_prompts(config)):
        assert result.returncode == 0, result.log[-4000:]
    result = musubi.train(*EVERY_STEP, dataset_config=config, max_train_steps=2)
    assert len(result.tensors()) == musubi.kind.TENSORS
    assert "drift=" in result.log
