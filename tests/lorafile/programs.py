"""What a loader's own functions make of LoRA files: started as a program, one loader a process.

    python programs.py LOADER CHECKOUT FOLDER

`CHECKOUT` is the loader's source tree (of diffusers: any folder). `FOLDER` holds `job.json` (base, modules, number of
files), `model.safetensors` and `file-N.safetensors`. Each file's weight deltas go to `delta-N.safetensors`, named
`component/path`, float32; errors and what the loader left out to `said.json`.

Only what surrounds the loaders' arithmetic (settings, devices, the web page) is a stand-in here; names, alphas, factors
and sums are the checkout's own code.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import types
import unittest.mock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Weights = dict[str, torch.Tensor]  # "component/path" -> weight
Deltas = dict[str, torch.Tensor]
Apply = Callable[[Path, Weights], tuple[Deltas, list[str]]]  # a file, the model -> deltas, keys that were left out

# names of diffusers' modules in the original UNet, for the two layouts of SD1 and SDXL
_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_RESNET["conv_shortcut"] = "skip_connection"
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def sgm(base: str, path: str) -> str:
    """Name of a UNet module in an original checkpoint."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        index = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        rest = ".".join(_RESNET.get(p, p) if parts[1] == "resnets" else p for p in parts[3:])
        return f"middle_block.{index}.{rest}"
    i, kind, j = int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{3 + 3 * i}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{2 + 3 * i}.{1 if base != 'sdxl' and i == 0 else 2}.conv"
    block = f"input_blocks.{1 + 3 * i + j}" if parts[0] == "down_blocks" else f"output_blocks.{3 * i + j}"
    rest = ".".join(_RESNET.get(p, p) if kind == "resnets" else p for p in parts[4:])
    return f"{block}.{int(kind == 'attentions')}.{rest}"


def unet_config(base: str, depths: list[int]) -> dict[str, Any]:
    """What ComfyUI and Forge keep of an original UNet's configuration; `depths` of the down blocks."""
    blocks = len(depths)
    return {
        "num_res_blocks": [2] * blocks,
        "channel_mult": [1, 2, 4, 4][:blocks],
        "transformer_depth": [d for d in depths for _ in range(2)],
        "transformer_depth_output": [d for d in depths for _ in range(3)],
        "transformer_depth_middle": depths[-1] or 1,
    }


def stand_in(name: str, **content: Any) -> Any:
    """A module under `name` that has whatever is asked of it; its own `content` first."""
    module: Any = types.ModuleType(name)
    module.__dict__.update(content)
    module.__getattr__ = lambda attribute: unittest.mock.MagicMock(name=f"{name}.{attribute}")
    module.__path__ = []
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


def encoders(base: str) -> dict[str, str]:
    """Component -> the name ComfyUI and Forge give it."""
    return {"te1": "clip_h"} if base == "sd2" else {"te1": "clip_l", "te2": "clip_g"}


class Model:
    """What ComfyUI's and Forge's name functions ask of a model."""

    def __init__(self, names: list[str], config: dict[str, Any]) -> None:
        self.names = names
        self.model_config = types.SimpleNamespace(unet_config=config)
        self.config = types.SimpleNamespace(huggingface_repo="")
        self.diffusion_model = types.SimpleNamespace(config=config)

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self.names)


def _keys(base: str, weights: Weights) -> dict[str, str]:
    """Our name of a module -> its key in ComfyUI and Forge."""
    out = {}
    for name in weights:
        component, _, path = name.partition("/")
        if component == "unet":
            out[name] = f"diffusion_model.{sgm(base, path)}.weight"
        else:
            out[name] = f"{encoders(base)[component]}.transformer.{path}.weight"
    return out


class Patcher:
    """A model and the patches it was given, as ComfyUI's and Forge's ModelPatcher keep them."""

    def __init__(self, model: Model) -> None:
        self.model = self.cond_stage_model = model
        self.patches: dict[str, Any] = {}

    def clone(self) -> Patcher:
        return Patcher(self.model)

    def add_patches(self, patches: dict[str, Any], strength: float = 1.0, **options: Any) -> list[str]:
        known = set(self.model.names)
        self.patches = {key: patch for key, patch in patches.items() if key in known}
        return list(self.patches)


def comfyui(checkout: Path, base: str, depths: list[int]) -> Apply:
    sys.path.insert(0, str(checkout))
    sys.argv = ["main.py", "--cpu"]
    cast = lambda tensor, device, dtype, copy=False: tensor.to(device=device, dtype=dtype, copy=copy)  # noqa: E731
    importlib.import_module("comfy")
    stand_in("comfy.model_management", cast_to_device=cast)
    stand_in("comfy.model_base").__getattr__ = lambda name: type(name, (), {})
    stand_in("comfy.checkpoint_pickle")
    lora = importlib.import_module("comfy.lora")
    converted = importlib.import_module("comfy.lora_convert").convert_lora

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        keys = _keys(base, weights)
        ours = Model([k for n, k in keys.items() if n.startswith("unet/")], unet_config(base, depths))
        text = Model([k for n, k in keys.items() if not n.startswith("unet/")], {})
        key_map = lora.model_lora_keys_clip(text, lora.model_lora_keys_unet(ours, {}))
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        try:
            loaded = lora.load_lora(converted(load_file(file)), key_map)
            out = {}
            for name, key in keys.items():
                if key in loaded:
                    patch = [(1.0, loaded[key], 1.0, None, None)]
                    out[name] = lora.calculate_weight(patch, weights[name].clone(), key) - weights[name]
        finally:
            logging.getLogger().removeHandler(handler)
        return out, said

    return apply


def forge(checkout: Path, base: str, depths: list[int]) -> Apply:
    sys.path[:0] = [str(checkout), str(checkout / "extensions-builtin" / "sd_forge_lora")]
    cast = lambda tensor, device, dtype: tensor.to(device=device, dtype=dtype)  # noqa: E731
    stand_in("backend").__path__ = [str(checkout / "backend")]
    stand_in("backend.memory_management", cast_to_device=cast)
    for name in ("utils", "operations", "args"):
        stand_in(f"backend.{name}")
    for name in ("modules", "modules.shared", "modules.sd_models", "modules.errors", "modules.scripts"):
        stand_in(name)
    stand_in("network")
    patcher = importlib.import_module("backend.patcher.lora")
    networks = importlib.import_module("networks")

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        keys = _keys(base, weights)
        ours = Model([k for n, k in keys.items() if n.startswith("unet/")], unet_config(base, depths))
        text = Model([k for n, k in keys.items() if not n.startswith("unet/")], {})
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # mutable defaults: the key maps of one model would stay for the next
            for function in (networks.model_lora_keys_unet, networks.model_lora_keys_clip):
                function.__defaults__[0].clear()
            unet, clip = networks.load_lora_for_models(Patcher(ours), Patcher(text), load_file(file), 1.0, 1.0)
            patches = unet.patches | clip.patches
            out = {}
            for name, key in keys.items():
                if key in patches:
                    patch = [(1.0, patches[key], 1.0, None, None)]
                    out[name] = patcher.merge_lora_to_weight(patch, weights[name].clone(), key) - weights[name]
        return out, printed.getvalue().splitlines()

    return apply


def a1111(checkout: Path, base: str, depths: list[int], dtype: torch.dtype = torch.float32) -> Apply:
    sys.path.insert(0, str(checkout / "extensions-builtin" / "Lora"))
    names = "shared devices sd_models errors scripts sd_hijack cache hashes patches textual_inversion models"
    modules = stand_in("modules")
    for name in names.split():
        stand_in(f"modules.{name}")
    stand_in("gradio")
    for name in ("textual_inversion.textual_inversion", "models.sd3", "models.sd3.mmdit"):
        stand_in(f"modules.{name}")
    sys.modules["modules.models.sd3.mmdit"].QkvLinear = type("QkvLinear", (nn.Linear,), {})  # type: ignore[attr-defined]
    devices = sys.modules["modules.devices"]
    devices.__dict__.update(cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=dtype)
    stand_in("lora_patches")
    stand_in("extra_networks_lora")
    stand_in("lora_logger")
    networks = importlib.import_module("networks")
    layers = importlib.import_module("network")
    modules.sd_models.read_state_dict = load_file
    open_clip = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}

    def model(weights: Weights) -> tuple[dict[str, nn.Module], dict[str, tuple[str, int]]]:
        """A1111's layer name -> module; our name -> (layer name, which third of a fused attention, 3 = its output)."""
        found: dict[str, nn.Module] = {}
        places: dict[str, tuple[str, int]] = {}
        for name, weight in weights.items():
            component, _, path = name.partition("/")
            if path == "text_projection":
                continue  # no layer there, a bare parameter
            third = -1
            if component == "unet":
                layer = f"diffusion_model.{sgm(base, path)}"
            elif (base, component) in (("sdxl", "te2"), ("sd2", "te1")):
                number, _, rest = path.removeprefix("text_model.encoder.layers.").partition(".")
                layer = f"{'1_' if base == 'sdxl' else ''}model.transformer.resblocks.{number}."
                if rest.startswith("self_attn."):
                    third = ("q_proj", "k_proj", "v_proj", "out_proj").index(rest.removeprefix("self_attn."))
                    layer += "attn"
                else:
                    layer += open_clip.get(rest, rest)
            else:
                layer = f"{'0_' if base == 'sdxl' else ''}transformer.{path}"
            layer = layer.replace(".", "_")
            places[name] = (layer, third)
            shape = weight.shape
            if third >= 0:
                attention = found.setdefault(layer, nn.MultiheadAttention(shape[0], 1, dtype=weight.dtype))
                found[f"{layer}_out_proj"] = attention.out_proj  # type: ignore[assignment]
                part = attention.out_proj.weight if third == 3 else attention.in_proj_weight.chunk(3)[third]  # type: ignore
                part.data.copy_(weight)
                continue
            if len(shape) == 4:
                stride = 2 if "op" in layer.split("_")[-1:] else 1
                found[layer] = nn.Conv2d(shape[1], shape[0], shape[2:], stride, shape[-1] // 2)  # type: ignore[arg-type]
            else:
                found[layer] = nn.Linear(shape[1], shape[0])
            found[layer].to(weight.dtype).weight.data.copy_(weight)  # type: ignore[operator, union-attr]
        for layer, module in found.items():
            module.network_layer_name = layer  # type: ignore[assignment]
            module.requires_grad_(False)
        return found, places

    def values(module: nn.Module, third: int) -> torch.Tensor:
        if third < 0 or third == 3:
            return (module.out_proj if third == 3 else module).weight.detach().clone()  # type: ignore
        return module.in_proj_weight.detach().chunk(3)[third].clone()  # type: ignore

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        found, places = model(weights)
        if base == "sd2":
            found["model_transformer_resblocks"] = nn.ModuleList()  # by which it knows an SD2 text encoder
        modules.shared.sd_model = types.SimpleNamespace(network_layer_mapping=found)
        disk = types.SimpleNamespace(filename=str(file), name="x", metadata={})
        net = networks.load_network("x", disk)
        net.dyn_dim = None
        networks.loaded_networks[:] = [net]
        networks.extra_network_lora = types.SimpleNamespace(errors={})
        out = {}
        inner = nn.modules.linear.NonDynamicallyQuantizableLinear  # an attention's output, whose forward nobody calls
        for module in found.values():
            if type(module) is not inner:
                networks.network_apply_weights(module)
        for name, (layer, third) in places.items():
            delta = values(found[layer], third).float() - weights[name].float()
            if bool((delta != 0).any()):
                out[name] = delta
        return out, [f"{n} errors" for n in networks.extra_network_lora.errors.values()]

    assert layers
    return apply


def diffusers(checkout: Path, base: str, depths: list[int]) -> Apply:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    helpers = importlib.import_module("tests.lorafile.helpers")
    for name in ("diffusers", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def modules(pipe: Any) -> dict[str, nn.Module]:
        out = {}
        for component, part in helpers.components(pipe).items():
            for path, module in part.named_modules():
                if component != "unet" and path.startswith("encoder."):
                    path = f"text_model.{path}"  # transformers 5
                out[f"{component}/{path}"] = module
        return out

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        pipe = helpers.pipeline(base)
        with torch.no_grad():
            for name, module in modules(pipe).items():
                if name in weights:
                    module.weight.copy_(weights[name])  # type: ignore[union-attr, operator]
        pipe.load_lora_weights(load_file(file))
        out = {}
        for name, module in modules(pipe).items():
            if hasattr(module, "get_delta_weight"):
                for adapter in module.scaling:  # type: ignore[union-attr]
                    if adapter in module.lora_A:  # type: ignore[operator]
                        module.merge(safe_merge=False)  # type: ignore[operator]
                        out[name] = module.base_layer.weight.detach() - weights[name]  # type: ignore[union-attr]
        return out, []

    return apply


def main(loader: str, checkout: Path, folder: Path, loaders: Mapping[str, Any] = globals()) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = json.loads((folder / "job.json").read_text("utf-8"))
    weights = load_file(folder / "model.safetensors")
    apply = loaders[loader](checkout, job["base"], job["depths"])
    said = []
    for number in range(job["files"]):
        entry: dict[str, Any] = {"error": None, "said": []}
        deltas: Deltas = {}
        try:
            deltas, entry["said"] = apply(folder / f"file-{number}.safetensors", weights)
        except Exception as error:  # what is asked is whether there is one
            entry["error"] = f"{type(error).__name__}: {error}"[:300]
        deltas = {name: delta.detach().float().contiguous() for name, delta in deltas.items()}
        save_file(deltas, folder / f"delta-{number}.safetensors")
        said.append(entry)
    (folder / "said.json").write_text(json.dumps(said), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
