"""What the loaders' own functions make of LoRA files of SD 3, FLUX.1, Chroma and Lumina 2, as `programs` says it of SD.

    python dit_programs.py LOADER CHECKOUT FOLDER

Weights and deltas are named by diffusers' paths. Where a program keeps the checkpoint's modules, its own table says
which rows of which of them are meant, and the names it looks for; only SD 3's of A1111 are written down here.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

if __name__ == "__main__":  # started as a program, `tests` is found from the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.lorafile import programs
from tests.lorafile.programs import Apply, Deltas, Model, Patcher, Weights

WIDTH = 128
CONFIG: dict[str, dict[str, Any]] = {  # of the tiny models, as ComfyUI keeps them
    "sd3": {"depth": 2, "num_blocks": 2},
    "flux": {"depth": 2, "depth_single_blocks": 2, "hidden_size": WIDTH},
    "chroma": {"depth": 2, "depth_single_blocks": 2, "hidden_size": WIDTH},
    "lumina": {},
}
CLASS = {"sd3": "SD3", "flux": "Flux", "chroma": "Flux", "lumina": "Lumina2"}


class Place:
    """Where the outputs of a module of diffusers lie in the checkpoint's, by the program's own table."""

    def __init__(self, found: Any) -> None:
        self.key: str = found if isinstance(found, str) else found[0]
        self.offset = None if isinstance(found, str) else found[1]
        self.function: Callable[[torch.Tensor], torch.Tensor] = (
            (lambda t: t) if len(found) < 3 or isinstance(found, str) else found[2]
        )

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        part = whole if self.offset is None else whole.narrow(*self.offset)
        return self.function(part)  # halves change places, which is its own inverse


def original(table: dict[str, Any], weights: Weights) -> tuple[Weights, dict[str, Place]]:
    """The checkpoint's weights, of zeros where diffusers' are not at hand, and the place of each module."""
    places = {path: Place(table[f"{path}.weight"]) for path in weights if f"{path}.weight" in table}
    sizes: dict[str, list[int]] = {}
    for path, place in places.items():
        rows, columns = weights[path].shape
        end = rows if place.offset is None else place.offset[1] + rows
        have = sizes.setdefault(place.key, [0, columns])
        have[0] = max(have[0], end)
    out = {key: torch.zeros(*size) for key, size in sizes.items()}
    for path, place in places.items():
        place.of(out[place.key])[:] = weights[path]
    for path, place in places.items():
        if place.offset is None:
            out[place.key] = place.function(weights[path]).clone()
    return out, places


def deltas(places: dict[str, Place], before: Weights, after: Weights) -> Deltas:
    out = {}
    for path, place in places.items():
        delta = place.of(after[place.key] - before[place.key])
        if bool((delta != 0).any()):
            out[path] = delta.contiguous()
    return out


def patched(patches: dict[Any, Any], before: Weights, merge: Callable[..., torch.Tensor]) -> Weights:
    """Every patch of a model, with its offset and function, as ModelPatcher.add_patches keeps them."""
    after = {key: weight.clone() for key, weight in before.items()}
    for target, patch in patches.items():
        key, offset, function = target, None, None
        if not isinstance(target, str):
            key, offset = target[0], target[1]
            function = target[2] if len(target) > 2 else None
        if key in after:
            after[key] = merge([(1.0, patch, 1.0, offset, function)], after[key], key)
    return after


def comfyui(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    programs.comfyui(checkout, "sd1", [])  # its stand-ins
    lora, utils = importlib.import_module("comfy.lora"), importlib.import_module("comfy.utils")
    kind = type(CLASS[base], (Model,), {})
    setattr(sys.modules["comfy.model_base"], CLASS[base], kind)
    for name in {"SD3", "Flux"} - {CLASS[base]}:
        setattr(sys.modules["comfy.model_base"], name, type(name, (), {}))
    convert = importlib.import_module("comfy.lora_convert").convert_lora

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        before, places = original(_table(utils, base, config), weights)
        key_map = lora.model_lora_keys_unet(kind(list(before), config), {})
        loaded = lora.load_lora(convert(load_file(file)), key_map)
        return deltas(places, before, patched(loaded, before, lora.calculate_weight)), []

    return apply


def _table(utils: Any, base: str, config: dict[str, Any]) -> dict[str, Any]:
    """The program's own table; of Lumina 2, which has none in that commit, one by hand."""
    if base == "sd3":
        out = dict(utils.mmdit_to_diffusers(config, output_prefix="diffusion_model."))
        for third, part in enumerate("qkv"):  # SD 3.5 medium's second attention, which Forge's table is too old for
            rows = ("diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight", (0, third * WIDTH, WIDTH))
            out.setdefault(f"transformer_blocks.0.attn2.to_{part}.weight", rows)
        whole = "diffusion_model.joint_blocks.0.x_block.attn2.proj.weight"
        out.setdefault("transformer_blocks.0.attn2.to_out.0.weight", whole)
        return out
    if base != "lumina":
        return dict(utils.flux_to_diffusers(config, output_prefix="diffusion_model."))
    out = {}
    for part in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        block = f"diffusion_model.{part}"
        for name, start, size in (("q", 0, 96), ("k", 96, 32), ("v", 128, 32)):
            out[f"{part}.attn.to_{name}.weight"] = (f"{block}.attention.qkv.weight", (0, start, size))
        out[f"{part}.attn.to_out.0.weight"] = f"{block}.attention.out.weight"
        for i in (1, 2, 3):
            out[f"{part}.feed_forward.linear_{i}.weight"] = f"{block}.feed_forward.w{i}.weight"
        out[f"{part}.norm1.linear.weight"] = f"{block}.adaLN_modulation.1.weight"
    return out


def forge(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    programs.forge(checkout, "sd1", [])
    patcher, networks = importlib.import_module("backend.patcher.lora"), importlib.import_module("networks")
    utils = importlib.import_module("packages_3rdparty.comfyui_lora_collection.utils")
    repository = {"sd3": "stabilityai/stable-diffusion-3-medium", "flux": "black-forest-labs/FLUX.1-dev"}

    class Patches(Patcher):
        def add_patches(self, patches: dict[Any, Any], **options: Any) -> list[Any]:  # type: ignore[override]
            self.patches = patches
            return list(patches)

        def clone(self) -> Patches:
            return Patches(self.model)

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        before, places = original(_table(utils, base, config), weights)
        model = Model(list(before), config)
        model.config.huggingface_repo = repository.get(base, "Chroma")
        for function in (networks.model_lora_keys_unet, networks.model_lora_keys_clip):
            function.__defaults__[0].clear()
        unet, _ = networks.load_lora_for_models(
            Patches(model), Patches(Model([], {})), load_file(file), strength_model=1.0, strength_clip=1.0
        )
        return deltas(places, before, patched(unet.patches, before, patcher.merge_lora_to_weight)), []

    return apply


def a1111(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    programs.a1111(checkout, "sd1", [])
    networks, shared = sys.modules["networks"], sys.modules["modules.shared"]
    linear = sys.modules["modules.models.sd3.mmdit"].QkvLinear
    source = (checkout / "modules/models/sd3/sd3_model.py").read_text("utf-8")
    method = re.search(r"\n    def diffusers_weight_mapping\(self\):\n(.*?)(?=\n    def |\nclass |\Z)", source, re.S)
    assert method
    scope: dict[str, Any] = {}
    exec("def mapping(self):\n" + method[1].replace("\n        ", "\n    ").replace("        ", "    ", 1), scope)

    def table() -> dict[str, Any]:
        out: dict[str, Any] = {}
        for i in range(config["depth"]):
            block, theirs = f"transformer_blocks.{i}", f"diffusion_model.joint_blocks.{i}"
            for side, parts in (
                ("x_block", ("to_q", "to_k", "to_v")),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                for third, part in enumerate(parts):
                    rows = (0, third * WIDTH, WIDTH)
                    out[f"{block}.attn.{part}.weight"] = (f"{theirs}.{side}.attn.qkv", rows)
            for part, whole in (("attn.to_out.0", "x_block.attn.proj"), ("attn.to_add_out", "context_block.attn.proj"),
                                ("ff.net.0.proj", "x_block.mlp.fc1"), ("ff.net.2", "x_block.mlp.fc2"),
                                ("ff_context.net.0.proj", "context_block.mlp.fc1"),
                                ("norm1.linear", "x_block.adaLN_modulation.1")):  # fmt: skip
                out[f"{block}.{part}.weight"] = f"{theirs}.{whole}"
        return out

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        before, places = original(table(), weights)
        found: dict[str, nn.Module] = {}
        for key, weight in before.items():
            made = linear if key.endswith(".qkv") else nn.Linear
            found[key] = made(weight.shape[1], weight.shape[0])
            found[key].weight.data.copy_(weight)  # type: ignore[operator, union-attr]
            found[key].network_layer_name = key.replace(".", "_")  # type: ignore[assignment]
            found[key].requires_grad_(False)
        model = types.SimpleNamespace(network_layer_mapping={k.replace(".", "_"): m for k, m in found.items()})
        inner = types.SimpleNamespace(model=types.SimpleNamespace(depth=config["depth"]))
        model.diffusers_weight_mapping = lambda: scope["mapping"](inner)
        shared.sd_model = model  # type: ignore[attr-defined]
        net = networks.load_network("x", types.SimpleNamespace(filename=str(file), name="x", metadata={}))  # type: ignore[attr-defined]
        net.dyn_dim = None
        networks.loaded_networks[:] = [net]  # type: ignore[attr-defined]
        networks.extra_network_lora = types.SimpleNamespace(errors={})  # type: ignore[attr-defined]
        for module in found.values():
            networks.network_apply_weights(module)  # type: ignore[attr-defined]
        after = {key: module.weight.detach() for key, module in found.items()}
        return deltas(places, before, after), []  # type: ignore[arg-type]

    return apply


def has(base: str) -> bool:
    """Whether the installed diffusers has the model."""
    import diffusers

    names = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "chroma": "ChromaTransformer2DModel"}
    return hasattr(diffusers, names.get(base, "Lumina2Transformer2DModel"))


def transformer(base: str) -> nn.Module:
    """diffusers' own class, tiny; of the classes that the installed release has."""
    import diffusers

    torch.manual_seed(0)
    if base == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=WIDTH, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
    if base == "lumina":
        return diffusers.Lumina2Transformer2DModel(
            sample_size=8, hidden_size=96, num_layers=1, num_refiner_layers=1, num_attention_heads=6, num_kv_heads=2,
            multiple_of=16, in_channels=4, cap_feat_dim=32, axes_dim_rope=(8, 4, 4), axes_lens=(8, 8, 8),
        )  # fmt: skip
    options: dict[str, Any] = {
        "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
        "joint_attention_dim": 32, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip
    if base == "chroma":
        return diffusers.ChromaTransformer2DModel(
            **options, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
        )
    return diffusers.FluxTransformer2DModel(**options, pooled_projection_dim=16, guidance_embeds=True)


def diffusers(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    import logging

    from diffusers.loaders import lora_pipeline

    for name in ("diffusers", "peft"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    mixin = {"sd3": "SD3", "flux": "Flux", "chroma": "Flux", "lumina": "Lumina2"}[base]

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        model = transformer(base).requires_grad_(False)
        for path, module in model.named_modules():
            if path in weights:
                module.weight.copy_(weights[path])  # type: ignore[operator, union-attr]
        nobody = dict.fromkeys(("text_encoder", "text_encoder_2", "hf_device_map"))
        pipe = type("Pipe", (getattr(lora_pipeline, f"{mixin}LoraLoaderMixin"),), nobody)()
        pipe.transformer, pipe.components = model, {}
        pipe.load_lora_weights(load_file(file))
        out = {}
        for path, module in list(model.named_modules()):
            if hasattr(module, "get_delta_weight"):
                for adapter in module.scaling:  # type: ignore[union-attr]
                    if adapter in module.lora_A:  # type: ignore[operator]
                        module.merge(safe_merge=False)  # type: ignore[operator]
                        delta = module.base_layer.weight.detach() - weights[path]  # type: ignore[union-attr]
                        if bool((delta != 0).any()):
                            out[path] = delta
        return out, []

    return apply


if __name__ == "__main__":
    programs.main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), globals())
