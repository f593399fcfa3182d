"""musubi-tuner's transformers in full size, read once a process (`full_size.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.hosts.musubi.classes import checkouts

MUSUBI_HOSTS = checkouts()


@cache
def full_size(host: Path) -> dict[str, Any]:
    """By model: its `base`, `parameters`, the `modules` of its LoRA (and `all modules`, with every pattern of the
    network's own lifted) with features in and out, and the size of its `blocks`."""
    script = Path(__file__).with_name("full_size.py")
    done = subprocess.run([sys.executable, str(script), str(host)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
