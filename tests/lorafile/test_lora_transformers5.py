"""D5: the same files on transformers 5, whose text encoders have other module names, with a diffusers to match.

Optional: SPF_TRANSFORMERS5_PYTHON names a Python with them. Everything else here runs on transformers 4.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spf_plugin.lorafile import inspect, loaders, names, reader, writer
from spf_plugin.lorafile.normalise import normalise
from tests import tiny
from tests.lorafile import helpers as h
from tests.lorafile.conftest import interpreter

ROOT = Path(__file__).parents[2]
VERSIONS = "import json, diffusers, peft, torch, transformers\ntorch.set_num_threads(1)\n"
# Load each file through diffusers; write the weight deltas that peft would merge, by component and live module path.
LOAD = (
    VERSIONS
    + """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.lorafile import helpers as h
folder = Path(sys.argv[1])
known = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 41)
for base in ("sd1", "sd2", "sdxl") if known else ():
    pipe = h.pipeline(base)
    pipe.load_lora_weights(str(folder), weight_name=f"{base}.safetensors")
    deltas = {}
    for component, model in h.components(pipe).items():
        for path, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight(next(iter(module.scaling))).detach().double().flatten(1)
                deltas[f"{component} {path}"] = delta.contiguous()
    save_file(deltas, folder / f"{base}-deltas.safetensors")
print("RESULT", json.dumps([m.__version__ for m in (transformers, diffusers, peft)]))
"""
)
# A LyCORIS network on the text encoder, named after the live modules there; and spf train.
TRAIN = (
    VERSIONS
    + """
import logging, sys
from pathlib import Path
import lycoris.kohya
from spf_plugin.config import parse
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.settings import Settings
from tests.lorafile import helpers as h
logging.disable(logging.WARNING)
folder = Path(sys.argv[1])
pipe = h.pipeline("sd1")
network = lycoris.kohya.create_network(1.0, 4, 2.0, None, pipe.text_encoder, pipe.unet, algo="lora", preset="attn-only")
network.apply_to(pipe.text_encoder, pipe.unet, True, False)
network.save_weights(str(folder / "text.safetensors"), torch.float32, {})
config = parse({"spf_target": "blonde hair", "spf_stage2_start": 0})
train(Settings(str(folder / "model"), folder / "images", folder / "trained.safetensors", config, steps=2, rank=4,
               learning_rate=1e-2, batch_size=2, save_precision="fp32", device="cpu"))
print("RESULT", json.dumps([m.__version__ for m in (transformers, diffusers, peft)]))
"""
)


def there(script: str, *arguments: Path) -> list[str]:
    """Run a script in the other environment; the versions of its transformers, diffusers and peft."""
    python = interpreter("SPF_TRANSFORMERS5_PYTHON")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert "RESULT" in done.stdout, done.stdout[-1000:] + done.stderr[-4000:]
    versions: list[str] = json.loads(done.stdout.split("RESULT", 1)[1])
    assert versions[0].startswith("5."), f"SPF_TRANSFORMERS5_PYTHON has transformers {versions[0]}"
    return versions


def as_on_4(component: str, path: str) -> str:
    """A module path of transformers 5 as transformers 4 has it: CLIPTextModel has lost its `text_model.` there."""
    return path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"


def few(component: str, path: str) -> bool:
    return component != "unet" or path.startswith("mid_block.")


def test_the_same_files_load_with_the_same_deltas(tmp_path: Path) -> None:
    interpreter("SPF_TRANSFORMERS5_PYTHON")
    want = {}
    for base in names.BASES:
        made = h.make_lora(h.reference(base), base, keep=few)
        state_dict, metadata, _ = normalise(made, h.metadata_for(base))
        assert state_dict.keys() == made.keys()
        writer.save(tmp_path / f"{base}.safetensors", state_dict, metadata)
        by_name = h.module_names(base)
        want[base] = {by_name[name]: delta for name, delta in h.deltas(state_dict).items()}
    versions = there(LOAD, tmp_path)
    if versions[1].startswith("0.40."):
        pytest.skip("NOT RUN: diffusers 0.40 loads no LoRA of a text encoder beside transformers 5.6 and later")
    for base, expected in want.items():
        got = {}
        for key, delta in load_file(tmp_path / f"{base}-deltas.safetensors").items():
            component, path = key.split(" ")
            got[component, as_on_4(component, path)] = delta
        assert got.keys() == expected.keys()
        worst = max(float((got[k] - delta).abs().max() / delta.abs().max()) for k, delta in expected.items())
        texts = sum(component != "unet" for component, _ in got)
        print(f"{base}: {len(got)} modules ({texts} of text encoders), worst relative error {worst:.1e}", versions)
        assert worst < 1e-5
        assert texts == 6 * h.TEXT_LAYERS * (2 if base == "sdxl" else 1)


def test_what_is_trained_there_has_the_same_names(tmp_path: Path) -> None:
    interpreter("SPF_TRANSFORMERS5_PYTHON")
    tiny.sd15(tmp_path / "model")
    tiny.images(tmp_path / "images")
    there(TRAIN, tmp_path)
    live, metadata = reader.load(tmp_path / "text.safetensors")
    fixed, _, _ = normalise(live, metadata)
    found = {key.split(".")[0] for key in fixed if key.startswith("lora_te_")}
    attention = {f"{part}_proj" for part in ("q", "k", "v", "out")}
    print(sorted({key.split(".")[0] for key in live})[:1], "->", sorted(found)[:1])
    assert found == {
        f"lora_te_text_model_encoder_layers_{i}_self_attn_{part}" for i in range(h.TEXT_LAYERS) for part in attention
    }
    contents: Any = inspect.from_file(tmp_path / "trained.safetensors")
    expected = {name for name in names.expected_names("sd1") if name.startswith("lora_unet_")}
    assert {key.split(".")[0] for key in contents.tensors} == expected
    assert len(expected) == 192
    verdicts = {v.loader: v.status for v in loaders.verdicts(contents, inspect.describe(contents))}
    assert set(verdicts.values()) <= {"loads", "differs"}  # the tiny widths are not SD1.5's, and nothing else
    assert all(bool(torch.isfinite(t).all()) for t in load_file(tmp_path / "trained.safetensors").values())
    assert json.loads((tmp_path / "trained.json").read_text(encoding="utf-8"))["activation text"] == "blonde hair"
