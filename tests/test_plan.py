"""`spf plan`: the arithmetic against other ways of counting, the shipped presets, and every mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.config import SPFConfig, parse
from spf_plugin.errors import SPFError
from spf_plugin.families.unet import UNet
from spf_plugin.tools import plan
from spf_plugin.tools import preset as presets
from spf_plugin.tools.check import family
from spf_plugin.tools.cli import app
from spf_plugin.tools.plan import GIB, Run
from tests import test_attachment as attachment_tests

ROOT = Path(__file__).parents[1]
PRESETS = {"sd15-6gb": 6, "sd15-8gb": 8, "sd21-8gb": 8, "sdxl-8gb": 8, "sdxl-12gb": 12, "sdxl-24gb": 24}
DIT_PRESETS = ("anima", "sd3", "flux", "chroma", "lumina", "hunyuan")  # test_plan_dits
GOOD = """
pretrained_model_name_or_path = "sd_xl_base_1.0.safetensors"
resolution = "1024,1024"
network_module = "spf_plugin.lora"
network_dim = 32
network_train_unet_only = true
mixed_precision = "bf16"
sdpa = true
cache_latents = true
gradient_checkpointing = true
"""


def preset(folder: Path, text: str = GOOD, **changes: str) -> Path:
    lines = [line for line in text.strip().splitlines() if line.split(" =")[0] not in changes]
    path = folder / "run.toml"
    path.write_text("\n".join([*lines, *(f"{k} = {v}" for k, v in changes.items() if v)]) + "\n", encoding="utf-8")
    return path


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_every_preset_is_here() -> None:
    transformers = {path.stem for path in (ROOT / "presets").glob("*.toml") if path.stem.startswith(DIT_PRESETS)}
    assert {path.stem for path in (ROOT / "presets").glob("*.toml")} == {*PRESETS, *transformers, "dataset"}


@pytest.mark.parametrize(("name", "card"), PRESETS.items())
def test_presets_fit_their_cards(name: str, card: int) -> None:
    run, notes = presets.read(ROOT / "presets" / f"{name}.toml")
    assert run.model == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[name.split("-")[0]]
    assert run.spf is not None
    assert notes == []
    assert plan.fits(run, card * GIB)
    assert plan.predict(run).peak <= 0.85 * card * GIB  # a desktop and its browser live on the same card


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    return json.loads((ROOT / "docs" / "cost.json").read_text(encoding="utf-8"))["records"]


def test_prediction_between_the_points_and_at_another_rank() -> None:
    """Against tracked setups that no line was drawn through."""
    for step, spf in (("plain", None), ("spf", SPFConfig())):
        found = {
            (r["setup"]["resolution"], r["setup"]["rank"]): r["peak"]
            for r in records()
            if r["setup"]["family"] == "sd1" and r["setup"]["batch"] == 1 and r["step"] == step
            if r["setup"]["checkpointing"] and r["setup"]["weights"] == "bf16"
        }
        run = Run("sd1", 768, 768, rank=16, checkpointing=True, spf=spf)
        assert plan.step_bytes(run) == pytest.approx(found[768, 16], rel=0.05)
        wide = plan.step_bytes(replace(run, width=512, height=512, rank=64))
        assert found[512, 64] <= wide <= 1.1 * found[512, 64]  # rather too much than too little


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_parameters(family: str) -> None:
    """Every linear layer of a transformer (and its 1x1 convolutions) gets rank x (inputs + outputs)."""
    from diffusers import UNet2DConditionModel

    from benchmarks.unets import CONFIGS

    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[family])
    per_rank = sum(
        sum(module.weight.shape[:2])
        for name, module in unet.named_modules()
        if ".attentions." in f".{name}" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    )
    model = plan.figures()["models"][family]
    assert model["lora_parameters_per_rank"] == per_rank
    assert model["unet_parameters"] == sum(p.numel() for p in unet.parameters())
    weights = [layer.weight for layer in UNet(unet).linear_layers()]
    assert plan.LINEAR[family] == (sum(w.numel() for w in weights), sum(len(w) for w in weights))
    assert plan.predict(Run(family, 512, 512, rank=8, save_bytes=2)).file_bytes == per_rank * 8 * 2


def test_share_of_aligned_steps() -> None:
    """Against counting reference passes in a toy run."""
    for settings in ({}, {"spf_stage2_start": "20"}, {"spf_base_preservation_multiplier": "0"}):
        run = attachment_tests.Run(attachment_tests.CAPTIONS, **settings)
        run.host.max_train_steps = steps = 60
        references: list[int] = []
        run.unet.register_forward_pre_hook(
            lambda *_, seen=references: None if torch.is_grad_enabled() else seen.append(1)
        )
        for _ in range(steps):
            run.step()
        assert plan.aligned_share(parse(settings), steps) == pytest.approx(len(references) / steps, abs=1e-9)


def test_parts_by_hand() -> None:
    run = Run("sd1", 512, 512, rank=16, checkpointing=True, fused_attention=True, optimizer="AdamW", spf=SPFConfig())
    parts = plan.predict(run).parts
    assert parts["UNet, frozen"] == 859_520_964 * 2
    assert parts["LoRA weights"] == parts["optimizer state"] / 2
    assert plan.predict(replace(run, optimizer="bitsandbytes.optim.PagedAdamW8bit")).peak < plan.predict(run).peak
    assert plan.predict(replace(run, spf=None)).flop_ratio == 1
    assert plan.predict(replace(run, spf=None)).peak < plan.predict(run).peak


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_bytes_of_a_quantised_unet(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real one, of the small model's structure."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes", reason="NOT RUN: bitsandbytes is not installed")
    from benchmarks.unets import base_model

    unet = base_model("tiny", torch.bfloat16).denoiser
    parameters, linear = (
        sum(p.numel() for p in unet.parameters()),
        [layer.weight for layer in UNet(unet).linear_layers()],
    )
    monkeypatch.setitem(plan.LINEAR, "tiny", (sum(w.numel() for w in linear), sum(len(w) for w in linear)))
    if weights != "bf16":
        QuantisedBase(UNet(unet).linear_layers(), weights, torch.device("cpu"))
    held = sum(t.nbytes for t in [*unet.parameters(), *unet.buffers()])
    assert plan.unet_bytes("tiny", weights, parameters) == held


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_kind_of_weights_has_a_figure(model: str, checkpointing: bool) -> None:
    run = Run(model, 1024, 1024, checkpointing=checkpointing, text_cached=True, spf=SPFConfig())
    peaks = {weights: plan.predict(replace(run, weights=weights)).peak for weights in ("bf16", "fp8", "int8", "nf4")}
    assert peaks["nf4"] < peaks["int8"] < peaks["bf16"]
    if checkpointing:  # without it `plan` refuses fp8
        assert peaks["fp8"] < peaks["bf16"]
        assert (peaks["nf4"] < peaks["fp8"]) == (model == "sdxl")


def test_spf_base_is_read_from_the_preset(tmp_path: Path) -> None:
    for kind in ("int8", "nf4"):
        run, _ = presets.read(preset(tmp_path, network_args=f'["spf_target=hat", "spf_base={kind}"]'))
        assert run.weights == kind
    assert presets.read(preset(tmp_path))[0].weights == "bf16"
    assert presets.read(preset(tmp_path, fp8_base="true"))[0].weights == "fp8"
    # SDXL with nf4 in place of fp8 in the 8 GB preset: what is said beside the setting.
    eight, _ = presets.read(ROOT / "presets" / "sdxl-8gb.toml")
    peak = {kind: plan.predict(replace(eight, weights=kind)).peak / GIB for kind in ("fp8", "int8", "nf4")}
    assert peak["fp8"] - peak["nf4"] == pytest.approx(0.6, abs=0.15)
    assert peak["int8"] - peak["fp8"] == pytest.approx(0.3, abs=0.15)


# ---- which base model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        # published: certain
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl!"),
        ("C:\\models\\sd_xl_base_1.0_0.9vae.safetensors", "sdxl!"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1!"),
        ("v1-5-pruned-emaonly.ckpt", "sd1!"),
        ("stabilityai/stable-diffusion-2-1", "sd2!"),
        # guessed
        ("sd15.safetensors", "sd1"),
        ("my_mix_v1.5.safetensors", "sd1"),
        ("ponyDiffusionV6XL.safetensors", "sdxl"),
        ("animagine-xl-3.1.safetensors", "sdxl"),
        ("realvisxlV40.safetensors", "sdxl"),
        # nothing tells it
        ("juggernaut_v10.safetensors", ""),
        ("mix_v2.1.safetensors", ""),
        ("xlarge.safetensors", ""),
        ("pixlr.safetensors", ""),
        ("", ""),
    ],
)
def test_what_a_models_name_tells(model: str, kind: str) -> None:
    found = family.find({"pretrained_model_name_or_path": model, "no_half_vae": True})
    assert (found.name, bool(found.guess)) == (kind.rstrip("!"), bool(kind) and not kind.endswith("!"))


def test_the_model_itself_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whatever the name says: a checkpoint, a diffusers folder, and one in the hub's cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    block = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    for width, kind in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "")):
        path = tmp_path / f"model{width}.safetensors"
        save_file({"conditioner.x": torch.zeros(2048), block: torch.zeros(1, width)}, path)
        assert family.of_model(str(path)) == kind
        for folder in (tmp_path / str(width), tmp_path / "hub" / f"models--me--m{width}" / "snapshots" / "abc"):
            (folder / "unet").mkdir(parents=True)
            config = json.dumps({"cross_attention_dim": [width] if width == 2048 else width})
            (folder / "unet" / "config.json").write_text(config, encoding="utf-8")
        assert family.of_model(str(tmp_path / str(width))) == kind
        assert family.of_model(f"me/m{width}") == kind
    misnamed = tmp_path / "sd_xl_base_1.0.safetensors"
    (tmp_path / "model768.safetensors").rename(misnamed)
    found = family.find({"pretrained_model_name_or_path": str(misnamed), "cache_text_encoder_outputs": True})
    assert found == family.Family("sd1")
    misnamed.write_bytes(b"no header")
    assert family.of_model(str(misnamed)) == ""
    (tmp_path / "768" / "unet" / "config.json").write_text("{}", encoding="utf-8")
    assert family.of_model(str(tmp_path / "768")) == ""


@pytest.mark.parametrize(
    ("file", "text", "settings", "kind"),
    [
        ("run.toml", "# accelerate launch sdxl_train_network.py", {}, "sdxl"),
        ("run.toml", "# accelerate launch train_network.py", {"cache_text_encoder_outputs": True}, "sd1"),
        ("run.toml", "# train_network.py or sdxl_train_network.py", {}, ""),
        ("my-sdxl.toml", "", {}, "sdxl"),
        ("my-sd15.toml", "", {"cache_text_encoder_outputs": True}, "sd1"),
        ("run.toml", "", {"cache_text_encoder_outputs": True}, "sdxl"),
        ("run.toml", "", {"cache_text_encoder_outputs": False, "no_half_vae": True}, ""),
        ("my-sdxl.toml", "", {"v2": True}, "sd2!"),
    ],
)
def test_what_else_tells_it(tmp_path: Path, file: str, text: str, settings: dict[str, Any], kind: str) -> None:
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    found = family.find({"pretrained_model_name_or_path": "mine.safetensors", **settings}, path)
    assert (found.name, bool(found.guess)) == (kind.rstrip("!"), bool(kind) and not kind.endswith("!"))


def test_options_of_sdxl_do_not_make_an_sdxl_run(tmp_path: Path) -> None:
    model = {"pretrained_model_name_or_path": '"models/v1-5-pruned.safetensors"'}
    plain, notes = presets.read(preset(tmp_path, **model))
    assert notes == []
    more = {"no_half_vae": "true", "cache_text_encoder_outputs": "true", "cache_text_encoder_outputs_to_disk": "true"}
    run, notes = presets.read(preset(tmp_path, **model, **more))
    assert run == plain
    (note,) = notes
    assert "only sdxl_train_network.py has it; train_network.py ignores it" in note
    for name in ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"):
        assert presets.read(preset(tmp_path, **{name: "true"}))[0].text_cached  # of SDXL


def test_a_guess_is_said_to_be_one(tmp_path: Path) -> None:
    path = preset(tmp_path, pretrained_model_name_or_path='"anime_xl.safetensors"')
    code, text = call(path)
    assert code == 0
    assert "SDXL is guessed from the model's name, anime_xl. If it is another: --model sd1, sd2, sdxl, anima" in text
    values = json.loads(call(path, "--json")[1])
    assert values["model"] == "sdxl"
    assert "guessed" in values["notes"][0]
    assert "guessed" not in call(path, "--model", "sdxl")[1]


# ---- the command -----------------------------------------------------------------------------------------------------


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def test_it_fits() -> None:
    code, text = call(ROOT / "presets" / "sdxl-8gb.toml", "--vram", "8")
    assert code == 0
    assert "fits into 8 GB" in text
    assert "not measured on a GPU" in text
    code, text = call(ROOT / "presets" / "sd15-8gb.toml")
    assert code == 0
    assert "fits cards with" in text


def test_it_does_not_fit_and_says_what_to_change(tmp_path: Path) -> None:
    path = preset(tmp_path, gradient_checkpointing="false", train_batch_size="4")
    code, text = call(path, "--vram", "8")
    assert code == 1
    assert "gradient_checkpointing = true" in text
    code, text = call(path, "--vram", "8", "--json")
    values = json.loads(text)
    assert code == 1
    assert not values["fits"]
    assert values["enough"]
    assert values["changes"][-1]["peak_gb"] <= 8 < values["peak_gb"]
    assert "not measured" in values["basis"]
    # What it says is true: the changed preset fits.
    changes = dict(item.split(" = ") for c in values["changes"] for item in c["setting"].split(", ", 1 + 0))
    assert call(preset(tmp_path, path.read_text(encoding="utf-8"), **changes), "--vram", "8")[0] == 0


def test_nothing_is_enough(tmp_path: Path) -> None:
    code, text = call(preset(tmp_path), "--vram", "2")
    assert code == 1
    assert "not enough" in text


def test_without_fused_attention_nothing_is_promised(tmp_path: Path) -> None:
    code, text = call(preset(tmp_path, sdpa=""), "--vram", "24")
    assert code == 1
    assert "sdpa = true" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_checkpoint": "true"}, "did you mean gradient_checkpointing"),
        ({"train_batch_size": "0"}, "train_batch_size = 0: must be a whole number"),
        ({"network_dim": '"16"'}, "network_dim = '16'"),
        ({"resolution": '"big"'}, "resolution = 'big'"),
        ({"resolution": ""}, "resolution is missing"),
        ({"sdpa": '"true"'}, "must be true or false"),
        ({"mixed_precision": '"no"'}, "mixed_precision"),
        ({"network_train_unet_only": "false"}, "network_train_unet_only = true"),
        ({"cache_latents": "false"}, "cache_latents = true"),
        ({"optimizer_type": '"AdamX8bit"'}, "did you mean adam8bit"),
        ({"network_args": '["spf_maap=2"]'}, "did you mean spf_map"),
        ({"network_args": '["spf_target=blonde", "hair"]'}, "stray word"),
        ({"fp8_base": "true", "network_args": '["spf_base=nf4"]'}, "leave one of them out"),
        ({"fp8_base": "true", "gradient_checkpointing": "false"}, "saves nothing"),
        ({"pretrained_model_name_or_path": '"mine.safetensors"'}, "--model sd1, sd2, sdxl, "),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    path = preset(tmp_path, **changes)
    with pytest.raises(SPFError) as caught:
        presets.read(path)
    assert words in str(caught.value)
    assert call(path)[0] == 2


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match="2 problems"):
        presets.read(preset(tmp_path, network_dim="0", train_batch_size="-1"))


def test_wrong_files(tmp_path: Path) -> None:
    code, text = call(tmp_path / "none.toml")
    assert code == 2
    assert "there is no such file" in text
    (tmp_path / "bad.toml").write_text("a = ", encoding="utf-8")
    assert "not valid TOML" in call(tmp_path / "bad.toml")[1]
    assert "data set configuration" in call(ROOT / "presets" / "dataset.toml")[1]
    assert call("--help")[0] == 0


def test_the_model_can_be_said(tmp_path: Path) -> None:
    path = preset(tmp_path, pretrained_model_name_or_path='"mine.safetensors"')
    assert call(path, "--model", "sdxl", "--vram", "12")[0] == 0
    assert presets.read(preset(tmp_path, network_module='"networks.spf_lora"'))[0].spf is not None
    spf_less = preset(tmp_path, network_module='"networks.lora"')
    run, notes = presets.read(spf_less)
    assert run.spf is None
    assert "plain LoRA" in notes[0]
