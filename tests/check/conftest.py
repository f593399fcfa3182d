"""A good run, and what `spf check` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml

from spf_plugin.hosts.kohya.loop import KohyaHost
from spf_plugin.network_args import read_words
from spf_plugin.tools.check import tokens
from spf_plugin.tools.check.run import Report, check
from tests.check_sets import Run, good


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return good(tmp_path)


def look(run: Run, **words: Any) -> Report:
    return check(run.config, words, tokenizer=run.folder / "none")  # estimated tokens: loading a tokenizer takes long


def codes(report: Report, *levels: str) -> set[str]:
    return {f.code for f in report.findings if f.level in (levels or ("error", "warning", "note"))}


def kept_info(run: Run) -> None:
    """What the host wrote at an earlier run; then a caption was edited."""
    rows = {}
    for path in sorted(run.images.glob("*.png")):
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        rows[str(path)] = {"caption": caption, "resolution": [16, 16]}
    (run.images / "metadata_cache.json").write_text(json.dumps(rows), encoding="utf-8")
    run.caption(0, "a boy, blonde hair")


def own_subset(**options: object) -> str:
    own = {"image_dir": "data/10_hair", "caption_extension": ".txt", **options}
    return toml.dumps({"datasets": [{"resolution": 512, "subsets": [own]}]})


def _estimating(text: str, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(input_ids=tokens.estimate(text))


def stops_of_the_run(run: Run) -> list[str]:
    """What the running host says of this run, over a training frame in small."""
    options = toml.loads(run.config.read_text(encoding="utf-8"))
    defaults: dict[str, Any] = dict.fromkeys(("network_train_text_encoder_only", "train_data_dir", "dataset_config"))
    args = SimpleNamespace(**{**defaults, **options})
    subset = SimpleNamespace(caption_extension=".txt")
    if args.dataset_config:
        own = toml.loads((run.folder / args.dataset_config).read_text(encoding="utf-8"))["datasets"][0]["subsets"][0]
        subset = SimpleNamespace(**own)
    images = {
        path.name: SimpleNamespace(
            caption=path.with_suffix(".txt").read_text(encoding="utf-8"), absolute_path=str(path), is_reg=False
        )
        for path in sorted(run.images.glob("*.png"))
    }
    kept = run.images / "metadata_cache.json"
    if kept.is_file():
        for key, row in json.loads(kept.read_text(encoding="utf-8")).items():
            images[Path(key).name].caption = row["caption"]
    subsets = {"image_to_subset": dict.fromkeys(images, subset)}
    data = SimpleNamespace(image_data=images, **subsets)
    if hasattr(subset, "conditioning_data_dir"):  # the host's ControlNetDataset
        subset.custom_attributes = {}
        data = SimpleNamespace(image_data=images, dreambooth_dataset_delegate=SimpleNamespace(**subsets))
    trainer = SimpleNamespace(is_sdxl="xl" in args.pretrained_model_name_or_path)
    args.weighted_captions = False
    names = {"self": trainer, "args": args, "train_dataset_group": SimpleNamespace(datasets=[data])}
    host = KohyaHost({**names, "tokenizers": _estimating}, [])
    return host.problems(read_words(args.network_args, host.folders()).config)
