"""The response term inside unmodified sd-scripts, on tiny models and a tiny CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.hosts.conftest import Host, Result

USUAL = ("spf_target=blonde hair", "spf_log_every=1", "spf_preview_every=0")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("clip"))


def equal(a: Result, b: Result) -> bool:
    first, second = a.tensors(), b.tensors()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "mode", "flags"),
    [
        ("sd15", "directional", {}),
        # Both releases train SDXL in test_training, and the response on SD1.5 here.
        pytest.param(
            *("sdxl", "anchor", {"gradient_checkpointing": True, "cache_latents": True, "max_train_steps": 2}),
            marks=pytest.mark.one_host,
        ),
    ],
)
def test_it_trains(host: Host, clip: Path, model: str, mode: str, flags: dict[str, object]) -> None:
    """It changes the LoRA."""
    common: dict[str, object] = {"model": model, "max_train_steps": 3, **flags}
    without = host.train(*USUAL, **common, max_timestep=600)  # type: ignore[arg-type]
    words = (*USUAL, f"spf_response={mode}", f"spf_clip={clip}")
    with_it = host.train(*words, **common, max_timestep=600)  # type: ignore[arg-type]
    for result in (without, with_it):
        assert result.returncode == 0, result.log[-3000:]
    assert "VaeDecoder" in with_it.log  # a tiny VAE is none that a matrix is known for
    assert all(torch.isfinite(t).all() for t in with_it.tensors().values())
    assert not equal(with_it, without)
    assert f'"spf_response": "{mode}"' in with_it.metadata()["ss_network_args"]
