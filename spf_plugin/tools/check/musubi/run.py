"""What a planned run inside musubi-tuner is, item by item, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spf_plugin.config import Read
from spf_plugin.errors import SPFError
from spf_plugin.files import read_json, read_toml
from spf_plugin.hosts.musubi import architectures, rules
from spf_plugin.hosts.musubi.rules import HOST, NETWORK_MODULE
from spf_plugin.hosts.musubi.scripts import Script
from spf_plugin.tools.check import captions, pictures, sets, settings, tokens
from spf_plugin.tools.check.asking import Progress
from spf_plugin.tools.check.dataset import Count, Data, Dataset, Entry, Subset
from spf_plugin.tools.check.findings import Finding, ordered
from spf_plugin.tools.check.musubi import asking, caches, data, options
from spf_plugin.tools.check.run import Report
from spf_plugin.tools.check.source import HostArgs


def is_data_set(path: Path) -> bool:
    """Whether a file is a data set of musubi-tuner, and none of sd-scripts'."""
    try:
        content = read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
    except SPFError:  # who reads it to the end says why
        return False
    found = content.get("datasets") if isinstance(content, dict) else None
    names = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
    return isinstance(found, list) and any(isinstance(one, dict) and any(n in one for n in names) for one in found)


def check(
    path: Path | None,
    words: Sequence[str],
    *,
    script: Script | None,
    target: str | None = None,
    tokenizer: Path | None = None,
    host: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Look at a run before it starts.

    Args:
        path: a `--config_file`, a `--dataset_config`, or None where the words say everything.
        words: of the host's command line; they win over the file.
        script: the trainer; None for a data set alone.
        target: what the LoRA shall learn, in place of `spf_target`.
        tokenizer: folder of the text encoder's tokenizer.
        host: a copy of musubi-tuner that is asked what it makes of the data set (`asking.at_hand`); None: the model
            says it.
        progress: called while images are read.

    Raises:
        SPFError: a file that says what the run is cannot be read.
    """
    said = options.parse_words(words, script)
    given = said.pop("config_file", None)
    if path is None and given:
        path = Path(given if str(given).endswith(".toml") else f"{given}.toml")  # as the host does
    if path is not None and os.path.isdir(path):
        raise SPFError(f"{path} is a folder, and {HOST} takes none: name a --dataset_config. See docs/musubi.md.")
    only_data = path is not None and (path.suffix.lower() == ".json" or is_data_set(path))
    if only_data:
        said = {**said, "dataset_config": str(path)}
    args, findings = options.read(None if only_data else path, said, script)
    spf, problems = settings.parse_settings(args, target, rules.folders(args))
    found, read = data.Data(), asking.MODEL
    if args.dataset_config:
        found = data.read(Path(args.dataset_config), script)
        if host is not None:
            images = sum(len(one.data.items) for one in found.found)
            found, read = asking.heard(found, asking.ask(host, args, script, images, progress))
    else:
        findings.append(Finding("error", "no-data", f"no dataset_config, and {HOST} stops without"))
    shown = _as_shown(found)
    findings += [*problems, *found.findings, *_refused(args, spf, found, script, whole=not only_data)]
    if not only_data:
        findings += [*_of_host(args, script), *settings.together(args, spf, shown)]
    if script is not None and script.arch in architectures.NAMES:
        findings += caches.look(found.found, args, script.arch, spf.config.target)
    loaded = tokens.find([tokenizer] if tokenizer else [], weighted=False, clip=False)
    limit = (script or Script).text
    targets = {id(subset): spf.config.target for subset in shown.subsets}
    rows = captions.describe(shown.entries, targets, loaded, limit)
    if any(row.targets for row in rows):
        findings += [*captions.look(rows, weighted=None), *sets.look_together(rows)]
    stills = {item.path for one in found.found if not one.data.video for item in one.data.items}
    still = [entry for entry in shown.entries if entry.key in stills]
    findings += pictures.look_at(still, [row for row in rows if row.entry.key in stills], progress)
    config = None if spf.problems else spf.config
    return Report(config, spf.config.target, shown, read, rows, loaded.source, limit, ordered(findings))


def _of_host(args: HostArgs, script: Script | None) -> list[Finding]:
    """What the host needs of a run."""
    found = []
    if script is None:
        fix = "For example: spf check zimage_train_network.py run.toml"
        found.append(Finding("error", "no-trainer", f"nothing says which trainer of {HOST} this is", fix))
    module = args.network_module
    if module is None:
        fix = f"Add --network_module {NETWORK_MODULE} to the launch line."
        found.append(Finding("warning", "no-module", "the config names no network_module", fix))
    elif module != NETWORK_MODULE:
        message = f"network_module is {module!r}: SPF would not run, and its settings would be ignored"
        fix = f'Set network_module = "{NETWORK_MODULE}"; the other module may be named by spf_network.'
        found.append(Finding("error", "other-module", message, fix))
    if not args.dit:
        found.append(Finding("error", "no-part", f"no dit, the model's file: {HOST} stops without"))
    needed = ["vae", "t5" if script and script.arch == "wan" else "text_encoder"] if args.sample_prompts else []
    missing = [name for name in needed if not getattr(args, name)]
    if missing:
        message = f"sample_prompts needs {' and '.join(missing)}, and {HOST} fails without"
        found.append(Finding("error", "no-part", message, "Name the files, or leave sample_prompts out."))
    return found


def _refused(args: HostArgs, spf: Read, found: data.Data, script: Script | None, *, whole: bool) -> list[Finding]:
    """What the run itself would refuse."""
    datasets = [one.data for one in found.found]
    if script is None or not whole:
        said = rules.look_at_data(datasets, spf.config, spf.wrong, script=script)
    else:
        said = rules.look(args, datasets, spf.config, spf.wrong, script=script, trying=False)
    # What is of captions, `captions` says with more detail.
    return [
        *(Finding("error", "stops", problem) for problem in said.errors),
        *(Finding("warning", "warns", warning) for warning in said.warnings),
    ]


def _as_shown(found: data.Data) -> Data:
    """The data sets in the words of the report."""
    shown = Data()
    for one in found.found:
        subset = Subset(image_dir=one.source, num_repeats=one.repeats)
        batch = int(one.values.get("batch_size", 1))
        shown.datasets.append(Dataset(subsets=(subset,), label=one.data.label, batch_size=batch))
        for item in one.data.items:
            path = Path(item.path)
            shown.entries.append(
                Entry(path, f"{path.parent.name}/{path.name}", item.caption, "file", subset, item.path, whole=True)
            )
        count = len(one.data.items)
        shown.counts.append(Count(count, count * one.repeats, 0, one.buckets, one.batches))
    return shown
