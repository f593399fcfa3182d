"""Runs one of sd-scripts' scripts unmodified, on models small enough for a CPU: launcher.py SCRIPT ARGS...

sd-scripts takes UNet widths from module constants; they are set to those of `tests/tiny.py` before the script starts.
`torchvision` may be a build whose C++ operators do not load beside a CPU-only torch: the schemas it registers at import are
declared first. Both belong to the tests, not to the plugin.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch


def _torchvision_importable() -> None:
    """sd-scripts imports it; kept apart from the test environment, because transformers breaks where it does not load."""
    sys.path.append(str(Path(sys.prefix) / "host-site"))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_keep"] = library  # the schemas live as long as this object
        import torchvision  # noqa: F401


def main() -> None:
    torch.set_num_threads(1)
    _torchvision_importable()
    script = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(script.parent))
    os.chdir(script.parent)
    from library import original_unet, sdxl_original_unet

    original_unet.BLOCK_OUT_CHANNELS = (32, 64, 128, 128)
    original_unet.TIMESTEP_INPUT_DIM = 32
    original_unet.TIME_EMBED_DIM = 128
    sdxl_original_unet.MODEL_CHANNELS = 32
    sdxl_original_unet.TIME_EMBED_DIM = 128
    for module in filter(None, os.environ.get("SPF_TEST_BEFORE", "").split(os.pathsep)):
        runpy.run_path(module)
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
