"""SPF's own state beside the training state of a trainer of kohya's (`--save_state`, `--resume`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spf_plugin.errors import SPFError
from spf_plugin.files import replace
from spf_plugin.hosts.resuming import STATE_FILE
from spf_plugin.pairs import State

PAIR_FILE = "spf_pair.safetensors"  # beside `STATE_FILE`, where a pair waits for its second step
HOST_STATE_FILE = "train_state.json"  # sd-scripts'; musubi-tuner has none, and begins to count anew


def register(accelerator: Any, state: Callable[[], State], load: Callable[[State], None]) -> None:
    """Keep `state()` with every training state that the accelerator saves, and call `load` when it loads one.

    Raises:
        SPFError: (when it loads) the file is damaged, or `load` refuses it.
    """
    from safetensors import SafetensorError  # type: ignore[attr-defined]
    from safetensors.torch import load_file, save_file

    def save_hook(_models: Any, _weights: Any, output_dir: str) -> None:
        if accelerator.is_main_process:
            kept, folder = state(), Path(output_dir)
            if kept.tensors:
                partial = folder / (PAIR_FILE + ".partial")
                save_file(dict(kept.tensors), partial)
                replace(partial, folder / PAIR_FILE)
            partial = folder / (STATE_FILE + ".partial")
            partial.write_text(json.dumps(kept.values), encoding="utf-8")
            replace(partial, folder / STATE_FILE)

    def load_hook(_models: Any, input_dir: str) -> None:
        ours, theirs = Path(input_dir) / STATE_FILE, Path(input_dir) / HOST_STATE_FILE
        if ours.is_file():
            pair = Path(input_dir) / PAIR_FILE
            try:
                values = json.loads(ours.read_text(encoding="utf-8"))
                # Every process goes on with the main one's pair: they alternate together.
                load(State(values, load_file(pair) if "pair" in values and pair.is_file() else {}))
            except SPFError:
                raise
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                raise SPFError(
                    f"{ours} is damaged ({type(error).__name__}: {error}). Delete it, and the run goes on from the "
                    "host's own step."
                ) from error
        elif theirs.is_file():  # saved by a run without SPF
            load(State({"step": json.loads(theirs.read_text(encoding="utf-8"))["current_step"]}))

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
