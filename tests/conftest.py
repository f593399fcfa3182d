"""What several test modules need and no one of them should make again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests import tiny

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, build)` is the file or folder `name`, built in the first xdist worker that asks for it.

    Whoever gets it only reads it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    root.mkdir(exist_ok=True)

    def make(name: str, build: Callable[[Path], object]) -> Path:
        made, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                if made.is_dir():  # what a build that failed has left
                    shutil.rmtree(made)
                build(made)
                done.touch()
        return made

    return make


@pytest.fixture(scope="session")
def tiny_sd15(made_once: MadeOnce) -> Path:
    """`tiny.sd15`, to be read only."""
    return made_once("sd15", tiny.sd15)
