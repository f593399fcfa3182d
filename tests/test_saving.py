"""What lands on the disk when a LoRA is saved, and what does not when saving goes wrong."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spf_plugin.adapter import files as saving
from spf_plugin.adapter.files import save_normalised
from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.lorafile import inspect, sidecars
from spf_plugin.lorafile.normalise import normalise


class Network(nn.Module):
    """An inner network with one module; saves as networks.lora does."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = value
        self.fail = False

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
        tensors = {
            f"{name}.lora_down.weight": torch.full((4, 1280), 0.5),
            f"{name}.lora_up.weight": torch.full((1280, 4), self.value),
            f"{name}.alpha": torch.tensor(2),  # an integer, as kohya writes it without an alpha argument
        }
        save_file(tensors, file, metadata)
        if self.fail:
            raise KeyboardInterrupt


METADATA = {"ss_network_args": json.dumps({"spf_target": "hat", "conv_dim": "4"}), "ss_output_name": "out"}


def saved(tmp_path: Path, network: Network) -> Path:
    save_normalised(network, parse({"spf_target": "hat"}))
    file = tmp_path / "out.safetensors"
    network.save_weights(str(file), torch.float16, METADATA)
    return file


def test_settings_and_safe_alpha(tmp_path: Path) -> None:
    file = saved(tmp_path, Network())
    with safe_open(file, "pt") as reader:
        arguments = json.loads(reader.metadata()["ss_network_args"])
        assert reader.metadata()["ss_base_model_version"] == "sd_v1"
    assert arguments["spf_target"] == "hat"
    assert arguments["spf_map"] == "soft"
    assert arguments["conv_dim"] == "4"
    (alpha,) = [t for name, t in load_file(file).items() if name.endswith("alpha")]
    assert alpha.dtype.is_floating_point
    assert float(alpha) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.safetensors"]


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path, Network()).read_bytes()
    assert saved(tmp_path, Network()).read_bytes() == first


def test_not_a_number_does_not_replace_a_good_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = saved(tmp_path, Network()).read_bytes()
    with pytest.raises(SPFError, match=r"NaN or infinity in .* kept as .*out\.rejected\.safetensors"):
        saved(tmp_path, Network(float("nan")))  # the run's last: it does not end as if it had its LoRA
    assert (tmp_path / "out.safetensors").read_bytes() == good
    (tmp_path / "out.rejected.safetensors").unlink()
    network = Network(float("nan"))
    save_normalised(network, parse({"spf_target": "hat"}))
    with caplog.at_level(logging.ERROR):
        network.save_weights(str(tmp_path / "out-000001.safetensors"), torch.float16, METADATA)
    assert "NaN or infinity" in caplog.text
    assert (tmp_path / "out-000001.rejected.safetensors").is_file()


def test_lokr_of_whole_factors_whose_alpha_fp16_makes_infinite_is_saved(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    tensors = {
        f"{stem}.lokr_w1": torch.randn(4, 4).half(), f"{stem}.lokr_w2": torch.randn(80, 80).half(),
        f"{stem}.alpha": torch.tensor(float("inf")).half(),
    }  # fmt: skip
    out, _, notes = normalise(tensors, METADATA)
    assert float(out[f"{stem}.alpha"]) == 1
    assert torch.equal(out[f"{stem}.lokr_w2"], tensors[f"{stem}.lokr_w2"])
    assert any("no loader reads it" in note for note in notes)
    found = inspect.gather(tensors.items(), METADATA)
    assert not found.non_finite
    parts = {f"{stem}.lokr_w1": torch.randn(4, 4).half(), f"{stem}.lokr_w2_a": torch.randn(80, 2).half()}
    assert inspect.gather({**parts, f"{stem}.alpha": tensors[f"{stem}.alpha"]}.items(), {}).non_finite  # it is read


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    good = saved(tmp_path, Network()).read_bytes()
    network = Network(3.0)
    network.fail = True
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, network)
    assert (tmp_path / "out.safetensors").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.safetensors"]


def test_with_room_for_one_file_the_networks_own_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the wanted name where that is free, else beside the earlier file; a plain run would have saved it, too."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file = saved(tmp_path, Network(3.0))
    assert float(load_file(file)["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.alpha"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert "the disk is full" in caplog.text
    assert f"kept as {file}" in caplog.text
    before = file.read_bytes()
    with pytest.raises(SPFError, match=r"the disk is full.* kept as .*out\.rejected\.safetensors") as caught:
        saved(tmp_path, Network(5.0))  # the run's last: what is called out.safetensors is not its LoRA
    assert str(caught.value).count("SPF:") == 1
    assert file.read_bytes() == before
    other = load_file(tmp_path / "out.rejected.safetensors")
    assert max(float(t.max()) for t in other.values()) == 5.0
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(os, "fsync", fsync)
    assert max(float(t.max()) for t in load_file(saved(tmp_path, Network(7.0))).values()) == 7.0


def test_whatever_ends_the_save_a_complete_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.writer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, Network(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["out.rejected.safetensors"]
    assert len(load_file(tmp_path / "out.rejected.safetensors")) == 3


def test_a_name_with_a_folder_is_the_last_all_the_same(tmp_path: Path) -> None:
    assert saving.is_last(tmp_path / "hair" / "first.safetensors", {"ss_output_name": "hair/first"})
    assert not saving.is_last(tmp_path / "hair" / "first-000002.safetensors", {"ss_output_name": "hair/first"})


@pytest.mark.parametrize("letter", ["x", "é", "好", "🙂"])
def test_a_name_as_long_as_a_file_can_have(tmp_path: Path, letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = letter * ((255 - len(".safetensors")) // len(letter.encode())) + ".safetensors"
    for value, wanted in ((1.0, name), (float("nan"), "rejected")):
        network = Network(value)
        save_normalised(network, parse({"spf_target": "hat"}))
        with nullcontext() if wanted == name else pytest.raises(SPFError):
            network.save_weights(str(tmp_path / name), torch.float16, {**METADATA, "ss_output_name": Path(name).stem})
        assert any(wanted in p.name and len(load_file(p)) == 3 for p in tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob(".*"))


def test_every_name_made_of_a_long_one_fits(tmp_path: Path) -> None:
    from spf_plugin.lorafile import writer
    from spf_plugin.shown.watch import pictures_folder
    from spf_plugin.trainer.loop import numbered

    name = "好" * 81  # 255 bytes with its extension
    out = tmp_path / f"{name}.safetensors"
    made = [
        pictures_folder(tmp_path / name), numbered(out, 100), sidecars.card_path(out), writer.aside(out, ".tmp"),
        writer.aside(out, ".partial.safetensors"), writer.renamed(out, ".rejected.safetensors"),
    ]  # fmt: skip
    for path in made:
        path.write_bytes(b"")
        path.unlink()
    assert pictures_folder(tmp_path / "a.b") == tmp_path / "a.b-spf"
    assert numbered(tmp_path / "a.b.safetensors", 7).name == "a.b-step00000007.safetensors"


# -- the card beside it -----------------------------------------------------------------------------------------------

STARTED = 1_000_000_000.0
RUN = {
    **METADATA, "ss_training_started_at": str(STARTED), "ss_steps": "40", "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
}  # fmt: skip


def finish(
    folder: Path, target: str = "hat", name: str = "out", metadata: dict[str, str] | None = None, value: float = 1.0
) -> Path:
    """Save `NAME.safetensors` as the host does; the settings are written into `ss_network_args` on the way."""
    network = Network(value)
    save_normalised(network, parse({"spf_target": target}))
    file = folder / f"{name}.safetensors"
    network.save_weights(str(file), torch.float16, RUN if metadata is None else metadata)
    return file


def card(folder: Path, name: str = "out") -> dict[str, object]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_the_card_is_what_the_webuis_read(tmp_path: Path) -> None:
    """A1111 puts `activation text` behind the LoRA's tag; by `sd version` it shows or hides the card."""
    finish(tmp_path, "blonde_hair|dress->T-shirt")
    said = card(tmp_path)
    assert said["activation text"] == "blonde hair, dress"
    assert said["sd version"] == "SD1"
    assert said["preferred weight"] == 0
    assert said["negative text"] == said["description"] == ""
    assert "target blonde hair, dress->T-shirt, steps 40, rank 4, alpha 2.0." in str(said["notes"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.safetensors"]


@pytest.mark.parametrize(
    ("name", "output_name", "written"),
    [
        ("out", "out", True),
        ("out-000002", "out", False),
        ("out-step00000100", "out", False),
        ("out", "portraits/out", True),  # in a folder of the output folder
        ("out-000002", "portraits/out", False),
        ("last", "None", True),
        ("epoch-000002", "None", False),
        ("hair-202511", "hair-202511", True),  # a date of the user's own
        ("hair-202511-000004", "hair-202511", False),
        ("out", None, True),  # --no_metadata
        ("out-000002", None, False),
    ],
)
def test_only_the_last_file_of_a_run_gets_one(
    tmp_path: Path, name: str, output_name: str | None, written: bool
) -> None:
    """The host deletes older files along the way (--save_last_n_epochs) and would leave their cards behind."""
    metadata = {key: value for key, value in RUN.items() if key != "ss_output_name"}
    finish(tmp_path, name=name, metadata=metadata if output_name is None else {**RUN, "ss_output_name": output_name})
    assert (tmp_path / f"{name}.json").exists() == written
    assert (tmp_path / f"{name}.safetensors").exists()


def test_training_again_renews_its_own_card(tmp_path: Path) -> None:
    finish(tmp_path, "hat")
    first = (tmp_path / "out.json").read_bytes()
    finish(tmp_path, "hat")
    assert (tmp_path / "out.json").read_bytes() == first
    finish(tmp_path, "beard")
    assert card(tmp_path)["activation text"] == "beard"


EDITS = {
    "edited": lambda said: json.dumps({**said, "activation text": "mine"}),
    "as A1111's editor saves it": lambda said: json.dumps({**said, "preferred weight": 0.8}, indent=4),
    "a key of another program": lambda said: json.dumps({**said, "rating": 5}),
    "another program's": lambda said: '{"model": "a GUI keeps its settings here"}',
    "a list": lambda said: "[1, 2]",
    "no JSON": lambda said: "not { JSON",
    "empty": lambda said: "",
    "nested beyond all bounds": lambda said: "[" * 100_000,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_card_that_is_not_ours_stays(
    tmp_path: Path, edit: Callable[[dict[str, object]], str], caplog: pytest.LogCaptureFixture
) -> None:
    finish(tmp_path, "hat")
    content = edit(card(tmp_path)).encode()
    (tmp_path / "out.json").write_bytes(content)
    file = finish(tmp_path, "beard", value=2.0)
    assert (tmp_path / "out.json").read_bytes() == content
    assert "out.json was left as it is" in caplog.text
    with safe_open(file, "pt") as reader:  # the LoRA is the new one
        assert json.loads(reader.metadata()["ss_network_args"])["spf_target"] == "beard"


def test_a_folder_or_a_link_in_its_place_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out.json").mkdir()
    assert finish(tmp_path).is_file()
    assert (tmp_path / "out.json").is_dir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere.json")
    assert finish(tmp_path, name="link", metadata={**RUN, "ss_output_name": "link"}).is_file()
    assert not (tmp_path / "nowhere.json").exists()
    assert caplog.text.count("was left as it is") == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("anything"), MemoryError()])
def test_a_card_that_cannot_be_written_loses_no_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sidecars, "replacing", fail)
    file = finish(tmp_path)
    assert len(load_file(file)) == 3
    assert "its card was not written" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_rejected_file_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match="NaN or infinity"):
        finish(tmp_path, value=float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["out.rejected.safetensors"]


def sample(folder: Path, name: str, written: float, colour: int) -> bytes:
    (folder / "sample").mkdir(exist_ok=True)
    path = folder / "sample" / name
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path, "PNG")
    os.utime(path, (written, written))
    return path.read_bytes()


def test_the_last_sample_of_the_first_prompt_becomes_the_preview(tmp_path: Path) -> None:
    """Names as both supported releases of sd-scripts give them; another LoRA's and an older run's are not taken."""
    sample(tmp_path, "out_e000001_00_20251122100000_42.png", STARTED + 10, 1)
    wanted = sample(tmp_path, "out_e000002_00_20251122100500_42.png", STARTED + 20, 2)
    sample(tmp_path, "out_e000002_01_20251122100501_42.png", STARTED + 21, 3)
    sample(tmp_path, "out_long_e000009_00_20251122100900.png", STARTED + 30, 4)
    sample(tmp_path, "out_e000009_00_20241122100900_42.png", STARTED - 5, 5)
    finish(tmp_path)
    assert (tmp_path / "out.preview.png").read_bytes() == wanted
    sample(tmp_path, "out_000500_00_20251122101500.png", STARTED + 40, 6)  # by steps, without a seed
    finish(tmp_path)
    assert (tmp_path / "out.preview.png").read_bytes() == wanted  # there is one now, whoever made it


@pytest.mark.parametrize("present", ["out.png", "out.preview.jpg", "out.preview.png"])
def test_a_preview_is_never_replaced(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_bytes(b"somebody's")
    sample(tmp_path, "out_e000001_00_20251122100000_42.png", STARTED + 10, 1)
    finish(tmp_path)
    assert (tmp_path / present).read_bytes() == b"somebody's"
    images = [p.name for p in tmp_path.iterdir() if p.suffix in (".png", ".jpg")]
    assert images == [present]


def test_no_sample_no_preview(tmp_path: Path) -> None:
    finish(tmp_path)
    sample(tmp_path, "out_e000001_00_20251122100000_42.png", STARTED - 10, 1)
    finish(tmp_path)
    assert not (tmp_path / "out.preview.png").exists()
