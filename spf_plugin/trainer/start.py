"""What a run of the reference trainer needs before its first step, or everything that is wrong with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spf_plugin import lora
from spf_plugin.adapter import bypass as adapter
from spf_plugin.adapter import quantised
from spf_plugin.errors import SPFError, collected
from spf_plugin.families import known as families
from spf_plugin.files import expanded
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.trainer import output
from spf_plugin.trainer.cache import Cached, Progress, cache_data, unreadable
from spf_plugin.trainer.data import Picture, check_targets, read_folder
from spf_plugin.trainer.models import BaseModel, load
from spf_plugin.trainer.settings import DEFAULT_NETWORK, DTYPES, PLAIN_LORA, Settings
from spf_plugin.trainer.steps import Trainer


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        accelerator: accelerate's.
        model: the base model; its denoiser is not on the device yet.
        resolution: side length in pixels.
        cache: the training data.
        network: the inner network, not applied yet.
        paths: the names in the file where they are not kohya's, see `output.named`.
        trainer: takes the steps.
    """

    accelerator: Any
    model: BaseModel
    resolution: int
    cache: Cached
    network: nn.Module
    paths: Mapping[str, str] | None
    trainer: Trainer


def ready(
    settings: Settings,
    progress: Progress,
    warn: Callable[[str], None],
    faults: Sequence[str] = (),
    wrong: Collection[str] = (),
) -> Ready:
    """Load, read and encode everything.

    Args:
        settings: the run.
        progress: called while images are encoded.
        warn: receives what the user should know and nothing stops for.
        faults: what is known to be wrong already.
        wrong: SPF's settings whose value is not known (`config.Read`).

    Raises:
        SPFError: with every mistake found; existing files are left alone.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional kernel, aloud
    problems = list(faults)
    if settings.save_precision not in DTYPES or settings.mixed_precision not in DTYPES:
        problems.append("the precision must be no, fp16 or bf16 (and fp16, bf16 or fp32 for the file).")
    inner = accelerator = model = cache = network = trainer = paths = None
    resolution = settings.resolution or 0
    pictures: list[Picture] = []
    if "network" not in wrong:
        with collected(problems):
            inner = network_module(settings.network)
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # it announces every network it makes
    with collected(problems):
        output.check_output(settings.out)
    with collected(problems):
        pictures = read_folder(settings.data)
    with collected(problems):
        accelerator = _accelerator(settings)
    spf = settings.spf
    captions = [picture.caption for picture in pictures]
    told: list[str] = []
    if spf is not None:
        if pictures and "target" not in wrong:
            told, _ = check_targets(spf.target, captions)  # what needs no tokenizer, before the model is loaded
        if inner is not None:
            problems += quantised.problems(spf.base, settings.network, settings.full_network_args)
        if accelerator is not None:
            problems += quantised.device_problems(spf.base, accelerator.device)
        problems += [] if "stage2_start" in wrong else spf.never_aligned(settings.steps)
    # Where the run will not start, a model is not downloaded for it.
    if not (problems or told) or os.path.exists(expanded(settings.model)):
        progress("loading the model", 0, 1, {})
        with collected(problems):
            model = load(settings.model, DTYPES.get(settings.mixed_precision, torch.float32))
    problems += told
    if model is not None:
        resolution = settings.resolution or model.resolution
        unfit = _resolution_problems(resolution, model)
        problems += unfit
        with collected(problems):
            if settings.min_snr_gamma:
                model.process.min_snr(torch.ones(1, dtype=torch.long), settings.min_snr_gamma)  # a flow has none
        if spf is not None and spf.enhances and model.family == "sd3":
            problems.append("spf_response reads pictures of SD1.x, SD2.x and SDXL only. Leave it off.")
            wrong = {*wrong, "clip"}  # is not loaded for nothing
        if spf is not None and pictures and "target" not in wrong:
            more, warnings = check_targets(spf.target, captions, model.tokenize, model.text_limit)
            problems += [problem for problem in more if problem not in told]
            for warning in warnings:
                warn(warning)
        if not problems and accelerator is not None:
            for part in (model.vae, *model.text_encoders):
                part.to(accelerator.device)
            progress("loading the model", 1, 1, {})
            with collected(problems):
                cache = cache_data(pictures, model, resolution, settings.seed, progress)
            model.vae.cpu()
        elif not unfit:
            problems += unreadable(pictures, resolution)

        torch.manual_seed(settings.seed)  # the network's initial weights, and its dropout
        if inner is not None:
            with collected(problems):
                network = _network(inner, settings, model)
                paths = output.named(model.denoiser, network) if model.family == "sd3" else None
        trainer = Trainer(settings, model, accelerator)
        if problems and spf is not None and accelerator is not None:
            with collected(problems):
                lora.fit(network, ReferenceHost(trainer), spf, wrong, families.find(model.denoiser))  # type: ignore[arg-type]
    if problems or model is None or accelerator is None or cache is None or network is None or trainer is None:
        raise SPFError(problems)
    return Ready(accelerator, model, resolution, cache, network, paths, trainer)


def _resolution_problems(resolution: int, model: BaseModel) -> list[str]:
    found: list[str] = []
    if resolution < model.multiple or resolution % model.multiple:
        found.append(f"--resolution {resolution}: must be a multiple of {model.multiple}.")
    elif model.most is not None and resolution > model.most:
        found.append(f"--resolution {resolution}: must be at most {model.most}; this model has no more positions.")
    elif resolution <= model.least:
        found.append(f"--resolution {resolution}: must be more than {model.least}, which this UNet shrinks to a point.")
    return found


def network_module(name: str) -> Any:
    """The inner network module, by kohya's name.

    LyCORIS is told to use torch's own operations, unless the variable LYCORIS_KERNEL_BACKEND says otherwise.

    Raises:
        SPFError: it cannot be imported.
    """
    # On a GPU, LyCORIS 4.1 compiles and tunes kernels for every shape it meets: the first steps take minutes.
    os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
    try:
        return adapter.load_module(name)
    except SPFError as error:
        if not name.startswith("networks."):
            raise
        raise SPFError(
            f"{error.problems[0]}. {name} belongs to sd-scripts: start spf train in its Python environment, with its "
            f"folder in PYTHONPATH. Without --network, {DEFAULT_NETWORK} trains the same plain LoRA."
        ) from error


def _accelerator(settings: Settings) -> Any:
    from accelerate import Accelerator

    cpu = settings.device == "cpu" or (settings.device is None and not torch.cuda.is_available())
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SPFError("--device cuda: this PyTorch sees no CUDA GPU. Leave the option out to train on the CPU.")
    options: dict[str, Any] = {}
    if settings.log_dir is not None:
        options = {"log_with": "tensorboard", "project_dir": str(settings.log_dir)}
    try:
        accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=cpu, **options)
    except ValueError as error:
        raise SPFError(f"--mixed-precision {settings.mixed_precision} does not work here: {error}") from error
    if accelerator.num_processes > 1:
        raise SPFError("spf train uses one GPU. Start it without accelerate launch; sd-scripts trains on several.")
    if settings.log_dir is not None:
        if not accelerator.log_with:
            raise SPFError("--log-dir needs TensorBoard: pip install tensorboard")
        accelerator.init_trackers("spf")
    return accelerator


def _network(inner: Any, settings: Settings, model: BaseModel) -> nn.Module:
    """The inner network, not applied yet: a LoRA on the linear layers of the transformers."""
    alpha = settings.rank if settings.alpha is None else settings.alpha
    arguments = settings.full_network_args
    if settings.network == DEFAULT_NETWORK:
        arguments = {**arguments, "warn_on_unmatched": False}  # type: ignore[dict-item]
    with adapter.refusals(settings.network, settings.full_network_args):
        network: nn.Module = inner.create_network(1.0, settings.rank, alpha, model.vae, [], model.denoiser, **arguments)
    if settings.full_network_args.get("preset") == PLAIN_LORA["preset"] and settings.network == DEFAULT_NETWORK:
        adapter.select(network, model.adapted)  # the preset also names layers of the time, networks.lora does not
    return network
