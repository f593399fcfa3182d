"""Surroundings: torchvision that cannot be imported, and memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from portraitlab import environment
from portraitlab.environment import bfloat16_where_fast, keep_freed_memory
from portraitlab.training import half_precision


def run(code: str, path: Path) -> str:
    """The output of `code` in a fresh interpreter that finds modules in `path` first."""
    import os

    found = os.pathsep.join([str(path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": found},
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("body", "hidden"), [("raise RuntimeError('operator torchvision::nms')", "True"), ("", "False")]
)
def test_only_a_broken_torchvision_is_hidden(tmp_path, body, hidden):
    (tmp_path / "torchvision.py").write_text(body + "\n")
    code = (
        "import importlib.util, portraitlab.environment as e; "
        "print(e.hide_broken_torchvision(), importlib.util.find_spec('torchvision') is None)"
    )
    assert run(code, tmp_path) == f"{hidden} {hidden}"


def test_keeping_memory_is_possible_on_glibc_and_harmless_elsewhere():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    assert torch.ones(1 << 20).sum() == 1 << 20


def test_autocast_is_on_for_a_gpu_and_decided_by_the_processor_otherwise():
    with bfloat16_where_fast("cpu"):
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype in (torch.float32, torch.bfloat16)
    assert torch.equal(product.float(), torch.full((4, 4), 4.0))


def test_half_precision_computes_attention_as_pytorch_does_and_puts_it_back(monkeypatch):
    monkeypatch.setattr(environment, "_multiplies_bfloat16", lambda: True)
    before = F.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.tensor([[True, True, True, False, False]]).expand(5, 5)
    plain, masked = before(query, key, value), before(query, key, value, attn_mask=mask)
    with half_precision("cpu"):
        ours = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), plain, atol=0.03, rtol=0.03)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, mask).float(), masked)
    assert F.scaled_dot_product_attention is before
