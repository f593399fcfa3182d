"""Runs musubi-tuner's scripts unmodified, on models small enough for a CPU, and SPF's own command beside them.

    launcher.py --serve HOST       many runs in the musubi-tuner folder HOST, one JSON job a line on standard input:
                                   {"kind": ..., "models": ..., "script": ..., "args": [...], "log": ...} ->
                                   {"returncode": ...} (`forking`); a script is one of the host's, or `make`, `latents`
                                   or `spf`
    launcher.py HOST JOB           one of them, which is written in the file JOB

`av` reads videos, which images do not need: an empty module stands in where it is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import torch

from tests.hosts import forking, launcher
from tests.hosts.musubi.kinds import kind


def prepare(host: Path) -> None:
    """Make the host importable as its scripts expect."""
    torch.set_num_threads(1)
    launcher._torchvision_importable()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        launcher._frozen_models_without_ddp()
    if find_spec("av") is None:
        sys.modules["av"] = module_from_spec(ModuleSpec("av", None))
    sys.path.insert(0, str(host / "src"))
    os.chdir(host)


def run(host: Path, job: dict[str, Any]) -> None:
    made, models, words = kind(job["kind"]), Path(job["models"]), job["args"]
    if job["script"] == "make":
        made.make(models)
        return
    if job["script"] == "latents":
        cache, name, width, height, seed, *frames = words
        made.latents(Path(cache), name, (int(width), int(height)), int(seed), *map(int, frames))
        return
    made.shrink(models)
    if job["script"] == "spf":
        importlib.import_module("spf_plugin.tools.cli").app(args=words, prog_name="spf")
        return
    swap_in_place()
    sys.argv = [str(host / job["script"]), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def swap_in_place() -> None:
    """Let block swap move nothing where the device is the CPU: see `tests.hosts.dits.common.swap_in_place`. The host
    asks for the present card before it moves anything."""
    from musubi_tuner.modules import custom_offloading_utils as utils

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0
        torch.cuda.set_device = lambda device: None
    original = utils.swap_weight_devices_no_cuda

    def swap(device: Any, *layers: Any) -> None:
        if torch.device(device).type != "cpu":
            original(device, *layers)

    utils.swap_weight_devices_no_cuda = swap


def serve(host: Path) -> None:
    def prepared() -> None:
        prepare(host)
        import musubi_tuner.hv_train_network
        import musubi_tuner.networks.lora
        import musubi_tuner.training.trainer_base  # noqa: F401  the slow imports, before the first fork

    forking.serve(prepared, lambda job: run(host, job))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]).resolve())
    else:
        place, wanted = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        prepare(place)
        run(place, wanted)
