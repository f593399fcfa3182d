"""Training inside a real, unmodified musubi-tuner: tiny models of the host's own classes, on the CPU. What a kind is,
its module here says; here is what must be true of all."""

from __future__ import annotations

from tests.hosts.musubi.conftest import EVERY_STEP, Musubi, relative_error


def test_it_trains_an_ordinary_lora(musubi: Musubi) -> None:
    plain = musubi.plain()
    result = musubi.train(*EVERY_STEP)
    tensors = result.tensors()
    assert tensors.keys() == plain.tensors().keys()
    assert len(tensors) == musubi.kind.TENSORS
    assert relative_error(tensors, plain.tensors()) > 1e-2
    assert "drift=" in result.log
