"""LoRA files of diffusion transformers: names against the host's own networks in full size, and what loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import convert, dit_names, inspect, names
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.names import Base, DitBase
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.tools.cli.lora import app
from tests.hosts.sizes import DIT_HOSTS, full_size

KINDS = {"anima": "anima", "sd3": "sd3", "sd3-medium": "sd3", "sd3.5-large": "sd3", "flux": "flux", "chroma": "chroma"}
KINDS |= {"lumina": "lumina", "hunyuan_image": "hunyuan_image"}


def written(base: DitBase, *, every: int = 9, original: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every ninth module of a transformer's LoRA, as sd-scripts writes it."""
    torch.manual_seed(seed)
    out = {}
    for module in [m for m in dit_names.modules(base) if m.component == "unet"][::every]:
        name = dit_names.kohya_name(base, module, original=original)
        out[f"{name}.lora_down.weight"] = torch.randn(2, module.fan_in)
        out[f"{name}.lora_up.weight"] = torch.randn(module.fan_out, 2)
        out[f"{name}.alpha"] = torch.tensor(1.0)
    return out


def statuses(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> dict[str, str]:
    contents = inspect.gather(tensors.items(), metadata or {})
    return {v.loader: v.status for v in verdicts(contents, inspect.describe(contents))}


@pytest.mark.skipif(not DIT_HOSTS, reason="NO sd-scripts CHECKOUT WITH TRANSFORMERS FOUND (see README, Tests)")
@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_the_hosts_networks(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base: DitBase = KINDS[kind]  # type: ignore[assignment]
    for host in DIT_HOSTS:
        theirs = full_size(host)[kind]["modules"]
        for name, fans in theirs.items():
            found = dit_names.resolve(base, name)
            assert found is not None, name
            assert dit_names.kohya_name(base, found.module) == name
            # Sizes of SD3 differ, and so does the modulation within one.
            assert base == "sd3" or (found.module.fan_in, found.module.fan_out) == tuple(fans), name
        told = dit_names.detect({name: tuple(fans) for name, fans in theirs.items()}, base)
        assert told is not None
        assert told[0] == base


@pytest.mark.parametrize("base", dit_names.SD_SCRIPTS_BASES)
def test_what_loads_what_sd_scripts_writes(base: DitBase) -> None:
    version = {"ss_base_model_version": base.replace("_", "-")}
    found = statuses(written(base), version)
    a1111 = "fails"
    forge = "loads" if base in ("flux", "chroma", "sd3") else "fails"
    comfyui = "differs" if base == "hunyuan_image" else "loads"
    diffusers = "loads" if base in ("flux", "chroma") else "fails"
    sdcpp = {"flux": "loads", "chroma": "loads", "anima": "differs"}.get(base, "fails")
    assert list(found.values()) == [a1111, forge, comfyui, diffusers, sdcpp]


def test_shapes_tell_hunyuan_image_from_flux() -> None:
    written_there = written("hunyuan_image", every=1, original=True)
    tensors = {key: tensor for key, tensor in written_there.items() if "_blocks_3_" in key}
    contents = inspect.gather(tensors.items(), {})
    description = inspect.describe(contents)
    assert (description.base, description.evidence) == ("hunyuan_image", "shapes")
    assert statuses(tensors)["ComfyUI"] == "loads"


def test_chroma_is_told_by_its_metadata() -> None:
    tensors = written("chroma")
    for architecture, base in (("chroma/lora", "chroma"), ("flux-1-dev/lora", "flux")):
        contents = inspect.gather(tensors.items(), {"modelspec.architecture": architecture})
        assert inspect.describe(contents).base == base


def test_a_text_encoder_beside_the_transformer_does_not_change_the_model() -> None:
    tensors = written("flux")
    for module in [m for m in dit_names.modules("flux") if m.component != "unet"][::40]:
        name = dit_names.kohya_name("flux", module)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, module.fan_in)
        tensors[f"{name}.lora_up.weight"] = torch.randn(module.fan_out, 2)
    contents = inspect.gather(tensors.items(), {})
    description = inspect.describe(contents)
    assert description.base == "flux"
    assert description.components["te1"] > 0
    assert description.components["te3"] > 0
    assert description.components["other"] == 0
    assert "transformer (" in inspect.targets(description)


@pytest.mark.parametrize("base", dit_names.DIT_BASES)
def test_what_the_host_writes_comes_back_bit_for_bit(base: DitBase) -> None:
    tensors = written(base)
    mended, _, _ = normalise(tensors, {})
    assert mended.keys() == tensors.keys()
    assert all(mended[key] is tensors[key] for key in tensors)


@pytest.mark.parametrize("base", dit_names.SD_SCRIPTS_BASES)
def test_comfyuis_names_and_back(base: DitBase) -> None:
    tensors = written(base)
    theirs = convert.to_comfyui(tensors)
    assert all(key.startswith("diffusion_model.") for key in theirs)
    assert statuses(theirs, {"ss_base_model_version": base.replace("_", "-")})["ComfyUI"] == "loads"
    back, _, notes = normalise(theirs, {"ss_base_model_version": base.replace("_", "-")})
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert any("renamed to kohya's names" in note for note in notes)


@pytest.mark.parametrize("peft", [False, True])
def test_anima_for_diffusers(peft: bool) -> None:
    """The delta of every module is there under the path that diffusers 0.42's converter gives it."""
    tensors = written("anima", every=1)
    converted = convert.to_diffusers(tensors, peft=peft)
    found = statuses(converted)
    assert found["diffusers"] == "loads"
    assert found["ComfyUI"] == ("loads" if peft else "fails")
    start = "diffusion_model.blocks.3.cross_attn.k_proj" if peft else "transformer.transformer_blocks.3.attn2.to_k"
    up, down = converted[f"{start}.lora_B.weight"], converted[f"{start}.lora_A.weight"]
    name = "lora_unet_blocks_3_cross_attn_k_proj"
    assert torch.equal(up @ down, 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"])
    assert len(converted) == len(tensors) // 3 * 2
    back, _, _ = normalise(converted, {})
    assert {key.partition(".")[0] for key in back} == {key.partition(".")[0] for key in tensors}


def test_others_are_not_converted_for_diffusers() -> None:
    with pytest.raises(SPFError, match=r"Only plain LoRA of SD, SDXL, Anima, SD 3, FLUX.1, Chroma, Lumina 2 and of"):
        convert.to_diffusers(written("hunyuan_image"), peft=True)


def test_a_half_known_file_is_said_to_differ() -> None:
    tensors = written("anima")
    tensors |= {
        f"lora_unet_blocks_99_mlp_layer1.{key}": torch.ones(2, 2) for key in ("lora_up.weight", "lora_down.weight")
    }
    assert statuses(tensors)["ComfyUI"] == "differs"


def test_the_command(tmp_path: Path) -> None:
    save_file(written("hunyuan_image"), tmp_path / "in.safetensors")
    run = CliRunner()
    checked = run.invoke(app, ["check", str(tmp_path / "in.safetensors")], env={"COLUMNS": "200"})
    assert "HunyuanImage-2.1 (by names)" in checked.output
    assert "UNet" not in checked.output
    assert "spf lora convert --to comfyui" in checked.output
    done = run.invoke(
        app, ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--to", "comfyui"]
    )
    assert done.exit_code == 0, done.output
    assert "diffusion_model.double_blocks.0.img_mod.lin.lora_up.weight" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("sdxl", {"unet": "UNet", "te1": "text encoder 1", "te2": "text encoder 2"}),
        ("sd3", {"unet": "transformer", "te1": "text encoder 1", "te2": "text encoder 2", "te3": "T5"}),
        ("flux", {"unet": "transformer", "te1": "text encoder 1", "te3": "T5"}),
        ("anima", {"unet": "transformer", "te1": "text encoder"}),
        ("wan", {"unet": "transformer"}),
    ],
)
def test_ranks_and_alphas_are_shown_of_every_part(base: Base | DitBase, parts: dict[str, str], tmp_path: Path) -> None:
    known: Any = names if base == "sdxl" else dit_names
    first = {module.component: module for module in known.modules(base)}
    assert first.keys() == parts.keys()
    tensors = {}
    for rank, component in enumerate(parts, start=3):
        module = first[component]
        name = known.kohya_name(base, module)
        tensors[f"{name}.lora_down.weight"] = torch.zeros(rank, module.fan_in)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(module.fan_out, rank)
        tensors[f"{name}.alpha"] = torch.tensor(rank + 0.5)
    metadata = {"ss_base_model_version": base} if base in ("sd3", "flux") else {}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    output = CliRunner().invoke(app, ["check", str(tmp_path / "lora.safetensors")], env={"COLUMNS": "200"}).output
    lines = [" ".join(line.strip(" │").split()) for line in output.splitlines()]
    shown = list(enumerate(parts.values(), start=3))
    assert "rank " + ", ".join(f"{label} {rank}" for rank, label in shown) in lines, output
    assert "alpha " + ", ".join(f"{label} {rank}.5" for rank, label in shown) in lines, output
