"""R1: stable-diffusion.cpp itself, on full-size models (it takes no other widths) with random weights.

Optional: SPF_SDCPP_PYTHON names a Python with stable-diffusion-cpp-python. Nothing is downloaded; SDXL needs 7 GB of
disk and about 12 GB of memory.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spf_plugin.lorafile import inspect, loaders, names, writer
from tests.lorafile import helpers as h
from tests.lorafile import kinds
from tests.lorafile.conftest import interpreter

SCRIPT = """
import sys
from stable_diffusion_cpp import StableDiffusion
model, lora, image = sys.argv[1:]
loaded = StableDiffusion(
    model_path=model, lora_apply_mode="immediately", n_threads=1, vae_decode_only=True, verbose=True
)
prompt = "a hat" + (f"<lora:{lora}:1>" if lora else "")
loaded.generate_image(prompt=prompt, width=64, height=64, sample_steps=1, cfg_scale=1.0, seed=1)[0].save(image)
"""
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# (hidden size, layers, has a projection) of the text encoders
TEXT = {"sd1": [(768, 12, False)], "sd2": [(1024, 23, False)], "sdxl": [(768, 12, False), (1280, 32, True)]}


def modules_without_weights(base: str) -> dict[str, torch.nn.Module]:
    """Folder -> the full-size part of a model, on the meta device."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {
            "unet": diffusers.UNet2DConditionModel(**UNETS[base]),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks
            ),
        }
        for i, (width, layers, projected) in enumerate(TEXT[base]):
            config = CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64, vocab_size=49408, projection_dim=width,
            )  # fmt: skip
            made = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
            parts["text_encoder" + ("_2" if i else "")] = made
    return parts


@dataclass
class Run:
    """What stable-diffusion.cpp did: LoRA tensors used, LoRA tensors in the file, the image, everything it said."""

    used: int
    total: int
    image: np.ndarray
    log: str


# Folder of a diffusers model -> component of a LoRA, prefix in a single file. (SDXL as a diffusers folder is taken for
# SD1 by stable-diffusion-cpp-python 0.4.7.)
PARTS = {
    "unet": ("unet", "unet."),
    "text_encoder": ("te1", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("te2", "conditioner.embedders.1.transformer."),
    "vae": ("", "vae."),
}


class Model:
    """A full-size model with random weights in one file."""

    def __init__(self, base: str, folder: Path, python: str):
        self.base, self.folder, self.python = base, folder, python
        self._count = 0

    def write(self, deltas: dict[tuple[str, str], torch.Tensor] | None = None) -> None:
        """Write the weights, the same at every call, plus `deltas` ((component, path) -> delta)."""
        noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
        left, tensors = dict(deltas or {}), {}
        for part, module in modules_without_weights(self.base).items():
            component, prefix = PARTS[part]
            for i, (key, like) in enumerate(module.state_dict().items()):
                if like.dim() < 2:
                    if like.is_floating_point():
                        tensors[prefix + key] = torch.full(like.shape, float(key.endswith("weight"))).half()
                    continue
                start = 7919 * i % (1 << 20)
                rows = noise[start:].repeat(like.numel() // (len(noise) - start) + 1)[: like.numel()]
                weight = rows.view(like.shape) * (0.02 if "token_embedding" in key else like[0].numel() ** -0.5)
                delta = left.pop((component, key.removesuffix(".weight")), None)
                if delta is not None:
                    weight = weight.double() + delta.view(like.shape)
                tensors[prefix + key] = weight.half()
        save_file(tensors, self.folder / "model.safetensors")
        assert not left, sorted(left)[:3]

    def run(self, lora: Path | None = None) -> Run:
        self._count += 1
        image = self.folder / f"{self._count}.png"
        command = [self.python, "-c", SCRIPT, str(self.folder / "model.safetensors"), str(lora or ""), str(image)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=3600)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-3000:]
        used, total = max(
            ((int(a), int(b)) for a, b in re.findall(r"\((\d+) / (\d+)\) LoRA tensors have been applied", log)),
            default=(0, 0),
        )
        with Image.open(image) as opened:
            return Run(used, total, np.asarray(opened, dtype=np.float64), log)

    def lora(self, state_dict: dict[str, torch.Tensor], name: str = "lora") -> tuple[Path, loaders.Verdict]:
        """The file, and what we say about it."""
        path = self.folder / f"{name}.safetensors"
        writer.save(path, state_dict, h.metadata_for(self.base))
        contents = inspect.from_file(path)
        found = {v.loader: v for v in loaders.verdicts(contents, inspect.describe(contents))}
        return path, found["sd.cpp"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    python = interpreter("SPF_SDCPP_PYTHON")
    folder = tmp_path_factory.mktemp(request.param)
    made = Model(request.param, folder, python)
    made.write()
    yield made
    for path in folder.rglob("*.safetensors"):  # gigabytes: not for pytest to keep
        path.unlink()


def randomised(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same file with random factors; `down` alone is of the size of a weight."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for key, tensor in state_dict.items():
        if not key.endswith(".alpha"):
            scale = tensor[0].numel() ** -0.5
            tensor = (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
        out[key] = tensor
    return out


@pytest.mark.timeout(3 * 3600)  # SDXL on one busy core
def test_every_delta_is_applied(model: Model) -> None:
    """All tensors are used, and the image is that of a model with (alpha / r) up x down added to its weights."""
    base: Any = model.base
    state_dict = randomised(h.full_lora(base, rank=4, alpha=2.0))
    path, verdict = model.lora(state_dict)
    plain, applied = model.run(), model.run(path)
    assert plain.total == 0
    assert applied.total == 3 * len(h.deltas(state_dict)) > 0
    assert applied.used == applied.total, applied.log[-3000:]
    assert verdict.status == "loads" or base == "sd2"  # original-layout SD2 checkpoints lose q, k, v; this is not one
    modules = {names.kohya_name(base, m): (m.component, m.path) for m in names.modules(base)}
    model.write({modules[name]: delta for name, delta in h.deltas(state_dict).items()})
    merged = model.run()
    changed, apart = (np.abs(applied.image - other.image).mean() for other in (plain, merged))
    print(f"{base}: {applied.used} of {applied.total} tensors; of 255: LoRA - base {changed:.2f}, - merged {apart:.2f}")
    assert changed > 2
    assert apart < 0.05 * changed


LOKR = {".lokr_w1": (4, 4), ".lokr_w2": (80, 80), ".alpha": ()}


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
@pytest.mark.parametrize("kind", ["lokr", "time-embedding", "unknown-prefix"])
def test_verdicts_are_what_it_does(model: Model, kind: str) -> None:
    """It uses every tensor exactly where our verdict is that it loads."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state_dict = randomised(h.full_lora("sd1", keep=lambda name: "mid_block" in name))
    if kind == "lokr":
        state_dict = {layer + suffix: torch.ones(shape) for suffix, shape in LOKR.items()}
    elif kind == "time-embedding":  # LyCORIS 4's presets train it
        more = {".lora_down.weight": (4, 320), ".lora_up.weight": (1280, 4), ".alpha": ()}
        state_dict |= {f"lora_unet_time_embedding_linear_1{s}": torch.ones(shape) for s, shape in more.items()}
    else:
        state_dict |= {f"adapter_{key}": tensor for key, tensor in state_dict.items() if "attn1_to_q" in key}
    path, verdict = model.lora(state_dict, kind)
    run = model.run(path)
    print(kind, verdict.status, run.used, run.total)
    assert run.total > 0
    assert (run.used == run.total) == (verdict.status == "loads"), run.log[-3000:]
    assert (verdict.status == "loads") == (kind == "lokr")


#: What it does with more kinds of file: LoKr whose second factor is whole, and Tucker kernels, are taken for something
#: else; one of them stops it; alphas of any type are read.
KINDS = {
    "lokr": "right", "loha": "right", "int64 alpha": "right", "float64 alpha": "right",
    "lokr, whole": "wrong", "locon, tucker": "wrong", "loha, tucker": "wrong", "lokr, tucker": "stops",
}  # fmt: skip
SAID = {"right": "loads", "wrong": "differs", "stops": "fails"}


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_the_image_is_the_merged_models_exactly_where_our_verdict_says_so(model: Model, kind: str) -> None:
    parts = modules_without_weights("sd1")["unet"].named_modules()
    layers = {f"unet/{path}": layer for path, layer in parts if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}
    built = kinds.build(
        kind, "sd1", {path: torch.zeros(layer.weight.shape) for path, layer in layers.items()}, scale=0.3
    )
    path = model.folder / f"{kind}.safetensors"
    save_file({key: value.contiguous().clone() for key, value in built.tensors.items()}, path, built.metadata)
    contents = inspect.from_file(path)
    (verdict,) = (v for v in loaders.verdicts(contents, inspect.describe(contents)) if v.loader == "sd.cpp")
    assert verdict.status == SAID[KINDS[kind]]
    model.write()
    plain = model.run()
    if KINDS[kind] == "stops":
        with pytest.raises(AssertionError):
            model.run(path)
        return
    applied = model.run(path)
    model.write({tuple(name.partition("/")[::2]): delta for name, delta in built.meant.items()})  # type: ignore[misc]
    merged = model.run()
    changed, apart = (np.abs(applied.image - other.image).mean() for other in (plain, merged))
    print(f"{kind}: {applied.used} of {applied.total} tensors; LoRA - base {changed:.2f}, - merged {apart:.2f}")
    assert changed > 2
    assert (apart < 0.05 * changed) == (KINDS[kind] == "right")
