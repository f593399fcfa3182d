"""What a run that goes on from a saved state (`--resume`) may not change, and what it changes with a word.

The state says with which settings it was made. Another target is another LoRA: such a run stops. Every other setting is
the run's own to choose, and is named. Functions of plain data, without torch, that a run and `spf check` share.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target, parse_targets
from spf_plugin.errors import SPFError
from spf_plugin.files import read_json
from spf_plugin.hosts.looking import sought

STATE_FILE = "spf_state.json"  # beside the host's own files
_SETTINGS, _SUBSETS, _TARGET = "settings", "subset_targets", "spf_target"
_SHOWN = ("spf_log_every", "spf_preview_every")  # they change nothing that is trained


def kept(config: SPFConfig, subsets: Sequence[Target]) -> dict[str, Any]:
    """What a state keeps of its run's settings: values of JSON types.

    Args:
        config: the settings.
        subsets: targets of parts of the data set.
    """
    return {_SETTINGS: config.to_metadata(), _SUBSETS: sorted(set(map(str, subsets)))}


def of_run(args: Any) -> Mapping[str, Any]:
    """What the state says that a run's arguments name; nothing where it is not here, or cannot be read."""
    folder = getattr(args, "resume", None)
    if not folder or getattr(args, "resume_from_huggingface", False):
        return {}
    path = Path(str(folder), STATE_FILE)
    try:
        values = read_json(path) if os.path.isfile(path) else {}
    except SPFError:  # who loads it says why
        return {}
    return values if isinstance(values, dict) else {}


def problems(
    values: Mapping[str, Any], config: SPFConfig, subsets: Sequence[Target], wrong: Collection[str] = ()
) -> list[str]:
    """Why a run may not go on from a state.

    Args:
        values: of the state, which an earlier version may have written: then it says nothing.
        config: the settings of the run.
        subsets: targets of parts of its data set.
        wrong: settings whose value is not known (`config.Read`).
    """
    found: list[str] = []
    before = _settings(values)
    if not before or "target" in wrong:
        return found
    try:
        said = [*filter(None, [before.get(_TARGET)]), *values.get(_SUBSETS, ())]
        same = sought(parse_targets(said)) == sought([*config.target, *subsets])
    except (ValueError, TypeError, AttributeError):  # no targets of ours
        return found
    if not same:
        now = "|".join(dict.fromkeys(map(str, [*config.target, *subsets]))) or "none"
        found.append(
            f"--resume: the state was saved with the target {'|'.join(dict.fromkeys(said)) or 'none'}, and this run's "
            f"is {now}: it would go on with a LoRA of something else. Name that target, or begin a new run from the "
            "LoRA's file: --network_weights FILE.safetensors in place of --resume."
        )
    return found


def changes(values: Mapping[str, Any], config: SPFConfig, wrong: Collection[str] = ()) -> list[str]:
    """What a run that goes on from a state does otherwise; the arguments are those of `problems`."""
    before, now = _settings(values), config.to_metadata()
    unknown = {name for name in SPFConfig().to_metadata() if name not in before}  # to the version that wrote it
    names = [
        name for name in now | before if name not in {_TARGET, *_SHOWN, *(f"spf_{each}" for each in wrong)} | unknown
    ]
    differ = [
        f"{name}={now.get(name, '')} (was {before.get(name) or 'not set'})"
        for name in names
        if before and now.get(name, "") != before.get(name, "")
    ]
    found: list[str] = []
    if differ:
        found.append(f"the state was saved with other settings, and this run goes on with its own: {', '.join(differ)}")
    return found


def _settings(values: Mapping[str, Any]) -> dict[str, str]:
    said = values.get(_SETTINGS)
    return {str(name): str(value) for name, value in said.items()} if isinstance(said, dict) else {}
