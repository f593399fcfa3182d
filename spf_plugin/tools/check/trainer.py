"""The host's options beside the trainer that is to take them: each of its LoRA scripts has its own."""

from __future__ import annotations

from collections.abc import Iterator

from spf_plugin.hosts.kohya.cached_text import TEXT_CACHES
from spf_plugin.hosts.kohya.rules import SUPPORTED
from spf_plugin.hosts.kohya.scripts import MODELS, Script, script_of
from spf_plugin.tools.check import dit_options
from spf_plugin.tools.check.dataset import Data
from spf_plugin.tools.check.family import Family, of_model
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import OF_SCRIPT, having
from spf_plugin.tools.check.source import HostArgs

_CHANGES_TEXT = ("shuffle_caption", "caption_dropout_rate", "caption_tag_dropout_rate", "token_warmup_step")


def look(args: HostArgs, data: Data, model: Family) -> list[Finding]:
    """Options that this trainer does not have, does not use, or stops at.

    Args:
        args: the host's arguments.
        data: the data set.
        model: what kind of base model it is.
    """
    script = model.script
    found = [*_models(args, model), *_others(args, model)]
    length, read = args.max_token_length, script.text_limit(args)
    if not script.is_dit and length is not None and length != read:
        short = length < read
        what = "from v0.10 on fails at its first caption" if short else f"reads {read} tokens"
        message = f"max_token_length is {length}: sd-scripts {what}"
        fix = "Write 150 or 225, or leave it out."
        found.append(Finding("error" if short else "warning", "max-token-length", message, fix))
    # What would be wrong with SDXL is worth saying of a guess too.
    caches = script.is_dit or model.certain in ("", "sdxl")
    if caches and any(args.given.get(name) for name in TEXT_CACHES):
        found += _cached(args, data, script)
    return found


def _models(args: HostArgs, model: Family) -> Iterator[Finding]:
    """The files of the model: of a kind that SPF knows, of this kind, and all of them."""
    script = model.script
    said = model.name and MODELS[model.name]
    if not script.supported:
        message = f"this is a run of {script.file} ({said}). {SUPPORTED}"
        yield Finding("warning" if model.guess else "error", "other-model", message)
        return
    own = of_model(str(args.pretrained_model_name_or_path or ""))
    if own and own not in script.models:
        message = f"pretrained_model_name_or_path is a model of {MODELS[own]}, and {script.file} trains {said}"
        yield Finding("error", "other-model", message, f"Start {script_of(own).file}, or name another model.")
    other = [name for name in dit_options.MODEL_FILES if args.given.get(name) and name not in OF_SCRIPT[script.name]]
    if other:
        yield Finding("error", "other-model", f"{other[0]} is for another kind of model. {SUPPORTED}")
    needed = [*script.parts, *(["clip_l"] if model.name == "flux" else [])]
    missing = [name for name in needed if not args.given.get(name)]
    if missing and not model.guess:
        message = f"{script.file} needs {' and '.join(missing)}, other files of the model, and fails without"
        yield Finding("error", "no-part", message, f'For example {missing[0]} = "models/{missing[0]}.safetensors"')


def _others(args: HostArgs, model: Family) -> Iterator[Finding]:
    """What this trainer ignores: options of others, and what it has and never looks at."""
    script = model.script
    known = OF_SCRIPT[script.name] | (OF_SCRIPT["sdxl_train_network"] if not model.certain else frozenset())
    for name in args.given:
        theirs = [other.file for other in having(name)]
        if name not in known and name not in dit_options.MODEL_FILES and theirs and args.given[name]:
            yield Finding(
                "warning",
                "other-trainer",
                f"{name}: {script.file} has no such option, only {', '.join(theirs)}",
                f"Leave it out: in a file {script.file} ignores it.",
            )
    unused = [*dit_options.UNUSED, *dit_options.UNUSED_BY.get(script.name, ())] if script.is_dit else []
    used = [name for name in unused if args.given.get(name)]
    if used:
        message = f"{script.file} takes {', '.join(used)} and does nothing with it"
        yield Finding("warning", "unused-option", message, "Leave it out.")


def _cached(args: HostArgs, data: Data, script: Script) -> Iterator[Finding]:
    """What the host stops at where text is cached."""
    names = [name for name in _CHANGES_TEXT if not (script.drops_cached and name == "caption_dropout_rate")]
    used = [name for name in names if any(getattr(subset, name) for subset in data.subsets)]
    if used:
        yield Finding(
            "error",
            "cached-text",
            f"cache_text_encoder_outputs cannot go with {', '.join(used)}: sd-scripts stops",
            "Leave one of them out.",
        )
    if not args.network_train_unet_only and not script.trains_cached:
        fix = "Add network_train_unet_only = true."
        yield Finding("error", "cached-text", "cached text encoder outputs allow no training of text encoders", fix)
