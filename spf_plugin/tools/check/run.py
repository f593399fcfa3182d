"""Everything at once: what a planned run is, image by image, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.files import read_json, read_toml
from spf_plugin.hosts.kohya import rules
from spf_plugin.hosts.kohya.scripts import Script
from spf_plugin.tools.check import (
    asking,
    captions,
    entries,
    family,
    heard,
    limits,
    pictures,
    presets,
    sets,
    settings,
    source,
    tokens,
)
from spf_plugin.tools.check.asking import Progress
from spf_plugin.tools.check.captions import Described
from spf_plugin.tools.check.dataset import Count, Data
from spf_plugin.tools.check.findings import Finding, of, ordered
from spf_plugin.tools.check.source import HostArgs
from spf_plugin.tools.check.tokens import Tokenizer


@dataclass
class Report:
    """What `check` found.

    Attributes:
        config: SPF's settings, or None where they are wrong.
        targets: the run's targets; subsets may have their own.
        data: the data set.
        read: who read it.
        rows: every training prompt, split.
        tokenizer: where the tokenizer came from; empty where tokens are estimated.
        limit: tokens that the text encoder takes.
        findings: errors first.
    """

    config: SPFConfig | None
    targets: tuple[Target, ...]
    data: Data
    read: str
    rows: list[Described]
    tokenizer: str
    limit: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def images(self) -> int:
        return sum(count.images for count in self.data.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Images of an epoch, repeats included."""
        return sum(count.repeats for count in self.data.counts)

    @property
    def failed(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": self.config.to_metadata() if self.config else None,
            "data_set": self.read,
            "images": self.images,
            "images_per_epoch": self.steps_per_epoch,
            "datasets": [_count(count) for count in self.data.counts],
            "tokenizer": self.tokenizer or None,
            "tokens_estimated": not self.tokenizer,
            "token_limit": self.limit,
            "findings": [finding.as_json() for finding in self.findings],
            "captions": [_row(row) for row in self.rows],
            "together": [
                dict(zip(("saying", "count", "of", "count_without", "of_without"), found, strict=True))
                for found in sets.together(self.rows)
            ],
        }


def _count(count: Count) -> dict[str, Any]:
    """What a data set comes to; buckets by `"WIDTHxHEIGHT"`."""
    buckets = None if count.buckets is None else {f"{w}x{h}": shown for (w, h), shown in count.buckets.items()}
    return {**asdict(count), "buckets": buckets}


def _row(row: Described) -> dict[str, Any]:
    return {
        "image": row.name,
        "caption": row.prompt.full,
        "base": row.prompt.base,
        "target": row.prompt.target,
        "target_tokens": list(row.full.target),
        "phrases": [
            {"text": text, "tokens": list(full), "tokens_in_base": list(base)}
            for text, full, base in zip(row.prompt.phrases, row.full.phrases, row.base.phrases, strict=True)
        ],
        "tokens": row.tokens,
        "cut": row.cut,
        "repeats": row.entry.shown,
    }


def _content(path: Path) -> dict[str, Any]:
    """A file that says what a run is: TOML, or the JSON of a data set or of a GUI.

    Raises:
        SPFError: it cannot be read.
    """
    if path.suffix.lower() != ".json":
        return read_toml(path)
    content = read_json(path)
    if isinstance(content, dict) and ("datasets" in content or presets.of_gui(content) is not None):
        return content
    raise SPFError(f"{path} is neither the JSON of a data set, which has datasets, nor a preset of kohya_ss.")


def check(
    path: Path | None,
    words: Mapping[str, Any],
    *,
    script: Script | None = None,
    target: str | None = None,
    tokenizer: Path | None = None,
    host: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Look at a run before it starts.

    Args:
        path: a `--config_file`, a `--dataset_config`, a preset of a GUI, a data folder, or None where the words say
            everything.
        words: options of the host (`source.parse_words`); they win over the file.
        script: the trainer, where the user names it; else what the model and the options tell.
        target: what the LoRA shall learn, in place of `spf_target`.
        tokenizer: folder of the text encoder's tokenizer.
        host: a copy of sd-scripts that is asked what it makes of the data set (`asking.at_hand`); None: the model says
            it.
        progress: called while images are read.

    Raises:
        SPFError: a file that says what the run is cannot be read.
    """
    folder = path is not None and os.path.isdir(path)
    content = {} if path is None or folder else _content(path)
    only_data = folder or "datasets" in content
    if folder:
        words = {"train_data_dir": str(path), "caption_extension": ".txt", **words}
    elif only_data:
        words = {"dataset_config": str(path), "masked_loss": True, **words}  # as a run with these masks would be
    of_gui = presets.of_gui(content)
    args, findings = source.read(None if only_data else path, words, of_gui)
    data = entries.read_data(args, loose_images=folder, whole=not only_data)
    spf, problems = settings.parse_settings(args, target, rules.folders(args))
    targets = spf.config.target
    model = family.find(args.given, None if only_data else path, script)
    data.findings += limits.steps(data, model)
    read = heard.MODEL
    loose = folder and any(finding.code == "loose-images" for finding in data.findings)  # which it would not see
    if host is not None and not loose:
        file, options = (None, None) if only_data else (path, None) if of_gui is None else (None, args.given)
        if only_data and args.resolution is None:
            words = {"resolution": "512,512", **words}  # sd-scripts reads nothing without
        answer = asking.ask(
            host, model, config=file, options=options, words=words, images=len(data.entries), progress=progress
        )
        data, read = heard.heard(data, answer, whole=not only_data)
    loaded = _tokenizer(args, model.script, tokenizer)
    findings += [
        *problems,
        *data.findings,
        *settings.look(args, spf, data, model, loaded.tokenize, for_host=not only_data),
    ]

    limit = model.script.text_limit(args)
    described = captions.describe(data.entries, settings.targets_of(targets, data), loaded, limit)
    rows = [row for row in described if not row.entry.subset.is_reg]
    if any(row.targets for row in rows):
        findings += [*captions.look(rows, weighted=bool(args.weighted_captions)), *sets.look_together(rows)]
    regular = [row for row in described if row.entry.subset.is_reg and row.prompt.has_target]
    if regular:
        findings.append(
            Finding(
                "warning",
                "target-in-regularisation",
                f"{of(captions.count_of(regular), len(data.entries))} are regularisation images whose caption says "
                "the target",
                "Take the target out of their captions: they shall show what stays as it is.",
                captions.names(regular),
            )
        )
    findings += pictures.look_at(data.entries, rows, progress)
    config = None if spf.problems else spf.config
    return Report(config, targets, data, read, rows, loaded.source, limit, ordered(findings))


def _tokenizer(args: HostArgs, script: Script, given: Path | None) -> Tokenizer:
    candidates: Iterable[Path]
    if given:
        candidates = [given]
    elif script.is_dit:
        candidates = [Path(args.t5_tokenizer_path)] if args.t5_tokenizer_path else []
    else:
        candidates = tokens.folders(args.pretrained_model_name_or_path, args.tokenizer_cache_dir)
    return tokens.find(candidates, weighted=bool(args.weighted_captions), clip=not script.is_dit)
