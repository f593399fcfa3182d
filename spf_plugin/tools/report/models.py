"""The model and its LoRAs, as diffusers loads them; samples; and the hashes of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spf_plugin.errors import SPFError
from spf_plugin.files import expanded
from spf_plugin.lorafile import inspect
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.names import BASE_LABEL
from spf_plugin.trainer import models
from spf_plugin.trainer.vae import from_latents

SHORT = 12  # hex digits of a hash that the page shows
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # folders with weights
_ADAPTER = "report"


def load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, models.BaseModel]:
    """A diffusers pipeline on its device, its VAE in float32, and the parts of it.

    Raises:
        SPFError: see `spf_plugin.trainer.models.load`.
    """
    with models.quiet():
        pipeline = models.load_pipeline(name, dtype)
        parts = models.from_pipeline(pipeline, name)
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, parts


@contextmanager
def from_transformers(option: str, name: str, kind: str, example: str) -> Iterator[None]:
    """While it is open a model that measures is loaded, and transformers says nothing.

    Args:
        option: that names the model.
        name: its folder or hub name.
        kind: of model that it must be.
        example: of such a model.

    Raises:
        SPFError: an OSError, ValueError or KeyError says that it is none.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it has much to say on the choice of an image processor
    try:
        with models.quiet():
            yield
    except (OSError, ValueError, KeyError) as error:
        raise SPFError(
            f"{option} {name}: not a {kind} of transformers with safetensors weights ({models.first_line(error)}). "
            f"Give a folder or hub name of one, such as {example}."
        ) from None
    finally:
        logging.set_verbosity(level)


def check_lora(path: Path, family: str) -> list[str]:
    """What diffusers will not apply of a LoRA file, one sentence each; mostly nothing.

    Args:
        path: the file.
        family: of the model, `sd1`, `sd2`, `sdxl` or `sd3`.

    Raises:
        SPFError: it cannot be read, belongs to another family, or diffusers does not load it.
    """
    contents = inspect.from_file(path)
    description = inspect.describe(contents)
    if description.base != family and description.base != "unknown":
        trained, given = BASE_LABEL[description.base], BASE_LABEL[family]
        raise SPFError(
            f"{path} was trained for {trained}, and --model is {given}. Give the model that it was trained on, or one "
            "made from that."
        )
    verdict = next(v for v in verdicts(contents, description) if v.loader == "diffusers")
    failing = [f for f in verdict.findings if f.level == "fail"]
    if failing:
        fix = f" Try: {failing[0].fix}." if failing[0].fix else ""
        raise SPFError(f"{path}: diffusers, which draws the report, does not load it: {failing[0].message}{fix}")
    return [f"{path.name}: {f.message}" for f in verdict.findings if f.level == "warn"]


@contextmanager
def applied(pipeline: Any, path: Path, weight: float) -> Iterator[None]:
    """The pipeline with a LoRA, in the block.

    Raises:
        SPFError: diffusers refuses the file.
    """
    try:
        with models.quiet():
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=_ADAPTER)
            if _ADAPTER not in {name for names in pipeline.get_list_adapters().values() for name in names}:
                raise ValueError("none of its tensors belongs to this model")
            pipeline.set_adapters(_ADAPTER, weight)
    except ImportError as error:
        raise SPFError(f'spf report needs peft to load a LoRA: pip install "spf-plugin[report]" ({error})') from error
    except IndexError as error:
        import diffusers
        import transformers

        raise SPFError(
            f"{path} has a text encoder's part, which diffusers {diffusers.__version__} does not load beside "
            f"transformers {transformers.__version__}: it knows older names of its modules. pip install -U diffusers"
        ) from error
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SPFError(f"{path} does not fit this model: {models.first_line(error)}") from error
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: int,
    batch: int,
    show: Callable[[int, int], None],
) -> NDArray[np.uint8]:
    """One image a prompt with the model's own sampler, each from its own seed: it does not depend on its neighbours.

    Args:
        pipeline: as `load` gives it.
        prompts: N prompts.
        seeds: N seeds; the noise is made on the CPU, so it is the same on every device.
        steps: sampler steps.
        guidance: classifier-free guidance.
        size: side in pixels.
        batch: images at a time.
        show: called with (steps done, steps in all), over all images.

    Returns:
        uint8 `[N, size, size, 3]`.

    Raises:
        SPFError: the model gives no numbers, or the GPU is out of memory.
    """
    total, out = len(prompts) * steps, []
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])

        def after_step(
            _pipeline: Any, step: int, _time: Any, values: Any, before: int = start, n: int = len(chosen)
        ) -> Any:
            show(before * steps + n * min(step + 1, steps), total)
            return values

        try:
            latents = pipeline(
                chosen,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]],
                height=size,
                width=size,
                output_type="latent",
                callback_on_step_end=after_step,
            ).images
            if not bool(latents.isfinite().all()):
                raise SPFError("the model gives NaN in this precision. Use --dtype bf16 or fp32.")
            for one in from_latents(pipeline.vae, latents.float()):
                pixels = pipeline.vae.decode(one[None]).sample[0]
                out.append((((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)).cpu().numpy())
        except torch.cuda.OutOfMemoryError:
            raise SPFError(
                "the GPU is out of memory while drawing. In this order: --dtype fp16, --batch-size 1, a smaller --size."
            ) from None
    return np.stack(out)


def sha256(path: Path) -> str:
    """Of one file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def model_hashes(name: str) -> dict[str, str]:
    """The weights of a model: file, relative to the model, -> sha256. Empty where the files cannot be found.

    Args:
        name: as given to `load`.
    """
    path = expanded(name)
    if path.is_file():
        return {path.name: sha256(path)}
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(name, "model_index.json")
        if not isinstance(index, str):
            return {}
        path = Path(index).parent
    files = [f for part in PARTS for f in (path / part).glob("*.safetensors")]
    return {file.relative_to(path).as_posix(): sha256(file) for file in sorted(files)}


def short(digest: str) -> str:
    """What the page shows of a hash."""
    return digest[:SHORT]
