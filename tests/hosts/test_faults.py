"""Faults in the middle of a run: nothing already saved is lost, and the run ends clearly or goes on as the host would.

What needs no host (two runs in one folder, a path with backslashes) is at the end.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spf_plugin.adapter.files import save_normalised
from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from tests import tiny
from tests.hosts.conftest import Host, Result

EVERY_STEP = ("spf_log_every=1", "spf_preview_every=1")
ARGUMENTS = ("spf_target=blonde hair", *EVERY_STEP)
one_host = pytest.mark.one_host  # the same code in both releases
contract = pytest.mark.contract


def run(host: Host, fault: str, **flags: object) -> Result:
    """Four steps, saved at every one, while something happens (`tests.hosts.faulty`)."""
    usual: dict[str, object] = {"module": "tests.hosts.faulty", "save_every_n_steps": 1, "train_batch_size": 1}
    return host.train(*ARGUMENTS, f"fault={fault}", **{**usual, **flags})  # type: ignore[arg-type]


def complete(folder: Path) -> list[str]:
    """Names of the LoRAs under `folder` that a WebUI lists; every one can be read and is finite."""
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    for file in files:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file
    return [file.name for file in files]


def numbered(*steps: int) -> list[str]:
    return [f"out-step{step:08d}.safetensors" for step in steps]


@one_host
def test_killed_during_a_step(host: Host) -> None:
    result = run(host, "kill_step@4")
    assert result.returncode == -9
    assert complete(result.folder) == numbered(1, 2, 3)


@one_host
def test_killed_during_a_save(host: Host) -> None:
    """The file is written and has not taken its name yet; an older file of that name stays as it was."""
    out = host.work / "killed-saving"
    out.mkdir()
    older = out / numbered(3)[0]
    save_file({"older": torch.ones(1)}, older)
    before = older.read_bytes()
    result = run(host, "kill_saving@3", out=out)
    assert result.returncode == -9
    assert older.read_bytes() == before
    assert complete(out) == numbered(1, 2, 3)
    assert all(f.name.startswith(".") for f in out.iterdir() if "partial" in f.name or f.suffix == ".tmp")
    again = run(host, "none", out=out)  # what was left behind is in nobody's way
    assert again.returncode == 0, again.log[-3000:]
    assert older.read_bytes() != before


@contract
def test_killed_during_a_resume(host: Host) -> None:
    """The state is as good as before, and the next try goes on from it."""
    first = run(host, "none", max_train_steps=2, save_every_n_steps=2, save_state=True)
    assert first.returncode == 0, first.log[-3000:]
    state = sorted(p for p in first.folder.glob("*-state") if p.is_dir())[-1]
    contents = {p.name: p.read_bytes() for p in state.iterdir()}
    resuming = {"resume": state, "max_train_steps": 3, "skip_until_initial_step": True, "save_every_n_steps": None}
    killed = run(host, "kill_resuming", **resuming)
    assert killed.returncode == -9
    assert {p.name: p.read_bytes() for p in state.iterdir()} == contents
    last = run(host, "none", **resuming)
    assert last.returncode == 0, last.log[-3000:]
    assert "resumed at step 2" in last.log
    assert complete(last.folder) == ["out.safetensors"]


@one_host
def test_disk_full(host: Host) -> None:
    """While the inner network writes its file: a plain run would lose it, too."""
    result = run(host, "disk_full@3")
    assert result.returncode == 1
    assert "was not written" in result.message
    assert "Nothing was changed." in result.message
    assert complete(result.folder) == numbered(1, 2)
    assert not list(result.folder.glob(".out*"))


def test_disk_full_once_the_inner_networks_file_is_there(host: Host) -> None:
    """No room for a second, normalised one: what a plain run would have saved stays, and the run goes on."""
    result = run(host, "disk_full_at_last@3")
    assert result.returncode == 0, result.log[-4000:]
    assert "the disk is full" in result.said
    assert "as the network wrote it" in result.said
    assert complete(result.folder) == sorted([*numbered(1, 2, 3, 4), "out.safetensors"])
    assert not list(result.folder.glob(".out*"))


def test_a_batch_that_is_not_a_number(host: Host) -> None:
    """The host trains on, with a ruined LoRA; what was saved before is never replaced by it, the log says so, and the
    run does not end as if it had its LoRA."""
    result = run(host, "nan@3")
    assert result.returncode != 0
    assert "out.safetensors was not written" in result.message
    assert "NaN or infinity in" in result.log
    (result.folder / "out.rejected.safetensors").unlink()  # kept beside the good ones under this name
    for rejected in result.folder.glob("*.rejected.safetensors"):
        rejected.unlink()
    assert complete(result.folder) == numbered(1, 2)


@one_host
def test_an_image_that_cannot_be_read_any_more(host: Host, tmp_path: Path) -> None:
    result = run(host, "spoil_image@2", train_data_dir=tiny.images(tmp_path / "data"))
    assert result.returncode == 1
    assert "Error loading file" in result.message  # the host's own words, with the path
    assert numbered(1)[0] in complete(result.folder)


@one_host
def test_captions_that_are_deleted(host: Host, tmp_path: Path) -> None:
    """They were read when the run began."""
    result = run(host, "delete_captions@2", train_data_dir=tiny.images(tmp_path / "data"))
    assert result.returncode == 0, result.log[-3000:]
    assert complete(result.folder) == [*numbered(1, 2, 3, 4), "out.safetensors"]


@one_host
def test_a_state_of_the_older_release_goes_on_in_the_newer(older: Host, host: Host) -> None:
    if host is older:
        pytest.skip("NO NEWER sd-scripts CHECKOUT FOUND (see README, Tests)")
    first = run(older, "none", max_train_steps=2, save_every_n_steps=2, save_state=True)
    assert first.returncode == 0, first.log[-3000:]
    state = sorted(p for p in first.folder.glob("*-state") if p.is_dir())[-1]
    second = run(host, "none", resume=state, max_train_steps=3, save_every_n_steps=None, skip_until_initial_step=True)
    assert second.returncode == 0, second.log[-3000:]
    assert "resumed at step 2" in second.log
    assert complete(second.folder) == ["out.safetensors"]


@one_host
def test_an_output_folder_that_cannot_be_written(host: Host, tmp_path: Path) -> None:
    """sd-scripts alone finds out at its first save. (A file in the folder's place: root may write anywhere else.)"""
    (tmp_path / "taken").write_text("a file")
    result = run(host, "none", output_dir=tmp_path / "taken" / "loras")
    assert result.returncode == 1
    assert "nothing can be written there: Not a directory" in result.message
    assert "steps:" not in result.log


@one_host
def test_pictures_that_cannot_be_written_stop_nothing(host: Host) -> None:
    out = host.work / "no-pictures"
    out.mkdir()
    (out / "out-spf").write_text("a file")
    result = run(host, "none", out=out, save_every_n_steps=None, max_train_steps=8)
    assert result.returncode == 0, result.log[-3000:]
    assert result.log.count("was not written") == 1
    assert complete(out) == ["out.safetensors"]


@one_host
def test_a_path_in_another_script_and_pictures(host: Host) -> None:
    """Spaces and letters of every kind, in the data, the output and the captions."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = host.work / "Ausgabe übung 写真"
    captions = tuple(f"een vrouw, 赤い服 {i}, blonde hair" for i in range(4))
    data = tiny.images(host.work / "Bilder ñ 写真", captions)
    shutil.rmtree(out, ignore_errors=True)
    logs = host.work / "Protokolle ü"
    more = {"logging_dir": logs, "log_with": "tensorboard", "save_every_n_steps": None, "max_train_steps": 8}
    result = run(host, "none", out=out, train_data_dir=data, output_name="höhe 髪", **more)
    assert result.returncode == 0, result.log[-3000:]
    assert complete(out) == ["höhe 髪.safetensors"]
    assert list((out / "höhe 髪-spf").glob("sample1-step*.png"))
    tags = set()
    for file in logs.rglob("events.*"):
        reader = EventAccumulator(str(file))
        reader.Reload()
        tags |= set(reader.Tags()["images"])
    assert any("spf/sample1" in tag for tag in tags)


# -- without a host ---------------------------------------------------------------------------------------------------


class Saving(nn.Module):
    """An inner network that another run may interrupt while it saves."""

    def __init__(self, value: float):
        super().__init__()
        self.value, self.meanwhile = value, lambda: None
        save_normalised(self, parse({"spf_target": "hat"}))

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
        tensors = {
            f"{name}.lora_down.weight": torch.full((4, 1280), 0.5),
            f"{name}.lora_up.weight": torch.full((1280, 4), self.value),
            f"{name}.alpha": torch.tensor(4.0),
        }
        save_file(tensors, file, metadata)
        self.meanwhile()


def test_two_runs_save_to_the_same_name_at_once(tmp_path: Path) -> None:
    """The last one wins, and the other's file is neither mixed in nor missed."""
    file = tmp_path / "out.safetensors"
    first, second = Saving(1.0), Saving(2.0)
    seen: list[float] = []

    def meanwhile() -> None:
        second.save_weights(str(file), torch.float32, {})
        seen.append(up(file))

    def up(path: Path) -> float:
        tensors = load_file(path)
        (name,) = [n for n in tensors if n.endswith("lora_up.weight")]
        return float((tensors[name] @ tensors[name.replace("lora_up", "lora_down")])[0, 0])

    first.meanwhile = meanwhile
    first.save_weights(str(file), torch.float32, {})
    assert seen == [pytest.approx(4.0)]
    assert up(file) == pytest.approx(2.0)
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("path", [r"C:\Users\me\clip", r"C:\new\temp", r"\\server\share"])
def test_a_windows_path_in_double_quotes(tmp_path: Path, path: str) -> None:
    file = tmp_path / "spf.toml"
    file.write_text(f'spf_target = "hat"\nspf_clip = "{path}"\n', encoding="utf-8")
    if path.startswith("\\\\"):  # by chance valid, and then the folder is missing
        file.write_text(f'spf_clip = "{path}\\u"\n', encoding="utf-8")
    with pytest.raises(SPFError, match="write paths with / or in single quotes"):
        parse({"spf_config": str(file)})
    file.write_text(f"spf_target = 'hat'\nspf_clip = '{path}'\n", encoding="utf-8")
    assert parse({"spf_config": str(file)}).clip == path
    file.write_text(f'spf_clip = "{path.replace(chr(92), "/")}"\n', encoding="utf-8")
    assert parse({"spf_config": str(file)}).clip == path.replace("\\", "/")
