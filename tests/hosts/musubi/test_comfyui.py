"""A LoRA that was trained inside the host, in the names that `spf lora convert` writes for ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.hosts.musubi.conftest import EVERY_STEP, Musubi
from tests.lorafile import musubi_programs, real
from tests.lorafile.conftest import checkout
from tests.lorafile.kinds import File

#: Kinds, and what ComfyUI's side calls their model and asks of its configuration.
BASES = {"zimage": "zimage", "qwen_image": "qwen_image", "flux2_klein": "flux2", "krea2": "krea2", "wan": "wan"}
CONFIG = {
    "zimage": {"dim": 96, "n_layers": 4, "n_refiner_layers": 1},
    "flux2": {"depth": 2, "depth_single_blocks": 4, "hidden_size": 96},
}


@pytest.mark.kinds(*BASES)
def test_comfyui_applies_all_of_it(musubi: Musubi, tmp_path: Path) -> None:
    """Every module of the host's file is a linear layer of the checkpoint by its own name; and where ComfyUI is at
    hand (`SPF_COMFYUI`), its functions know every key, and make of the model what the file means."""
    trained = musubi.train(*EVERY_STEP, learning_rate=0.05)
    file, theirs = load_file(trained.file), tmp_path / "comfyui.safetensors"
    musubi.done("spf", "lora", "convert", trained.file, theirs, "--to", "comfyui")
    converted = load_file(theirs)
    checkpoint = load_file(musubi.kind.options(musubi.models)["dit"])
    weights = {k.removesuffix(".weight"): t for k, t in checkpoint.items() if k.endswith(".weight") and t.dim() == 2}
    paths = {path.replace(".", "_"): path for path in weights}
    modules = {key.split(".")[0] for key in file}
    assert len(modules) == musubi.kind.TENSORS // 3
    stems = {f"diffusion_model.{paths[module.removeprefix('lora_unet_')]}" for module in modules}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert converted.keys() == {f"{stem}.{part}" for stem in stems for part in parts}
    meant = {}
    for module in modules:
        down, up, alpha = (file[f"{module}.{part}"].double() for part in parts)
        if up.abs().max() > 0:  # of some models the last block makes words that nobody reads
            meant[paths[module.removeprefix("lora_unet_")]] = alpha / len(down) * (up @ down)
    assert len(meant) > 0.9 * len(modules)
    base = BASES[musubi.name]
    folder = checkout("SPF_COMFYUI")
    program, config = musubi_programs.__file__, CONFIG.get(base, {"": 0})
    whole = {path: weight.float().contiguous() for path, weight in weights.items()}
    ((deltas, error),) = real.run("comfyui", folder, base, [File(converted, meant)], whole, program, config)
    assert error is None
    assert deltas.keys() == meant.keys()
    assert real.outcome(File(converted, meant), deltas, error) == "loads"
