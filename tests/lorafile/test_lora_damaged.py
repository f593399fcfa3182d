"""Files that no mending makes a LoRA of: said in a sentence, not written again, and `spf lora fix` not advised."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin.lorafile import inspect, reader
from spf_plugin.lorafile.findings import FIX
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.tools.cli.lora import app

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = MODULE.replace("to_q", "to_k")
UP, DOWN, ALPHA = (f"{MODULE}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha"))
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def lora(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        DOWN: torch.randn(2, 320, generator=generator).to(dtype),
        UP: torch.randn(320, 2, generator=generator).to(dtype),
        ALPHA: torch.tensor(2.0, dtype=dtype),
    }


def without(*keys: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in lora().items() if key not in keys}


def two(first: float, second: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    one = {**lora(dtype), ALPHA: torch.tensor(first)}
    return (
        one
        | {key.replace(MODULE, OTHER): t for key, t in lora(dtype).items()}
        | {f"{OTHER}.alpha": torch.tensor(second)}
    )


DAMAGED = {
    "no up": (without(UP), "a factor is missing"),
    "no down": (without(DOWN), "a factor is missing"),
    "half a LoHa": ({f"{MODULE}.hada_w1_a": torch.ones(320, 2)}, "a factor is missing"),
    "half a LoKr": (
        {f"{MODULE}.{part}": torch.ones(2, 2) for part in ("lokr_w1", "lokr_w2_a")}, "a factor is missing"
    ),
    "empty alpha": ({**lora(), ALPHA: torch.zeros(0)}, "the alpha is not one number"),
    "two alphas": ({**lora(), ALPHA: torch.ones(2)}, "the alpha is not one number"),
    "far alphas": (two(1e-38, 3e38, torch.float32), "reach from 1e-38 to 3e+38"),
    "far alphas in fp16": (two(1e-38, 3e38, torch.float16), "reach from 1e-38 to 3e+38"),
    "embedding": ({"emb_params": torch.ones(2, 768)}, "This is an embedding"),
    "SDXL embedding": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "This is an embedding"),
    "checkpoint": ({TO_K: torch.ones(4, 768), "first_stage_model.x.weight": torch.ones(2)}, "This is a whole model"),
    "ControlNet": ({"control_model.zero_convs.0.0.weight": torch.ones(2, 2)}, "This is a ControlNet"),
    "something": ({"conv_in.weight": torch.ones(4, 4, 3, 3)}, "This is no LoRA"),
    "another model's": (
        {"x.lora_up.weight": torch.ones(5, 2), "x.lora_down.weight": torch.ones(2, 5)}, "No name in the file belongs"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_mended_is_not_written(name: str, tmp_path: Path) -> None:
    tensors, says = DAMAGED[name]
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    result = CliRunner().invoke(app, ["fix", str(source), str(out)])
    assert result.exit_code == 2
    assert says in result.output
    assert not out.exists()
    for to in ("kohya", "diffusers", "peft"):
        result = CliRunner().invoke(app, ["convert", str(source), str(out), "--to", to])
        assert result.exit_code in (0, 2), result.exception
        if says.startswith("This is"):
            said = " ".join(result.output.split())
            assert f"is {says.removeprefix('This is ')}" in said
            assert "no names of a LoRA can be given to it" in said
            assert not out.exists()
    result = CliRunner().invoke(app, ["check", str(source)])
    assert result.exit_code in (0, 1)
    assert FIX not in result.output or "far alphas" in name
    if "alpha" in name and "far" not in name:
        assert (result.exit_code, "not one number" in " ".join(result.output.split())) == (1, True)


@pytest.mark.parametrize("key", ["bundle_emb.hat.string_to_param.*", "bundle_emb.hat.clip_l", "unet.nowhere.weight"])
def test_a_bundled_file_is_written_and_says_what_stays(key: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({**lora(), key: torch.ones(2, 768)}, source)
    check = CliRunner().invoke(app, ["check", str(source)], env={"COLUMNS": "200"})
    assert FIX not in check.output
    assert ("a file of its own" in " ".join(check.output.split())) == key.startswith("bundle_emb")
    result = CliRunner().invoke(app, ["fix", str(source), str(out)])
    assert result.exit_code == 1  # diffusers still refuses it
    assert out.exists()


MENDED = {
    "peft": {f"{PEFT}.lora_A.weight": lora()[DOWN], f"{PEFT}.lora_B.weight": lora()[UP]},
    "int alpha": {**lora(), ALPHA: torch.tensor(2)},
    "fp64": {key: tensor.double() for key, tensor in lora().items()},
    "beyond fp16": {**lora(), UP: lora()[UP] * 1e5},
    "alphas": two(1.0, 8.0, torch.float16),
    "4-D": {DOWN: lora()[DOWN][..., None, None], UP: lora()[UP][..., None, None]},
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGED, *MENDED])
def test_fix_is_advised_only_where_it_helps(name: str) -> None:
    tensors = MENDED[name] if name in MENDED else DAMAGED[name][0]
    contents = inspect.gather(tensors.items(), {})
    advised = {
        (v.loader, f.code) for v in verdicts(contents, inspect.describe(contents)) for f in v.findings if f.fix == FIX
    }
    if name not in MENDED:
        assert not advised or "far" in name
        return
    fixed, strings, _ = normalise(tensors, {})
    after = inspect.gather(fixed.items(), strings)
    assert not advised & {(v.loader, f.code) for v in verdicts(after, inspect.describe(after)) for f in v.findings}


# -- files made to take long ------------------------------------------------------------------------------------------


def header(path: Path, text: str) -> None:
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


@pytest.mark.parametrize("what", ["keys", "value", "name", "tensors", "long"])
def test_no_header_takes_long(what: str, tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    if what == "keys":
        header(path, '{"__metadata__":{' + ",".join(f'"k{i}":""' for i in range(1_500_000)) + "}}")
    elif what == "value":
        header(path, json.dumps({"__metadata__": {"ss_sd_model_name": "x" * 30_000_000}}))
    elif what == "name":
        header(path, json.dumps({"x" * 30_000_000: {"dtype": "F16", "shape": [2], "data_offsets": [0, 2]}}))
    elif what == "tensors":
        entry = '{"dtype":"F16","shape":[],"data_offsets":[0,2]}'
        header(path, "{" + ",".join(f'"t{i}":{entry}' for i in range(400_000)) + "}")
    else:
        with open(path, "wb") as file:
            file.write((90_000_000).to_bytes(8, "little") + b'{"')
            file.truncate(90_000_008)
    started = time.process_time()
    result = CliRunner().invoke(app, ["check", str(path)])
    assert time.process_time() - started < 10  # it took a minute
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(result.output) < 3000


def test_the_largest_that_there_are_still_load(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({f"t{i}": torch.zeros(1) for i in range(9000)}, path, {f"k{i}": "x" * 500 for i in range(2000)})
    assert len(reader.read_header(path).tensors) == 9000


def test_a_lokr_whose_alpha_is_in_a_dtype_that_torch_hardly_computes_with() -> None:
    tensors = {
        f"{MODULE}.lokr_w1": torch.ones(4, 4),
        f"{MODULE}.lokr_w2": torch.ones(80, 80),
        ALPHA: torch.tensor(float("nan")).to(torch.float8_e4m3fn),
    }
    fixed, _, _ = normalise(tensors, {})
    assert float(fixed[ALPHA]) == 1
