"""The lanes that need a second Python environment, and a loud word where they were skipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Environment variable that names an interpreter -> what its environment holds (docs/lora-files.md: how to make them).
LANES = {
    "SPF_TRANSFORMERS5_PYTHON": "transformers 5 with its diffusers and peft",
    "SPF_SDCPP_PYTHON": "stable-diffusion-cpp-python",
}

# Environment variable that names a checkout of a loader -> what it is.
CHECKOUTS = {"SPF_A1111": "A1111's own code", "SPF_FORGE": "Forge's own code", "SPF_COMFYUI": "ComfyUI's own code"}


def checkout(variable: str) -> Path:
    """The checkout that `variable` names; skips the test where it is not set, fails it where it is wrong."""
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"NOT RUN: {variable} names no checkout (docs/lora-files.md)")
    assert Path(named).is_dir(), f"{variable}={named} is no folder"
    return Path(named)


def interpreter(variable: str) -> str:
    """The interpreter that `variable` names; skips the test where it is not set, fails it where it is wrong."""
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"NOT RUN: {variable} names no Python with {LANES[variable]} (docs/lora-files.md)")
    found = shutil.which(named)
    assert found, f"{variable}={named} is no program"
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for variable, what in (LANES | CHECKOUTS).items():
        if not os.environ.get(variable):
            terminalreporter.write_line(f"NOT RUN with {what}: {variable} is not set.", red=True, bold=True)
