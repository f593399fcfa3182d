"""LoRAs of `spf train`, with each inner network: the doctor's verdict, the deltas that real loaders make, the card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.lorafile import sidecars
from spf_plugin.tools import cli
from spf_plugin.trainer.loop import numbered, train
from spf_plugin.trainer.settings import Result, Settings
from tests import tiny
from tests.lorafile import helpers as h

SPF = SPFConfig(target=(Target("blonde hair"),), log_every=1)
RUN: dict[str, Any] = {"steps": 3, "rank": 4, "alpha": 2.0, "learning_rate": 1e-2, "batch_size": 2, "device": "cpu"}
# networks.lora only with an sd-scripts checkout importable, which must not happen in the process of the other tests.
SCRIPT = (
    h.HOST_PREAMBLE
    + """
torch.set_num_threads(1)
from pathlib import Path
from spf_plugin.config import parse
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.settings import Settings
folder = Path(sys.argv[2])
config = parse({"spf_target": "blonde hair", "spf_log_every": 1})
result = train(Settings(str(folder / "model"), folder / "images", folder / "networks.lora.safetensors", config,
                        network="networks.lora", **json.loads(sys.argv[3])))
print("RESULT" + json.dumps(result.notes))
"""
)
LYCORIS: dict[str, dict[str, str]] = {
    "plain": {},
    "locon": {"algo": "locon", "preset": "locon.toml", "conv_dim": "4", "conv_alpha": "2"},
    "lokr": {"algo": "lokr", "factor": "4"},
}
# kohya's LoCon. LyCORIS 4.1's own preset for it, `full`, names the time embedding twice and stops at itself.
LOCON_PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
"""


@pytest.fixture(scope="module")
def folder(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_sd15, made / "model")
    tiny.images(made / "images")
    (made / "locon.toml").write_text(LOCON_PRESET, encoding="utf-8")
    return made


def trained(folder: Path, network: str) -> Path:
    """The file of a short run."""
    out = folder / f"{network}.safetensors"
    if network == "networks.lora":
        hosts = h.hosts()
        if not hosts:
            pytest.skip("NO sd-scripts CHECKOUT FOUND (see README, Tests)")
        command = [sys.executable, "-c", SCRIPT, str(hosts[0]), str(folder), json.dumps(RUN)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert "RESULT[]" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]
    else:
        arguments = {k: str(folder / v) if v.endswith(".toml") else v for k, v in LYCORIS[network].items()}
        train(Settings(str(folder / "model"), folder / "images", out, SPF, network_args=arguments, **RUN))
    return out


def checked(path: Path) -> dict[str, Any]:
    """What `spf lora check --json` says."""
    result = CliRunner().invoke(cli.app, ["lora", "check", "--json", str(path)])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)[0]


def unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "model" / "unet")


def diffusers_deltas(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    """LoRA name -> what diffusers changes in that module's weight, of every module that it changes."""
    from diffusers import StableDiffusionPipeline

    before = {name: p.detach() for name, p in unet(folder).named_parameters()}
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    out = {}
    for name, parameter in pipeline.unet.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in before and not torch.equal(parameter, before[plain]):
            delta = parameter.detach().double() - before[plain].double()
            out["lora_unet_" + plain.removesuffix(".weight").replace(".", "_")] = delta.flatten(1)
    return out


@pytest.mark.parametrize(("network", "modules"), [("networks.lora", 192), ("plain", 192), ("locon", 278)])
def test_diffusers_applies_alpha_over_rank_times_up_down(folder: Path, network: str, modules: int) -> None:
    path = trained(folder, network)
    state_dict = load_file(path)
    want = h.deltas(state_dict)
    assert 3 * len(want) == len(state_dict)
    assert len(want) == modules
    got = diffusers_deltas(folder, path)
    assert got.keys() == want.keys()
    for name, delta in want.items():
        assert float(delta.abs().max()) > 1e-6, name  # it was trained
        torch.testing.assert_close(got[name], delta, rtol=2e-2, atol=2e-6)  # peft multiplies in fp16
    said = checked(path)
    assert said["algorithms"] == {"LoRA": modules}
    assert said["ranks"] == {"unet": {"4": modules}}
    assert said["alphas"] == {"unet": {"2.0": modules}}
    codes = {f["code"] for loader in said["loaders"].values() for f in loader["findings"] if f["level"] != "note"}
    assert codes <= {"shape"}, codes  # the tiny widths are not SD1.5's
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (card["activation text"], card["sd version"]) == ("blonde hair", "SD1")


def kronecker(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """scale * w1 (x) w2 written out block by block, [out, in]; scale is alpha / rank, or 1 if neither is factored."""
    scale, factors = 1.0, []
    for which in ("lokr_w1", "lokr_w2"):
        if which in parts:
            factors.append(parts[which].double().flatten(1))
        else:
            down = parts[f"{which}_b"].double().flatten(1)
            factors.append(parts[f"{which}_a"].double() @ down)
            scale = float(parts["alpha"]) / down.shape[0]
    w1, w2 = factors
    return torch.cat([torch.cat([scale * value * w2 for value in row], dim=1) for row in w1])


@torch.no_grad()
def effect(module: Any) -> torch.Tensor:
    """The weight delta that a LyCORIS module (linear or 1x1 convolution) really adds, from its forward: [out, in]."""
    columns = module.org_module[0].weight.shape[1]
    unit = torch.eye(columns)
    if module.org_module[0].weight.dim() == 4:
        unit = unit[:, :, None, None]
    return (module.forward(unit) - module.org_forward(unit)).flatten(1).T.double()


def test_lokr_is_a_kronecker_product(folder: Path) -> None:
    """Every module, as lycoris-lora reads it from the file, adds scale * w1 (x) w2.

    Measured in its forward: in LyCORIS 4.1 get_diff_weight, which only merging uses, has the scale twice.
    """
    import lycoris.kohya

    path = trained(folder, "lokr")
    state_dict = load_file(path)
    network, _ = lycoris.kohya.create_network_from_weights(1.0, None, None, [], unet(folder), weights_sd=state_dict)
    modules = {module.lora_name: module for module in network.unet_loras}
    assert modules.keys() == {key.split(".")[0] for key in state_dict}
    assert len(modules) == 192
    scaled = 0
    for name, module in modules.items():
        parts = {key.split(".", 1)[1]: t for key, t in state_dict.items() if key.startswith(f"{name}.")}
        want = kronecker(parts)
        assert float(want.abs().max()) > 1e-6, name  # it was trained
        torch.testing.assert_close(effect(module), want, rtol=1e-3, atol=1e-6)
        scaled += "lokr_w2_b" in parts
    assert 0 < scaled < 192  # both kinds occur: alpha / rank is one half where a factor is decomposed
    said = checked(path)
    assert said["algorithms"] == {"LoKr": 192}
    assert said["loaders"]["diffusers"]["status"] == "fails"
    assert [f["code"] for f in said["loaders"]["diffusers"]["findings"] if f["level"] == "fail"] == ["algorithm"]


def test_networks_lora_without_sd_scripts_says_what_to_do(folder: Path) -> None:
    out = folder / "x.safetensors"
    with pytest.raises(SPFError, match=r"belongs to sd-scripts.*PYTHONPATH"):
        train(Settings(str(folder / "model"), folder / "images", out, network="networks.lora"))
    assert not out.exists()


def test_the_card_stands_beside_the_last_file_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**changes: Any) -> Result:
        settings = Settings(str(folder / "model"), folder / "images", folder / "card.safetensors", **(RUN | changes))
        return train(settings)

    plain = run(steps=1)  # no target: nothing that a prompt would need
    path = plain.path.with_suffix(".json")
    assert not path.exists()
    assert plain.notes == []

    result = run(spf=SPF, steps=2, save_every=1)
    card = json.loads(path.read_text(encoding="utf-8"))
    assert (card["activation text"], card["sd version"]) == ("blonde hair", "SD1")
    assert "target blonde hair, steps 2, rank 4, alpha 2.0. Loads as it is in A1111, Forge, ComfyUI" in card["notes"]
    assert numbered(result.path, 1).exists()
    assert not numbered(path, 1).exists()
    assert result.notes == []

    mine = json.dumps({**card, "preferred weight": 0.7}).encode()
    path.write_bytes(mine)
    again = run(spf=SPF, steps=1)
    assert path.read_bytes() == mine
    assert [note for note in again.notes if note.startswith("card.json was left as it is")] == again.notes != []

    def fail(*_: object) -> None:
        raise OSError(13, "Permission denied")

    path.unlink()
    monkeypatch.setattr(sidecars, "replacing", fail)
    unwritten = run(spf=SPF, steps=1)
    assert unwritten.steps == 1
    assert len(load_file(unwritten.path)) == 192 * 3
    assert ["its card was not written" in note for note in unwritten.notes] == [True]
    assert not path.exists()
