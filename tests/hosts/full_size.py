"""The host's transformers in full size, without data, calls of them, and what its networks make of them: `python -m
tests.hosts.full_size HOST` prints JSON. Started in a process of its own (`tests.hosts.sizes`): it imports the host."""

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


def call(name: str, side: int, *, checkpointing: bool) -> Any:
    """A call as the trainer makes it: one image of `side` x `side` pixels, default text lengths. With checkpointing the
    trainer makes its inputs ask for a gradient, so that every block has one."""
    import torch

    from spf_plugin.seam import Call

    def full(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=checkpointing)

    def whole(*shape: int) -> Any:
        return torch.ones(shape, dtype=torch.long)

    def places(count: int) -> Any:
        return torch.zeros(1, count, 3, requires_grad=checkpointing)

    latents, patches, time = (side // 8, side // 8), (side // 16) ** 2, torch.zeros(1)
    if name == "anima":
        ids = {"target_input_ids": whole(1, 512), "target_attention_mask": whole(1, 512)}
        ids |= {"source_attention_mask": whole(1, 512), "padding_mask": full(1, 1, *latents).detach()}
        return Call((full(1, 16, 1, *latents), time, full(1, 512, 1024)), ids)
    if name in ("flux", "chroma"):
        shared = {"img": full(1, patches, 64).detach(), "img_ids": places(patches)}  # packed before
        shared |= {"txt": full(1, 512, 4096), "txt_ids": places(512), "timesteps": time, "guidance": full(1).float()}
        if name == "flux":
            return Call((), {**shared, "y": full(1, 768), "txt_attention_mask": None})
        return Call((), {**shared, "y": None, "txt_attention_mask": whole(1, 512), "mod_vectors": full(1, 344, 3072)})
    if name == "lumina":
        words = {"cap_feats": full(1, 256, 2304), "cap_mask": whole(1, 256).int()}
        return Call((), {"x": full(1, 16, *latents), "t": time, **words})
    if name == "hunyuan_image":
        words, glyphs = (full(1, 256, 3584), whole(1, 256)), (full(1, 128, 1472), whole(1, 128))
        return Call((full(1, 64, side // 32, side // 32), time, *words, *glyphs), {})
    return Call((full(1, 16, *latents), time), {"context": full(1, 77 + 256, 4096), "y": full(1, 2048)})


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
