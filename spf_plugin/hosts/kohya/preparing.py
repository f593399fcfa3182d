"""sd-scripts prepares a data set as its trainer does before it loads a model, and says what it made of it.

For `spf check`, in a process of its own (`spf_plugin/hosts/answering.py`). The steps are those of `train()` of v0.9.1
to v0.11.1; what would write or download is left out: log files, the tokenizers, and the file that `cache_info` keeps in
a folder of images.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from spf_plugin.hosts import answering
from spf_plugin.hosts.answering import Refused, Unknown

_SIMPLE = (bool, int, float, str, type(None))
_PICTURES_CHANGE = "when caching latents, either color_aug or random_crop cannot be used"  # the host's own words


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the host makes of a run.

    Args:
        request: `script` and `trainer`, the trainer's module and class; `words`, the options of its command line;
            `certain`, whether it is known to be the run's trainer.

    Returns:
        See `answering.told`: of each data set what `_told` says.
    """
    sys.argv = [f"{request['script']}.py", *request["words"]]
    try:
        script = importlib.import_module(request["script"])
        config_util = importlib.import_module("library.config_util")
        train_util = importlib.import_module("library.train_util")
        trainer, parser = getattr(script, request["trainer"])(), script.setup_parser()
    except (Exception, SystemExit) as error:
        return {"cannot": answering.words(error)}

    def prepare() -> list[dict[str, Any]]:
        args = _parsed(parser, train_util)
        return _prepared(args, trainer, config_util, train_util, certain=request["certain"])

    return answering.told(prepare, __file__)


def _parsed(parser: Any, train_util: ModuleType) -> Any:
    """The options, as the script's last lines read them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return train_util.read_config_from_file(parser.parse_args(), parser)
    except SystemExit as end:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        raise Refused(lines[-1] if lines else f"it ends with status {end.code}") from None


def _prepared(
    args: Any, trainer: Any, config_util: ModuleType, train_util: ModuleType, *, certain: bool
) -> list[dict[str, Any]]:
    """`train()` up to where models are loaded."""
    train_util.verify_training_args(args)
    train_util.prepare_dataset_args(args, True)
    if args.dataset_class is not None:
        raise Unknown("dataset_class is Python of its own, and not run here")
    if isinstance(args.seed, int):
        random.seed(args.seed)  # which images validation_split holds back
    more: dict[str, Any] = {}
    if hasattr(trainer, "get_latents_caching_strategy"):  # sizes are read from the names of cached latents
        strategies = importlib.import_module("library.strategy_base")
        strategies.LatentsCachingStrategy.set_strategy(trainer.get_latents_caching_strategy(args))
    else:  # up to v0.9.1 a data set asks for the length
        more["tokenizer"] = SimpleNamespace(model_max_length=77)
    sanitizer = config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(_user_config(args, config_util), args, **more)
    for dataset in blueprint.dataset_group.datasets:
        for subset in dataset.subsets:
            _write_nothing(subset.params)
    made = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    groups = made if isinstance(made, tuple) else (made,)
    if len(groups[0]) == 0:
        raise Refused("No data found. Please verify arguments")
    if args.cache_latents and not all(group.is_latent_cacheable() for group in groups if group is not None):
        raise Refused(_PICTURES_CHANGE)
    if certain:
        wanted = len(inspect.signature(trainer.assert_extra_args).parameters) - 1
        trainer.assert_extra_args(args, *[*groups, None][:wanted])
    return [_told(dataset) for dataset in groups[0].datasets]


def _user_config(args: Any, config_util: ModuleType) -> Any:
    if args.dataset_config is not None:
        return config_util.load_user_config(args.dataset_config)
    if args.in_json is not None:
        return {"datasets": [{"subsets": [{"image_dir": args.train_data_dir, "metadata_file": args.in_json}]}]}
    found = config_util.generate_dreambooth_subsets_config_by_subdirs(args.train_data_dir, args.reg_data_dir)
    return {"datasets": [{"subsets": found}]}


def _write_nothing(params: Any) -> None:
    """Of `cache_info` the host reads the file that is there, and else reads the folder and writes it."""
    if getattr(params, "cache_info", False) and not Path(str(params.image_dir), "metadata_cache.json").is_file():
        params.cache_info = False


def _told(dataset: Any) -> dict[str, Any]:
    """One of its data sets: `subsets` and `values`, simple attributes; `images`, each with the place of its subset;
    `buckets`, width, height and images with repeats of each; `batches` of an epoch."""
    inner = getattr(dataset, "dreambooth_dataset_delegate", dataset)
    place = {id(subset): i for i, subset in enumerate(inner.subsets)}
    images = [
        [key, info.absolute_path, info.caption, info.num_repeats, info.is_reg, place[id(inner.image_to_subset[key])]]
        for key, info in inner.image_data.items()
    ]
    buckets = zip(inner.bucket_manager.resos, inner.bucket_manager.buckets, strict=True)
    return {
        "subsets": [_attributes(subset) for subset in inner.subsets],
        "values": {**_attributes(inner), "masked": inner is not dataset},
        "images": images,
        "buckets": [[*map(int, size), len(bucket)] for size, bucket in buckets if bucket],
        "batches": len(dataset),
    }


def _attributes(thing: Any) -> dict[str, Any]:
    """What of it is simple; and a subset's custom_attributes, which are what the user wrote."""
    simple = {name: value for name, value in vars(thing).items() if isinstance(value, _SIMPLE)}
    own = getattr(thing, "custom_attributes", None)
    return {**simple, "custom_attributes": own} if own else simple
