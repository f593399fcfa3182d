"""The files of encoded prompts: that the command makes them, takes them for what they are, and that a run refuses those
that are not its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spf_plugin.core.prompt import Target, split
from spf_plugin.hosts.musubi import prompts
from tests.hosts.musubi.conftest import CAPTIONS, EVERY_STEP, Musubi, copied, equal

pytestmark = pytest.mark.kinds("zimage")


def files(config: Path) -> list[Path]:
    return sorted((config.parent / "cache").glob("*_spf.safetensors"))


def test_what_is_recorded(musubi: Musubi) -> None:
    found = files(musubi.data / "data.toml")
    assert [path.name for path in found] == [f"{name}_{musubi.kind.CODE}_spf.safetensors" for name in sorted(CAPTIONS)]
    for path, caption in zip(found, (CAPTIONS[name] for name in sorted(CAPTIONS)), strict=True):
        record = prompts.read(str(path))
        prompt = split(caption, [Target("blonde hair")])
        assert (record.caption, record.base, record.target) == (caption, prompt.base, ("blonde hair",))
        assert set(record.phrases) >= ({*prompt.phrases, prompt.target} if prompt.has_target else set())
        assert len(prompts.phrase_vectors(str(path))) == len(record.phrases)
        assert bool(prompts.base_tensors(str(path))) == prompt.has_target
    # No pattern of the host's takes them for its own.
    text = {*(musubi.data / "cache").glob(f"*_{musubi.kind.CODE}_te.safetensors")}
    latents = {*(musubi.data / "cache").glob(f"*_{musubi.kind.CODE}.safetensors")}
    assert len(text) == len(latents) == len(found)
    assert not {*found} & (text | latents)


@pytest.mark.kinds("zimage", "qwen_image", "wan")
def test_base_prompts_are_what_the_host_would_cache_of_them(musubi: Musubi, tmp_path: Path) -> None:
    captions = {name: split(caption, [Target("blonde hair")]).base for name, caption in CAPTIONS.items()}
    config = musubi.data_set(tmp_path / "base", captions)
    assert musubi.cache_text(config, batch_size=1).returncode == 0
    for path in files(musubi.data / "data.toml"):
        record = prompts.read(str(path))
        if record.base != record.caption:
            text = config.parent / "cache" / path.name.replace("_spf.", "_te.")
            assert prompts.host_caption(str(text)) == record.base
            assert equal(prompts.base_tensors(str(path)), prompts.host_text(str(text)))


def test_what_is_current_is_left_alone(musubi: Musubi, tmp_path: Path) -> None:
    config = copied(musubi, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in files(config)}
    assert (
        "prompts of 0 items encoded, of 8 current already" in musubi.cache_prompts(config).said
    )  # copied: other times
    assert {path: path.stat().st_mtime_ns for path in files(config)} == before
    files(config)[0].unlink()  # as if it had been stopped
    files(config)[1].write_bytes(b"half of a file")
    assert "prompts of 2 items encoded, of 6 current already" in musubi.cache_prompts(config).said
    assert all(equal(load_file(path), load_file(musubi.data / "cache" / path.name)) for path in files(config))
    assert "prompts of 8 items encoded" in musubi.cache_prompts(config, "brown jacket|red hat").said
    assert {prompts.read(str(path)).target for path in files(config)} == {("brown jacket", "red hat")}


def test_json_lines_are_a_data_set_too(musubi: Musubi, tmp_path: Path) -> None:
    config = musubi.data_set(tmp_path / "lines", jsonl=True)
    assert musubi.cache_text(config).returncode == 0
    assert "prompts of 8 items encoded" in musubi.cache_prompts(config).said
    assert "drift=" in musubi.train(*EVERY_STEP, dataset_config=config, max_train_steps=2).log


def test_files_of_items_that_are_gone_are_removed(musubi: Musubi, tmp_path: Path) -> None:
    config = copied(musubi, tmp_path / "data")
    cache = config.parent / "cache"
    (cache / f"a_{musubi.kind.CODE}_te.safetensors").unlink()
    for ending in ("png", "txt"):
        (config.parent / "images" / f"a.{ending}").unlink()
    theirs = cache / f"b c_{musubi.kind.CODE}_spf.safetensors"
    save_file({"anything": torch.zeros(1)}, theirs)
    assert musubi.cache_prompts(config, keep_cache=True).returncode == 0
    assert len(files(config)) == 9
    assert "whose cached text is gone" in musubi.cache_prompts(config).said
    assert [path.name[0] for path in files(config)] == ["b", "b", "c", "d", "e", "f", "g", "h"]
    assert theirs.is_file()  # none of ours


def _other_caption(config: Path) -> None:
    (config.parent / "images" / "a.txt").write_text("a woman, blonde hair, a green hat", encoding="utf-8")


def _other_text(config: Path) -> None:
    path = next((config.parent / "cache").glob("a_*_te.safetensors"))
    caption, tensors = prompts.host_caption(str(path)), prompts.host_text(str(path))
    save_file({f"varlen_{name}_bfloat16": tensor * 1.01 for name, tensor in tensors.items()}, path,
              {"caption1": str(caption)})  # fmt: skip


def _damaged(config: Path) -> None:
    files(config)[0].write_bytes(b"half of a file")


def _missing(config: Path) -> None:
    files(config)[0].unlink()


def _split_otherwise(config: Path) -> None:
    """As if another version of SPF had made another base prompt of the caption."""
    path = files(config)[0]
    record, tensors = prompts.read(str(path)), load_file(path)
    said = {**vars(record), "text": vars(record.text), "format": prompts.FORMAT, "base": "something else"}
    save_file(tensors, path, {"spf_prompts": json.dumps(said)})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing, "are missing"),
        (_damaged, "are damaged or of another version of SPF"),
        (_other_caption, "are of another caption than the data set has now"),
        (_other_text, "are older than the cached text beside them"),
        (_split_otherwise, "are damaged or of another version of SPF"),
    ],
)
def test_a_run_refuses_prompts_that_are_not_its_own(
    musubi: Musubi, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    config = copied(musubi, tmp_path / "data")
    spoil(config)
    refused = musubi.train(*EVERY_STEP, dataset_config=config)
    assert refused.returncode != 0
    assert "running training" not in refused.log
    assert f"the prompts of 1 of 8 trained items {said}" in refused.said
    assert f'spf cache-prompts --arch {musubi.kind.ARCH} --target "blonde hair" --dataset_config' in refused.said
    assert ("caches the text itself" in refused.said) == (spoil is _other_caption)
    if spoil is _other_caption:
        stale = musubi.cache_prompts(config)
        assert "are of another caption than the data set has now" in stale.said
        assert musubi.cache_text(config).returncode == 0
        again = musubi.train(*EVERY_STEP, dataset_config=config)
        assert f"the prompts of 1 of 8 trained items {said}" in again.said
        assert "caches the text itself" not in again.said  # it is done
    assert musubi.cache_prompts(config).returncode == 0
    assert musubi.train(*EVERY_STEP, dataset_config=config, max_train_steps=1).returncode == 0


def test_a_run_of_another_target_is_refused(musubi: Musubi) -> None:
    refused = musubi.train("spf_target=red hat")
    assert "the prompts of 8 of 8 trained items are of another target" in refused.said
    assert '--target "red hat"' in refused.said


def test_a_state_of_another_target_is_refused_and_other_settings_are_said(musubi: Musubi, tmp_path: Path) -> None:
    first = musubi.train(*EVERY_STEP, max_train_steps=1, save_state_on_train_end=True)
    (state,) = (path for path in first.folder.glob("*-state") if path.is_dir())
    config = copied(musubi, tmp_path / "data")
    assert musubi.cache_prompts(config, "brown jacket").returncode == 0
    flags = {"dataset_config": config, "max_train_steps": 1, "resume": state}
    other = ("spf_target=brown jacket", "spf_map=paper")
    refused = musubi.train(*other, **flags)
    assert refused.returncode != 0
    assert "running training" not in refused.log
    assert "with the target blonde hair, and this run's is brown jacket" in refused.said
    words = [f"--{name}={value}" for name, value in flags.items()]
    checked = musubi.run("spf", ["check", musubi.kind.SCRIPT, *words, "--network_args", *other])
    assert "with the target blonde hair, and this run's is brown jacket" in checked.said
    said = "this run goes on with its own: spf_map=paper (was soft)"
    assert said in checked.said
    again = musubi.train(*EVERY_STEP, "spf_map=paper", resume=state, max_train_steps=1)
    assert again.returncode == 0, again.log[-4000:]
    assert again.said.count(said) == 1


def test_items_that_are_only_in_the_cache_are_trained_with_what_was_cached(musubi: Musubi, tmp_path: Path) -> None:
    """musubi-tuner trains what it has cached, whatever the folder of images has now."""
    config = copied(musubi, tmp_path / "data")
    for name in CAPTIONS:
        (config.parent / "images" / f"{name}.png").unlink()
    result = musubi.train(*EVERY_STEP, dataset_config=config, max_train_steps=2)
    assert "8 trained items are in the cache and not in the data set" in result.said
    assert "drift=" in result.log


def test_what_the_command_refuses(musubi: Musubi, tmp_path: Path) -> None:
    config = copied(musubi, tmp_path / "data")
    for path in (*files(config), next((config.parent / "cache").glob("b_*_te.safetensors"))):
        path.unlink()
    (config.parent / "images" / "a.txt").write_text("other words, blonde hair", encoding="utf-8")
    other = load_file(next((config.parent / "cache").glob("c_*_te.safetensors")))
    where = next((config.parent / "cache").glob("d_*_te.safetensors"))
    save_file(other, where, {"caption1": CAPTIONS["d"]})
    refused = musubi.cache_prompts(config)
    assert refused.returncode == 2
    script = Path(musubi.kind.TEXT_SCRIPT).name
    for said in (
        "1 captions are not cached",
        f"Run {script} first.",
        "1 cached encodings are of another caption than the data set has now",
        "1 cached encodings are not what this text encoder makes of their captions",
    ):
        assert said in refused.said, said
    assert [path.name[0] for path in files(config)] == ["c", "e", "f", "g", "h"]  # the rest is done
    assert musubi.cache_prompts(config, "->").returncode == 2
    assert musubi.cache_prompts(tmp_path / "nowhere.toml").returncode == 2
    assert os.listdir(tmp_path) == ["data"]
