"""The host's transformers in full size, read once a process (`full_size.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.hosts.conftest import HOSTS

DIT_HOSTS = [host for host in HOSTS if (host / "anima_train_network.py").is_file()]


@cache
def full_size(host: Path) -> dict[str, Any]:
    """By model: its `parameters`, the `modules` of its LoRA with features in and out, and the size of its `blocks`."""
    script = Path(__file__).with_name("full_size.py")
    done = subprocess.run([sys.executable, str(script), str(host)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
