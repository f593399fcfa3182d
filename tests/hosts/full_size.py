"""The host's transformers in full size, without data, and what its networks make of them: `python -m
tests.hosts.full_size HOST` prints JSON, `... HOST anima flux` tracks a plain step and a forward pass of each, 1024 px.
Started in a process of its own (`tests.hosts.sizes`), as it imports the host."""

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
from unittest import mock


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


def call(name: str, model: Any) -> Callable[[], Any]:
    """A forward pass at 1024 px, as the trainer makes it: default text lengths, one image."""
    import torch

    def full(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def whole(*shape: int) -> Any:
        return torch.ones(shape, dtype=torch.long)

    if name == "anima":
        text = {"target_input_ids": whole(1, 512), "target_attention_mask": whole(1, 512)}
        text["source_attention_mask"] = whole(1, 512)
        return lambda: model(
            full(1, 16, 1, 128, 128), full(1), full(1, 512, 1024), padding_mask=full(1, 1, 128, 128), **text
        )
    if name in ("flux", "chroma"):
        shared = {"img": full(1, 4096, 64), "img_ids": torch.zeros(1, 4096, 3), "txt": full(1, 512, 4096)}
        shared |= {"txt_ids": torch.zeros(1, 512, 3), "timesteps": full(1), "guidance": full(1)}
        if name == "flux":
            return lambda: model(**shared, y=full(1, 768))
        return lambda: model(**shared, y=None, txt_attention_mask=whole(1, 512), mod_vectors=full(1, 344, 3072))
    if name == "lumina":
        return lambda: model(full(1, 16, 128, 128), full(1), full(1, 256, 2304), whole(1, 256))
    if name == "hunyuan_image":
        words, glyphs = (full(1, 256, 3584), whole(1, 256)), (full(1, 128, 1472), whole(1, 128))
        return lambda: model(full(1, 64, 32, 32), full(1), *words, *glyphs)
    return lambda: model(full(1, 16, 128, 128), full(1), y=full(1, 2048), context=full(1, 154 + 256, 4096))


def tracked(host: Path, names: list[str]) -> dict[str, Any]:
    """Bytes at the peak and operations of a plain step of rank 16, and of a forward pass."""
    sys.path[:0] = [str(Path(__file__).parent), str(host)]
    import launcher

    launcher.prepare(host)
    import torch

    from benchmarks.tracking import MetaGpu, track

    answer: dict[str, Any] = {}
    for name in names:
        network, make = MODELS[name]
        made = importlib.import_module(f"networks.{network}")
        with torch.device("meta"):
            model = make().to(torch.bfloat16).requires_grad_(False).train()
            lora = made.create_network(1.0, 16, 8.0, None, [torch.nn.Module()], model)
        lora.apply_to([torch.nn.Module()], model, False, True)
        for checkpointing in (True, False):
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = checkpointing
            for weight in lora.parameters():
                weight.grad = None
            # Meta tensors have no values: wherever a model asks for the length of a text, it is that of all of it.
            length = 128 if name == "hunyuan_image" else 256
            with (
                MetaGpu(),
                torch.device("meta"),
                mock.patch.object(torch.Tensor, "item", return_value=length),
                mock.patch.object(torch.Tensor, "__int__", return_value=length),
                mock.patch.object(torch.Tensor, "__index__", return_value=length),
                mock.patch.object(torch.Tensor, "tolist", return_value=[length]),
            ):
                forward = call(name, model)

                def step(mark: Any, forward: Any = forward) -> None:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        output = forward()
                    output = output[0] if isinstance(output, tuple | list) else output
                    output.float().square().mean().backward()

                def once(mark: Any, forward: Any = forward) -> None:
                    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                        forward()

                cost, alone = track(step), track(once)
            key = "checkpointing" if checkpointing else "no checkpointing"
            answer.setdefault(name, {})[key] = {"peak": cost.peak, "flops": cost.flops, "forward": alone.flops}
            print(name, answer[name], file=sys.stderr, flush=True)
    return answer


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
        found = tracked(Path(sys.argv[1]), sys.argv[2:]) if sys.argv[2:] else main(Path(sys.argv[1]))
    print(json.dumps(found))
