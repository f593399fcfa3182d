"""Runs sd-scripts' scripts unmodified, on models small enough for a CPU.

    launcher.py SCRIPT ARGS...     one run, as `python SCRIPT ARGS...`
    launcher.py --serve HOST       many runs in the sd-scripts folder HOST, one JSON job a line on standard input:
                                   {"script": ..., "args": [...], "log": ...} -> {"returncode": ...} (`forking`)

Beside transformers 5 it gives CLIPTextModel back the `text_model` that sd-scripts reads, as v0.12 does by itself.

sd-scripts takes UNet widths from module constants; they are set to those of the model before a script starts. The
transformers' are in `dits`.
`torchvision` may be a build whose C++ operators do not load beside a CPU-only torch: the schemas it registers at import
are declared first. Both belong to the tests, not to the plugin.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch


def _torchvision_importable() -> None:
    """sd-scripts imports it; it lies apart from the test environment, where transformers would break on it."""
    sys.path.append(str(Path(sys.prefix) / "host-site"))
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_keep"] = library  # the schemas live as long as this object
        import torchvision  # noqa: F401


def _frozen_models_without_ddp() -> None:
    """On GPUs accelerate wraps only models with something to train; on CPUs all, and torch refuses frozen ones."""
    import accelerate

    original = accelerate.Accelerator.prepare_model

    def prepare_model(self, model, *args, **kwargs):  # type: ignore[no-untyped-def]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._models.append(model)
            return model
        return original(self, model, *args, **kwargs)

    accelerate.Accelerator.prepare_model = prepare_model


def _text_model_in_clip() -> None:
    """transformers 5.6 made CLIPTextModel and its `text_model` one. This class is what they were before."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6):
        return

    class ClipTextModel(transformers.CLIPTextModelWithProjection):  # which kept its own
        def __init__(self, config):  # type: ignore[no-untyped-def]
            super().__init__(config)
            del self.text_projection

        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return self.text_model(*args, **kwargs)

    # Its first model puts another module into the place of `transformers`.
    sys.modules["transformers"].CLIPTextModel = ClipTextModel  # type: ignore[attr-defined]


def prepare(host: Path) -> None:
    """Make the host importable as its scripts expect."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():  # two equal runs must come out equal, as on a CPU
        torch.use_deterministic_algorithms(True, warn_only=True)
    _torchvision_importable()
    _text_model_in_clip()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _frozen_models_without_ddp()
    sys.path.insert(0, str(host))
    os.chdir(host)


def set_widths(model: Path) -> None:
    """Give sd-scripts' UNets the widths of a model in diffusers format."""
    from library import original_unet, sdxl_original_unet

    widths = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))["block_out_channels"]
    if len(widths) == 3:
        sdxl_original_unet.MODEL_CHANNELS = widths[0]
        sdxl_original_unet.TIME_EMBED_DIM = 4 * widths[0]
    else:
        original_unet.BLOCK_OUT_CHANNELS = tuple(widths)
        original_unet.TIMESTEP_INPUT_DIM = widths[0]
        original_unet.TIME_EMBED_DIM = 4 * widths[0]


def run(script: Path, arguments: list[str]) -> None:
    from tests.hosts.dits import common, kinds

    model = Path(arguments[arguments.index("--pretrained_model_name_or_path") + 1])
    transformer = kinds.kind_of(model)
    if transformer is None:
        set_widths(model)
    else:
        transformer.shrink()
        common.swap_in_place()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def serve(host: Path) -> None:
    from tests.hosts import forking

    def prepared() -> None:
        prepare(host)
        import ftfy  # noqa: F401  the tokenizers' own
        import networks.lora  # noqa: F401
        from library import sdxl_train_util, train_util  # noqa: F401  the slow imports, before the first fork

    forking.serve(prepared, lambda job: run(host / job["script"], job["args"]))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]).resolve())
    else:
        script = Path(sys.argv[1]).resolve()
        prepare(script.parent)
        run(script, sys.argv[2:])
