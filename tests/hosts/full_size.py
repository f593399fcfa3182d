"""The host's transformers in full size, without data, and what its networks make of them: `python full_size.py HOST`
prints JSON. Started in a process of its own (`tests.hosts.sizes`), as it imports the host."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def anima() -> Any:
    from library import anima_models, anima_utils

    # The one configuration of the released model, which stands in the function that loads it.
    text = re.search(r"dit_config = (\{.*?\n    \})", inspect.getsource(anima_utils.load_anima_model), re.DOTALL)
    assert text
    return anima_models.Anima(**eval(text[1], {"attn_mode": "torch", "split_attn": False}))


def flux() -> Any:
    from library import flux_models

    return flux_models.Flux(flux_models.configs["dev"].params)


def chroma() -> Any:
    from library import chroma_models

    return chroma_models.Chroma(chroma_models.chroma_params)


def lumina() -> Any:
    from library import lumina_models

    return lumina_models.NextDiT_2B_GQA_patch2_Adaln_Refiner()


def hunyuan_image() -> Any:
    from library import hunyuan_image_models

    return hunyuan_image_models.HYImageDiffusionTransformer("torch", False)


def sd3(depth: int, norm: str | None, dual: int, positions: int) -> Any:
    """As its `analyze_state_dict_state` reads the released checkpoints: depth x 64 wide."""
    from library import sd3_models

    width = 64 * depth
    params = sd3_models.SD3Params(2, depth, positions**2, positions, 2048, norm, [*range(dual)], 4096, width, "")
    return sd3_models.create_sd3_mmdit(params)


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "anima": ("lora_anima", anima),
    "sd3": ("lora_sd3", lambda: sd3(24, "rms", 13, 384)),  # 3.5 medium
    "sd3-medium": ("lora_sd3", lambda: sd3(24, None, 0, 192)),
    "sd3.5-large": ("lora_sd3", lambda: sd3(38, "rms", 0, 192)),
    "flux": ("lora_flux", flux),
    "chroma": ("lora_flux", chroma),
    "lumina": ("lora_lumina", lumina),
    "hunyuan_image": ("lora_hunyuan_image", hunyuan_image),
}


def main(host: Path) -> dict[str, Any]:
    sys.path[:0] = [str(Path(__file__).parent), str(host)]
    import launcher

    launcher.prepare(host)
    import torch

    answer = {}
    for name, (network, make) in MODELS.items():
        with torch.device("meta"):
            model = make()
            lora = importlib.import_module(f"networks.{network}").create_network(
                1.0, 1, 1.0, None, [torch.nn.Module()], model
            )
        answer[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "modules": {m.lora_name: [m.lora_down.weight.shape[1], m.lora_up.weight.shape[0]] for m in lora.unet_loras},
            "blocks": {
                part: [sum(p.numel() for p in block.parameters()) for block in getattr(model, part)]
                for part in ("blocks", "joint_blocks", "double_blocks", "single_blocks", "layers")
                if hasattr(model, part)
            },
        }
    return answer


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = main(Path(sys.argv[1]))
    print(json.dumps(found))
