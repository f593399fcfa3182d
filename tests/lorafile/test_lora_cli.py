"""The commands as a user meets them: exit status, table, JSON, files written and not written; M3 for the sidecars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import reader, sidecars, writer
from spf_plugin.tools.cli.lora import app
from tests.lorafile import helpers as h
from tests.lorafile.test_lora_loaders import complete

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.v1.safetensors"
    arguments = {"spf_target": "blonde_hair|dress->red T-shirt", "conv_dim": "4"}
    metadata = complete("sdxl") | {"ss_network_args": json.dumps(arguments), "ss_learning_rate": "0.0001"}
    writer.save(path, h.full_lora("sdxl", keep=lambda n: "attn2" in n), metadata)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Mixed naming styles, two alphas, an int64 alpha, the wrong card."""
    path = tmp_path / "bad.safetensors"
    few = (
        "lora_unet_middle_block_1_transformer_blocks_0_attn2",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2",
    )
    state_dict = h.full_lora("sdxl", keep=lambda n: n.startswith(few))
    for key in list(state_dict):
        if key.startswith("lora_unet_middle_block_1_"):
            state_dict[key.replace("middle_block_1", "mid_block_attentions_0")] = state_dict.pop(key)
        elif key.startswith("lora_unet_input_blocks_4_1_") and key.endswith("to_q.alpha"):
            state_dict[key] = torch.tensor(4)
    writer.save(path, state_dict, {"format": "pt"})
    return path


def test_check_good(good: Path) -> None:
    output = run("check", good).output
    for text in (
        "SDXL",
        "LoRA (280)",
        "cross-attention (280)",
        "spf_target",
        "blonde_hair",
        "A1111",
        "sd.cpp",
        "loads",
    ):
        assert text in output
    assert "fails" not in output
    assert "differs" not in output


def test_check_bad(bad: Path, good: Path) -> None:
    output = run("check", good, bad, status=1).output
    for text in ("Two naming styles", "spf lora fix", "filed under"):
        assert text.split()[0] in output


def test_check_json(good: Path, bad: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK\x03\x04" + b"\0" * 20)
    entries = json.loads(run("check", "--json", good, bad, broken, status=2).stdout)
    assert [e["file"] for e in entries] == [str(good), str(bad), str(broken)]
    first, second, third = entries
    assert first["base"] == "sdxl"
    assert first["algorithms"] == {"LoRA": 280}
    assert first["ranks"] == {"unet": {"1": 280}}
    assert first["settings"]["spf_target"] == "blonde_hair|dress->red T-shirt"
    assert {v["status"] for v in first["loaders"].values()} == {"loads"}
    assert first["hash"] == reader.read_header(good).metadata["sshs_model_hash"]
    status = {name: v["status"] for name, v in second["loaders"].items()}
    assert status == {"A1111": "differs", "Forge": "loads", "ComfyUI": "loads", "diffusers": "fails", "sd.cpp": "loads"}
    assert set(second["loaders"]["diffusers"]["findings"][0]) == {"level", "code", "message", "fix"}
    assert "pickle" in third["error"]


def test_check_one_loader(bad: Path) -> None:
    run("check", "--loader", "comfyui", bad, status=0)
    run("check", "-l", "comfyui", "-l", "a1111", bad, status=1)
    run("check", "-l", "automatic", bad, status=2)
    run("check", status=2)


def test_check_unreadable(tmp_path: Path) -> None:
    result = run("check", tmp_path / "[absent].safetensors", status=2)
    assert "[absent].safetensors" in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_markup_in_names_is_printed_literally(tmp_path: Path) -> None:
    path = tmp_path / "[bold]x.safetensors"
    metadata = complete("sd1") | {"ss_sd_model_name": "[red]/etc[/red] [/]"}
    writer.save(path, h.full_lora("sd1", keep=lambda n: "mid_block" in n), metadata)
    output = run("check", path).output
    assert "[red]/etc[/red] [/]" in output
    assert "[bold]x.safetensors" in output.replace("\n", "")


def test_fix(bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.safetensors"
    before = bad.read_bytes()
    output = run("fix", bad, out).output
    assert "renamed" in output
    assert bad.read_bytes() == before
    run("check", out)
    old, new = h.deltas(reader.load(bad)[0]), h.deltas(reader.load(out)[0])
    old = {k.replace("mid_block_attentions_0", "middle_block_1"): v for k, v in old.items()}
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert "exists" in run("fix", bad, out, status=2).output.replace("\n", " ")
    again = out.read_bytes()
    run("fix", out, out, "--force")
    assert out.read_bytes() == again


def test_fix_options(tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    state_dict = h.full_lora("sd1", dtype=torch.float32, text=False, keep=lambda n: "mid_block" in n)
    wide = h.full_lora("sd1", dtype=torch.float32, text=False, rank=2, keep=lambda n: "mid_block" in n and "ff" in n)
    writer.save(path, state_dict | wide, {})
    run("fix", path, out, "--dtype", "bf16", "--one-rank")
    tensors = reader.read_header(out).tensors
    assert {t.dtype for t in tensors.values()} == {"BF16"}
    assert {t.shape[0] for k, t in tensors.items() if "lora_down" in k} == {2}
    run("fix", path, tmp_path / "out.pt", status=2)
    run("fix", tmp_path / "absent.safetensors", tmp_path / "new.safetensors", status=2)
    nan = tmp_path / "nan.safetensors"
    writer.save(nan, {k: t * float("nan") for k, t in state_dict.items()}, {})
    result = run("fix", nan, tmp_path / "new.safetensors", status=2)
    assert "NaN" in result.output
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_convert_there_and_back(good: Path, tmp_path: Path, to: str) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    run("convert", good, there, "--to", to)
    header = reader.read_header(there)
    assert all(key.startswith("unet.") for key in header.tensors)
    assert header.metadata["ss_learning_rate"] == "0.0001"
    run("convert", there, back, "--to", "kohya")
    assert reader.load(back)[0].keys() == reader.load(good)[0].keys()
    run("check", back)


def test_convert_refuses_other_algorithms(tmp_path: Path) -> None:
    path = tmp_path / "lokr.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    writer.save(path, {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(640, 640)}, {})
    result = run("convert", path, tmp_path / "out.safetensors", "--to", "peft", status=2)
    assert "Only plain LoRA" in result.output


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_convert_leaves_nothing_out(tmp_path: Path, to: str) -> None:
    """A trained bias has no place in these formats."""
    path, out = tmp_path / "bias.safetensors", tmp_path / "out.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(320, 4)}
    writer.save(path, {**tensors, f"{name}.diff_b": torch.ones(320)}, {})
    result = run("convert", path, out, "--to", to, status=2)
    assert f"{name}.diff_b is not" in " ".join(result.output.split())
    assert not out.exists()


@pytest.mark.parametrize(("alpha", "said"), [(4.0, "only names changed"), (1.0, "alpha / rank multiplied into 1 mod")])
def test_convert_says_what_became_of_alpha(tmp_path: Path, alpha: float, said: str) -> None:
    path = tmp_path / "lora.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(320, 4)}
    writer.save(path, {**tensors, f"{name}.alpha": torch.tensor(alpha)}, {})
    assert said in run("convert", path, tmp_path / "out.safetensors", "--to", "peft").output


# ---- sidecars -------------------------------------------------------------------------------------------------------


def test_sidecar(good: Path, tmp_path: Path) -> None:
    """The object A1111's editor writes, and a preview under a name its card finds."""
    image = tmp_path / "sample.png"
    image.write_bytes(PNG)
    run("sidecar", good, "--weight", "0.8", "--notes", "n é", "--preview", image)
    card = json.loads((tmp_path / "good.v1.json").read_text(encoding="utf-8"))
    assert card == {
        "description": "",
        "sd version": "SDXL",
        "activation text": "blonde hair, dress",
        "preferred weight": 0.8,
        "negative text": "",
        "notes": "n é",
    }
    assert (tmp_path / "good.v1.preview.png").read_bytes() == PNG
    # A1111: f"{path}.{ext}" or f"{path}.preview.{ext}", path being the file name without .safetensors
    stem = str(good)[: -len(".safetensors")]
    assert any(Path(f"{stem}{middle}.png").exists() for middle in ("", ".preview"))


def test_sidecar_never_overwrites(good: Path, tmp_path: Path) -> None:
    card = tmp_path / "good.v1.json"
    card.write_text('{"activation text": "mine", "rating": 5}')
    run("sidecar", good, status=2)
    assert json.loads(card.read_text()) == {"activation text": "mine", "rating": 5}
    run("sidecar", good, "--activation-text", "ours", "--force")
    content = json.loads(card.read_text())
    assert content["activation text"] == "ours"
    assert content["rating"] == 5
    (tmp_path / "good.v1.webp").write_bytes(b"RIFF")
    image = tmp_path / "sample.png"
    image.write_bytes(PNG)
    with pytest.raises(SPFError, match="exists"):
        sidecars.write_preview(good, image)
    sidecars.write_preview(good, image, force=True)
    assert (tmp_path / "good.v1.webp").read_bytes() == b"RIFF"
    for content_ in ("[1, 2]", "{", "\xff"):
        card.write_text(content_, encoding="latin-1")
        with pytest.raises(SPFError, match="Move it away"):
            sidecars.write_card(good, sidecars.Card(), force=True)


def test_previews_must_be_images(good: Path, tmp_path: Path) -> None:
    for name, content in (("a.txt", PNG), ("a.png", b"GIF89a"), ("a.jpg", PNG)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SPFError):
            sidecars.write_preview(good, tmp_path / name)
    with pytest.raises(SPFError, match="cannot be read"):
        sidecars.write_preview(good, tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("metadata", "want"),
    [
        ({"ss_network_args": '{"spf_target": "a_b|c->d e"}'}, ["a b", "c"]),
        ({"ss_network_args": "{", "modelspec.trigger_phrase": " tok "}, ["tok"]),
        ({"ss_network_args": "[1]"}, []),
        ({"ss_network_args": '{"spf_target": 3}'}, []),
        ({}, []),
    ],
)
def test_target_phrases(metadata: dict[str, str], want: list[str]) -> None:
    assert sidecars.target_phrases(metadata) == want


def test_help() -> None:
    for command in ("check", "fix", "convert", "sidecar"):
        assert "Usage" in run(command, "--help").output
