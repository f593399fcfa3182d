"""Every mistake stops before the first step, with one message that says what to do, and harms nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import toml

from spf_plugin.tools.check.run import check
from tests import tiny
from tests.hosts.conftest import Host

TARGET = "spf_target=blonde hair"
one_host = pytest.mark.one_host  # SPF's own reading of its settings, which no release of the host has a part in
contract = pytest.mark.contract


def stops(host: Host, *network_args: str, **flags: object) -> str:
    """Run, expect a stop before the first step, and return the message. A file that was there before survives."""
    out = host.work / f"fail-{host._count + 1:03d}"
    out.mkdir()
    earlier = out / "out.safetensors"
    earlier.write_bytes(b"an earlier LoRA")
    result = host.train(*network_args, out=out, **flags)
    assert result.returncode != 0
    assert "steps:" not in result.log
    assert earlier.read_bytes() == b"an earlier LoRA"
    return result.message


@one_host
def test_unknown_setting_names_the_nearest(host: Host) -> None:
    message = stops(host, TARGET, "spf_stage2_begin=0.5")
    assert "unknown setting 'spf_stage2_begin'; did you mean spf_stage2_start?" in message


@contract
def test_several_mistakes_in_one_message(host: Host) -> None:
    message = stops(
        host, "spf_target=green hair", "spf_map=sofft", "spf_log_every=0", "spf_every=2", "spf_network=networks.lorra"
    )
    assert "SPF: 5 problems" in message
    assert "the target 'green hair' occurs in none of the 4 captions" in message
    assert "spf_map='sofft': must be one of soft, paper" in message
    assert "did you mean soft" in message
    assert "spf_log_every='0': must be 1 or more" in message
    assert "spf_every is no longer a setting" in message
    assert "spf_network=networks.lorra: there is no such module" in message


SEVERAL = (
    "spf_foo=1",
    "spf_log_every=x",
    "spf_layers=attn7",
    "spf_train=attn8",
    "spf_base=int8",
    "spf_stage2_start=900",
)


def every_mistake(message: str, target: bool = True) -> None:
    """What `SEVERAL` and `--save_model_as ckpt` must bring into one message."""
    wanted = ["unknown setting 'spf_foo'", "spf_log_every='x': must be a number", "safetensors only"]
    wanted += ["spf_layers='attn7' matches none", "spf_train='attn8' matches none", "a plain LoRA"]
    assert [text for text in wanted if text not in message] == []
    assert ("no target. Say what" in message) == target


@pytest.mark.parametrize("stray", [(), ("word",)], ids=["settings", "words"])
@contract
def test_no_mistake_waits_for_another_one_to_be_mended(host: Host, stray: tuple[str, ...]) -> None:
    """An unknown setting, a wrong type, no target, combinations, and what only the made network shows; the host would
    stop at a stray word before it asks for a network."""
    message = stops(host, "spf_map=soft", *stray, *SEVERAL, save_model_as="ckpt", max_train_steps=2)
    every_mistake(message)
    assert ("stray word" in message) == bool(stray)
    assert f"SPF: {7 + len(stray)} problems" in message


@one_host
def test_the_check_says_the_same_set(host: Host, tmp_path: Path) -> None:
    words = ["spf_foo=1", "word", "spf_log_every=x", "spf_stage2_start=900"]
    data = tiny.images(tmp_path / "data")
    message = stops(host, *words, save_model_as="ckpt", max_train_steps=2, train_data_dir=data)
    config = tmp_path / "run.toml"
    given = {"train_data_dir": str(data), "network_args": words, "save_model_as": "ckpt", "max_train_steps": 2}
    given |= {"caption_extension": ".txt", "network_module": "spf_plugin.lora", "output_dir": str(tmp_path)}
    config.write_text(toml.dumps(given), encoding="utf-8")
    said = {finding.message for finding in check(config, {}).findings if finding.level == "error"}
    of_settings = {text for text in said if text in message}
    assert len(of_settings) == 6
    assert f"SPF: {len(of_settings)} problems" in message


@contract
def test_target_that_no_caption_contains(host: Host) -> None:
    message = stops(host, "spf_target=green hair")
    assert "the target 'green hair' occurs in none of the 4 captions" in message
    assert "'blonde hair'" in message  # what they do say


@pytest.mark.contract  # with how each release builds its data sets
def test_masks_take_a_subsets_target_away(host: Host, tmp_path: Path) -> None:
    """conditioning_data_dir makes a ControlNetDataset, whose subsets are inside it and have no custom_attributes."""
    data, masks = tiny.images(tmp_path / "data") / "1_set", tiny.images(tmp_path / "masks") / "1_set"
    for text in masks.glob("*.txt"):
        text.unlink()
    subset = {"image_dir": str(data), "conditioning_data_dir": str(masks), "caption_extension": ".txt"}

    def train(name: str, *network_args: str, **own: object) -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text(
            toml.dumps({"datasets": [{"resolution": 128, "subsets": [{**subset, **own}]}]}), encoding="utf-8"
        )
        given = {"train_data_dir": None, "dataset_config": path, "masked_loss": True, "max_train_steps": 1}
        return host.train(*network_args, **given).message

    assert "in none of the" in train("none", "spf_target=wings")
    assert "in none of the" not in train("suffix", "spf_target=wings", caption_suffix="with wings")
    if host.is_new:  # v0.9.1 knows no custom_attributes
        message = train("own", TARGET, custom_attributes={"spf_target": "beach"})
        assert "the subset's own spf_target 'beach' is lost: with conditioning_data_dir" in message


@one_host
def test_no_target(host: Host) -> None:
    assert '--network_args "spf_target=blonde hair"' in stops(host, "spf_map=soft")


@one_host
def test_target_in_some_captions_only_warns(host: Host) -> None:
    result = host.train("spf_target=beach", max_train_steps=1)
    assert result.returncode == 0
    assert "SPF: 3 of 4 captions do not contain the target" in result.said
    assert result.file.exists()


@contract
def test_options_of_the_host_that_cannot_go_with_it(host: Host) -> None:
    newer = {"train_inpainting": True} if host.release == "v0.11" else {}
    message = stops(host, TARGET, network_train_unet_only=None, network_train_text_encoder_only=True, **newer)
    assert "--network_train_text_encoder_only trains no UNet module" in message
    assert ("--train_inpainting gives the UNet" in message) == bool(newer)


@one_host
def test_pickle_output(host: Host) -> None:
    assert "SPF writes safetensors only" in stops(host, TARGET, save_model_as="ckpt")


@one_host
def test_stray_word_is_explained(host: Host) -> None:
    message = stops(host, "spf_target=blonde", "hair")
    assert "stray word 'hair'" in message
    assert "spf_target=blonde_hair" in message


@one_host
def test_malformed_value(host: Host) -> None:
    assert "spf_output_multiplier='high': must be a number" in stops(host, TARGET, "spf_output_multiplier=high")


@one_host
def test_a_missing_or_broken_clip(host: Host, tmp_path: Path) -> None:
    message = stops(host, TARGET, "spf_response=anchor", f"spf_clip={tmp_path / 'nothing'}")
    assert "there is no such folder" in message
    folder = tiny.clip(tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"cut off")
    message = stops(host, TARGET, "spf_response=anchor", f"spf_clip={folder}")
    assert f"spf_clip={folder} cannot be loaded" in message


@one_host
def test_unmatched_layers_and_modules(host: Host) -> None:
    assert "spf_layers='attn7' matches none of the 16 attention layers" in stops(host, TARGET, "spf_layers=attn7")
    assert "spf_train='attn7' matches none of the" in stops(host, TARGET, "spf_train=attn7")


@one_host
def test_an_algorithm_that_empties_the_base_model(host: Host) -> None:
    message = stops(host, TARGET, "spf_network=lycoris.kohya", "algo=full", "preset=attn-mlp")
    assert "took the weights of" in message
    assert "Use another algorithm: lora, loha, lokr" in message


@one_host
def test_missing_config_file(host: Host) -> None:
    assert "spf_config: no such file" in stops(host, "spf_config=nowhere.toml")


def test_config_file_beside_the_data(host: Host, tmp_path: Path) -> None:
    data = tiny.images(tmp_path / "data set")
    (data / "hair.toml").write_text('spf_target = ["blonde hair"]\nspf_map_gain = 2\n', encoding="utf-8")
    result = host.train("spf_config=hair.toml", max_train_steps=1, train_data_dir=data)
    assert result.returncode == 0, result.log[-3000:]
    assert '"spf_target": "blonde hair"' in result.metadata()["ss_network_args"]
    assert '"spf_map_gain": "2"' in result.metadata()["ss_network_args"]


@one_host
@pytest.mark.parametrize("spelling", ["spf_target='blonde hair'", "spf_target=blonde_hair", 'spf_target="blonde hair"'])
def test_spellings_that_guis_leave(host: Host, spelling: str) -> None:
    result = host.train(spelling, max_train_steps=1)
    assert result.returncode == 0, result.log[-3000:]
    assert "(per subset)" not in result.message


@contract
@one_host
def test_an_unsupported_trainer_is_refused_by_name(host: Host, tmp_path: Path) -> None:
    """A trainer with the shape of those of transformers stands in for one that SPF has not been taught."""
    script = tmp_path / "other_train_network.py"
    script.write_text(
        "import train_network\n"
        "from library import train_util\n"
        "class OtherNetworkTrainer(train_network.NetworkTrainer):\n"
        "    def get_noise_pred_and_target(self, *args, **kwargs):\n"
        "        raise AssertionError('never reached')\n"
        "parser = train_network.setup_parser()\n"
        "args = train_util.read_config_from_file(parser.parse_args(), parser)\n"
        "OtherNetworkTrainer().train(args)\n",
        encoding="utf-8",
    )
    assert "OtherNetworkTrainer is not supported" in stops(host, TARGET, script=str(script))


@contract
def test_a_host_without_the_seam_is_refused(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "old_train_network.py"
    script.write_text(
        "import train_network\n"
        "from library import train_util\n"
        "del train_network.NetworkTrainer.call_unet\n"
        "parser = train_network.setup_parser()\n"
        "args = train_util.read_config_from_file(parser.parse_args(), parser)\n"
        "train_network.NetworkTrainer().train(args)\n",
        encoding="utf-8",
    )
    assert "NetworkTrainer has no call_unet" in stops(host, TARGET, script=str(script))
