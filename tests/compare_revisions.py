"""Do two revisions train the same LoRAs, to the last bit? For changes that may change no number.

    python -m tests.compare_revisions REVISION [--only WORDS]

trains tiny models (SD1.5 and SDXL) in every sd-scripts checkout that the tests use, with SPF at work in three settings,
with and without gradient checkpointing: with the package as it is here, and as it was at REVISION (in a git worktree).
Says which tensors differ, and fails if any does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch

from tests.hosts.conftest import HOSTS, REPOSITORY, Host, Models

TARGET = "spf_target=blonde hair"
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "defaults": ((TARGET, "spf_log_every=1"), {}),
    "every loss, one layer in three, paper's map": (
        (TARGET, "spf_map=paper", "spf_layers=all", "spf_diffusion_region=all", "spf_stage2_start=2"),
        {"min_snr_gamma": 5, "max_train_steps": 6},
    ),
    "text encoder, accumulation, bf16": (
        (TARGET, "spf_log_every=1"),
        {"network_train_unet_only": None, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    ),
}


class OtherHost(Host):
    """A checkout whose trainings import the package of another folder."""

    repository = REPOSITORY

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "PYTHONPATH": str(self.repository)}


def _make(root: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    def made_once(name: str, build: Callable[[Path], object]) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            build(path)
        return path

    return made_once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of this repository, to compare with")
    parser.add_argument("--only", default="", help="only what has these words in its name")
    words = parser.parse_args()
    if not HOSTS:
        print("no sd-scripts checkout found: see the README, Tests")
        return 2
    different = compared = 0
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        then = root / "then"
        subprocess.run(
            ["git", "-C", str(REPOSITORY), "worktree", "add", "-q", "--detach", str(then), words.revision], check=True
        )
        stack.callback(subprocess.run, ["git", "-C", str(REPOSITORY), "worktree", "remove", "--force", str(then)])
        models = Models(_make(root))  # type: ignore[arg-type]
        for folder in HOSTS:
            hosts = []
            for name, repository in (("now", REPOSITORY), ("before", then)):
                work = root / f"{folder.name}-{name}"
                work.mkdir()
                host = OtherHost(folder, models, work, _make(work))  # type: ignore[arg-type]
                host.repository = repository
                code = "import spf_plugin; print(spf_plugin.__path__[0])"
                found = subprocess.check_output(
                    [sys.executable, "-c", code], text=True, env=host.environment(), cwd=work
                )
                assert Path(found.strip()) == repository / "spf_plugin", found
                stack.callback(host.close)
                hosts.append(host)
            for model, (name, (settings, flags)), checkpointing in product(
                ("sd15", "sdxl"), SETTINGS.items(), (False, True)
            ):
                title = f"{folder.name} {model} {name}{', checkpointing' if checkpointing else ''}"
                if words.only not in title:
                    continue
                now, before = (
                    host.train(*settings, model=model, gradient_checkpointing=checkpointing, **flags).tensors()
                    for host in hosts
                )
                unequal = [key for key in now.keys() | before.keys() if not torch.equal(now[key], before[key])]
                compared, different = compared + 1, different + bool(unequal)
                print(
                    f"{title}: {f'{len(unequal)} of {len(now)} tensors differ' if unequal else 'the same'}", flush=True
                )
    print(f"{compared - different} of {compared} LoRAs are the same to the last bit")
    return 1 if different or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
