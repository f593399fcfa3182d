"""musubi-tuner's transformers in full size, without data, and what its networks make of them: `python
tests/hosts/musubi/full_size.py HOST` prints JSON. Started in a process of its own (`sizes`): it imports the host."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


def zimage() -> Any:
    from musubi_tuner.zimage import zimage_model

    return zimage_model.create_model("torch", False, None, use_16bit_for_attention=True)  # the trainer's default


def qwen_image() -> Any:
    from musubi_tuner.qwen_image import qwen_image_model

    return qwen_image_model.create_model("torch", False, False, False, False, None)


def flux2(params: str) -> Any:
    from musubi_tuner.flux_2 import flux2_models

    return flux2_models.Flux2(getattr(flux2_models, params)(), attn_mode="torch")


def krea2() -> Any:
    from musubi_tuner.krea2 import krea2_mmdit

    # Its one configuration stands beside the text encoder, which only transformers from 4.57 on has.
    source = Path(krea2_mmdit.__file__).with_name("krea2_utils.py").read_text("utf-8")
    text = re.search(r"single_mmdit_large_wide = (SingleMMDiTConfig\(.*?\n\))", source, re.DOTALL)
    assert text
    return krea2_mmdit.SingleStreamDiT(eval(text[1], {"SingleMMDiTConfig": krea2_mmdit.SingleMMDiTConfig}))


def wan(task: str) -> Any:
    from musubi_tuner.wan.configs import WAN_CONFIGS
    from musubi_tuner.wan.modules import model

    c = WAN_CONFIGS[task]
    sizes = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    options = {name: getattr(c, name) for name in sizes}
    return model.WanModel("t2v", "2.2" if c.v2_2 else "2.1", attn_mode="torch", **options)


#: Name -> the base of its LoRA files, its network, the model.
MODELS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "zimage": ("zimage", "zimage", zimage),
    "qwen_image": ("qwen_image", "qwen_image", qwen_image),
    "flux2-dev": ("flux2", "flux_2", lambda: flux2("Flux2Params")),
    "flux2-klein-9b": ("flux2", "flux_2", lambda: flux2("Klein9BParams")),
    "flux2-klein-4b": ("flux2", "flux_2", lambda: flux2("Klein4BParams")),
    "krea2": ("krea2", "krea2", krea2),
    "wan-1.3b": ("wan", "wan", lambda: wan("t2v-1.3B")),
    "wan-14b": ("wan", "wan", lambda: wan("t2v-14B")),
    "wan-a14b": ("wan", "wan", lambda: wan("t2v-A14B")),
}


def main(host: Path) -> dict[str, Any]:
    sys.path.insert(0, str(host / "src"))
    import torch

    torch.cuda.current_device = lambda: 0  # asked by its text encoder's definition, on a machine without one
    if importlib.util.find_spec("easydict") is None:  # of its configurations: what names lead to
        stand_in = types.ModuleType("easydict")
        more = {"update": lambda self, other: vars(self).update(vars(other))}
        stand_in.EasyDict = type("EasyDict", (types.SimpleNamespace,), more)  # type: ignore[attr-defined]
        sys.modules["easydict"] = stand_in

    answer = {}
    for name, (base, network, make) in MODELS.items():
        module = importlib.import_module(f"musubi_tuner.networks.lora_{network}")
        with torch.device("meta"):
            model = make()
            made = [
                module.create_arch_network(1.0, 1, 1.0, None, None, model, **options)
                for options in ({}, {"include_patterns": "['.*']"})
            ]
        own, everything = (
            {m.lora_name: [m.lora_down.weight.shape[1], m.lora_up.weight.shape[0]] for m in lora.unet_loras}
            for lora in made
        )
        answer[name] = {
            "base": base,
            "parameters": sum(p.numel() for p in model.parameters()),
            "modules": own,
            "all modules": everything,
            "blocks": {
                part: [sum(p.numel() for p in block.parameters()) for block in getattr(model, part)]
                for part in ("blocks", "transformer_blocks", "double_blocks", "single_blocks", "layers")
                if hasattr(model, part)
            },
        }
    return answer


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = main(Path(sys.argv[1]))
    print(json.dumps(found))
