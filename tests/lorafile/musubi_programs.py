"""What the loaders' own functions make of LoRA files of the models that musubi-tuner trains, as `dit_programs` says it
of sd-scripts' transformers.

    python musubi_programs.py LOADER CHECKOUT FOLDER

Weights and deltas are named by musubi-tuner's paths. `musubi` is the trainer itself: what `--base_weights` and
`--dim_from_weights` make of a file.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

if __name__ == "__main__":  # started as a program, `tests` is found from the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.lorafile import programs
from tests.lorafile.dit_programs import deltas, original, patched
from tests.lorafile.musubi_kinds import MLP, TEXT, WIDTH, diffusers_paths
from tests.lorafile.programs import Apply, Deltas, Model, Weights

CONFIG: dict[str, dict[str, Any]] = {  # of the tiny models, as ComfyUI keeps them
    "zimage": {"dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1},
    "qwen_image": {},
    "flux2": {"depth": 2, "depth_single_blocks": 2, "hidden_size": WIDTH},
    "krea2": {"layers": 2},
    "wan": {},
}
COMFY = {"zimage": "Lumina2", "qwen_image": "QwenImage", "flux2": "Flux", "krea2": "Krea2", "wan": "WAN21"}
CLASS = {"zimage": "ZImage", "qwen_image": "QwenImage", "flux2": "Flux2", "krea2": "Krea2", "wan": "Wan"}
NETWORK = {"zimage": "zimage", "qwen_image": "qwen_image", "flux2": "flux_2", "krea2": "krea2", "wan": "wan"}


def comfyui(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    for name in ("comfy_aimdo", "comfy_aimdo.host_buffer", "comfy_aimdo.model_mmap", "comfy_aimdo.control"):
        programs.stand_in(name)  # of a release from 2026 on
    programs.comfyui(checkout, "sd1", [])  # its stand-ins
    lora = importlib.import_module("comfy.lora")
    kind = type(COMFY[base], (Model,), {"state_dict": lambda self: self.weights})
    setattr(sys.modules["comfy.model_base"], COMFY[base], kind)
    for name in {*COMFY.values()} - {COMFY[base]}:
        setattr(sys.modules["comfy.model_base"], name, type(name, (), {}))
    convert = importlib.import_module("comfy.lora_convert").convert_lora

    def place(path: str, weight: torch.Tensor) -> Any:
        """Where its checkpoint has a module of musubi-tuner's."""
        block, last = path.rsplit(".attention.to_", 1) if base == "zimage" and ".attention.to_" in path else (path, "")
        if last in ("q", "k", "v"):  # in one
            width = len(weight)
            return f"diffusion_model.{block}.attention.qkv.weight", (0, "qkv".index(last) * width, width)
        return f"diffusion_model.{f'{block}.attention.out' if last else path}.weight"

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        before, places = original({f"{path}.weight": place(path, weight) for path, weight in weights.items()}, weights)
        model = kind(list(before), config)
        model.weights = before
        key_map = lora.model_lora_keys_unet(model, {})
        loaded = lora.load_lora(convert(load_file(file)), key_map)
        return deltas(places, before, patched(loaded, before, lora.calculate_weight)), []

    return apply


def has(base: str) -> bool:
    """Whether the installed diffusers has the model."""
    from diffusers.loaders import lora_pipeline

    return hasattr(lora_pipeline, f"{CLASS[base]}LoraLoaderMixin")


def transformer(base: str) -> nn.Module:
    """diffusers' own class, tiny."""
    import diffusers

    torch.manual_seed(0)
    heads = {"attention_head_dim": 32, "num_attention_heads": 2}
    if base == "zimage":
        return diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
            axes_dims=[8, 12, 12], axes_lens=[64, 64, 64],
        )  # fmt: skip
    if base == "qwen_image":
        return diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=TEXT, axes_dims_rope=(8, 12, 12), **heads
        )
    if base == "flux2":
        return diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=TEXT, axes_dims_rope=(8, 8, 8, 8),
            timestep_guidance_channels=16, **heads,
        )  # fmt: skip
    if base == "krea2":
        return diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=MLP, timestep_embed_dim=16,
            text_hidden_dim=WIDTH, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
            text_intermediate_size=MLP, axes_dims_rope=(8, 12, 12), **heads,
        )  # fmt: skip
    return diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=MLP,
        num_layers=2,
        rope_max_seq_len=32,
        **heads,
    )


def diffusers(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    from diffusers.loaders import lora_pipeline

    for name in ("diffusers", "peft"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        model = transformer(base).requires_grad_(False)
        modules = dict(model.named_modules())
        for path, weight in weights.items():
            theirs = diffusers_paths(base, path)
            for name, piece in zip(theirs, weight.chunk(len(theirs)), strict=True):
                modules[name].weight.copy_(piece)  # type: ignore[operator, union-attr]
        nobody = dict.fromkeys(("text_encoder", "text_encoder_2", "hf_device_map", "transformer_2"))
        pipe = type("Pipe", (getattr(lora_pipeline, f"{CLASS[base]}LoraLoaderMixin"),), nobody)()
        pipe.transformer, pipe.components = model, {}
        pipe.load_lora_weights(load_file(file))
        found: Deltas = {}
        for name, module in list(model.named_modules()):
            if hasattr(module, "get_delta_weight"):
                before = module.base_layer.weight.detach().clone()  # type: ignore[union-attr, operator]
                module.merge(safe_merge=False)  # type: ignore[operator]
                found[name] = module.base_layer.weight.detach() - before  # type: ignore[union-attr, operator]
        out = {}
        for path, weight in weights.items():
            theirs = diffusers_paths(base, path)
            like = weight.chunk(len(theirs))
            pieces = [found.get(name, torch.zeros_like(piece)) for name, piece in zip(theirs, like, strict=True)]
            if any(bool((piece != 0).any()) for piece in pieces):
                out[path] = torch.cat(pieces)
        return out, []

    return apply


def tree(base: str, weights: Weights) -> nn.Module:
    """A model of linear layers by musubi-tuner's paths, its blocks of the classes that its network looks for."""
    named = {"zimage": "ZImageTransformerBlock", "qwen_image": "QwenImageTransformerBlock", "wan": "WanAttentionBlock"}
    root = nn.Module()
    for path, weight in weights.items():
        parent = root
        *above, last = path.split(".")
        for depth, part in enumerate(above):
            if not hasattr(parent, part):
                block = named.get(base, {"double_blocks": "DoubleStreamBlock"}.get(above[0], "SingleStreamBlock"))
                parent.add_module(part, type(block if depth == 1 else "Module", (nn.Module,), {})())
            parent = getattr(parent, part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        parent.add_module(last, linear)
    return root


def musubi(checkout: Path, base: str, config: dict[str, Any]) -> Apply:
    sys.path.insert(0, str(checkout / "src"))
    network = importlib.import_module(f"musubi_tuner.networks.lora_{NETWORK[base]}")

    def apply(file: Path, weights: Weights) -> tuple[Deltas, list[str]]:
        model, state = tree(base, weights), load_file(file)
        made = network.create_arch_network_from_weights(1.0, state, unet=model, for_inference=True)
        made.merge_to(None, model, state, torch.float32, torch.device("cpu"))
        modules = dict(model.named_modules())
        out = {path: modules[path].weight.detach() - weight for path, weight in weights.items()}  # type: ignore
        return {path: delta for path, delta in out.items() if bool((delta != 0).any())}, []

    return apply


if __name__ == "__main__":
    programs.main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), globals())
