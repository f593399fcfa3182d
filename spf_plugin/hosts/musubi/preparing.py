"""musubi-tuner makes a data set as its trainer does before it loads a model, and says what it made of it.

For `spf check`, in a process of its own (`spf_plugin/hosts/answering.py`). The steps are those of the trainer's
`_build_dataset` (v0.3.4, 30c658c); nothing is written.
"""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from dataclasses import asdict
from typing import Any

from spf_plugin.hosts import answering
from spf_plugin.hosts.musubi.dataset import of_host

_SIMPLE = (bool, int, float, str)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the host makes of a run.

    Args:
        request: `config`, the `--dataset_config`; `code`, its name of the architecture, empty where the trainer is not
            known and nothing cached is looked at; `timestep_buckets`, of the run's options.

    Returns:
        See `answering.told`: of each data set a `Dataset`, and `values`, simple attributes; of a known trainer
        `buckets`, width, height and cached items with repeats of each, and `batches` of an epoch, too.
    """
    try:
        config_utils = importlib.import_module("musubi_tuner.dataset.config_utils")
    except (Exception, SystemExit) as error:
        return {"cannot": answering.words(error)}
    return answering.told(lambda: _made(request, config_utils), __file__)


def _made(request: dict[str, Any], config_utils: Any) -> list[dict[str, Any]]:
    config = config_utils.load_user_config(request["config"])
    generator = config_utils.BlueprintGenerator(config_utils.ConfigSanitizer())
    # Of the architectures Wan's takes both images and videos.
    args, code = argparse.Namespace(debug_dataset=False), request["code"] or "wan"
    blueprint = generator.generate(config, args, architecture=code)
    group = config_utils.generate_dataset_group_by_blueprint(
        blueprint.dataset_group, training=bool(request["code"]), num_timestep_buckets=request["timestep_buckets"]
    )
    pairs = zip(of_host(group), group.datasets, strict=True)
    return [{**asdict(ours), **_told(theirs)} for ours, theirs in pairs]


def _told(dataset: Any) -> dict[str, Any]:
    values = {name: value for name, value in vars(dataset).items() if isinstance(value, _SIMPLE)}
    found: dict[str, Any] = {"values": {**values, "resolution": list(dataset.resolution)}}
    if dataset.batch_manager is not None:
        sizes: Counter[tuple[int, int]] = Counter()
        for key, bucket in dataset.batch_manager.buckets.items():  # behind the size may stand frames
            sizes[key[0], key[1]] += len(bucket)
        found["buckets"] = [[int(width), int(height), count] for (width, height), count in sorted(sizes.items())]
        found["batches"] = len(dataset.batch_manager)
    return found
