"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin import lora, terminal
from spf_plugin.adapter import bypass as adapter
from spf_plugin.adapter import quantised
from spf_plugin.errors import SPFError, collected
from spf_plugin.families import known as families
from spf_plugin.families.base import unwrapped
from spf_plugin.files import expanded
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.lorafile import writer
from spf_plugin.lorafile.record import KEY, Run
from spf_plugin.trainer import output
from spf_plugin.trainer.cache import Cached, Progress, cache_data, unreadable
from spf_plugin.trainer.data import Picture, check_targets, endless_batches, read_folder
from spf_plugin.trainer.models import BaseModel, load
from spf_plugin.trainer.settings import DEFAULT_NETWORK, DTYPES, PLAIN_LORA, Result, Settings

logger = terminal.logger(__name__)


class Trainer:
    """The steps of a run.

    Args:
        settings: the run.
        model: the base model, on its device.
        accelerator: accelerate's.
    """

    def __init__(self, settings: Settings, model: BaseModel, accelerator: Any):
        self.settings, self.model, self.accelerator = settings, model, accelerator
        self.shown: dict[str, float] = {}
        self.batch: Mapping[str, Any] | None = None
        self.weight_dtype = DTYPES[settings.mixed_precision]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's prediction for the present batch, `[B, C, h, w]`."""
        assert self.batch is not None
        call = self.model.call(noisy_latents.to(self.weight_dtype), timesteps, self.batch["text"], self.batch["sizes"])
        with self.accelerator.autocast():
            return unwrapped(call.on(self.model.denoiser))

    def generate_step_logs(self, loss: float, learning_rate: float) -> dict[str, float]:
        """The numbers of a step."""
        return {"loss": loss, "lr": learning_rate}

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The diffusion loss, min-SNR weighted if asked for; a scalar."""
        process = self.model.process
        target = process.target(latents, noise, timesteps)
        per_sample = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
        if self.settings.min_snr_gamma:
            per_sample = per_sample * process.min_snr(timesteps, self.settings.min_snr_gamma)
        return per_sample.mean()

    def run(
        self,
        network: nn.Module,
        cache: Cached,
        progress: Progress,
        every: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> tuple[int, list[dict[str, float]]]:
        """All steps, or as many as were made until `stopped()`. Returns their number and the history."""
        from diffusers.optimization import get_cosine_schedule_with_warmup

        settings, accelerator = self.settings, self.accelerator
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
        optimizer = accelerator.prepare(optimizer)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, settings.steps)
        random = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same on every device
        batches = endless_batches(cache.repeats, settings.batch_size, random)
        process = self.model.process
        history: list[dict[str, float]] = []
        log_every = settings.spf.log_every if settings.spf else 10
        for step in range(settings.steps):
            if stopped():
                return step, history
            batch = cache.batch(next(batches), accelerator.device)
            latents = batch["latents"]
            noise = torch.randn(latents.shape, generator=random).to(latents.device)
            timesteps = process.draw(len(latents), random).to(latents.device)
            noisy = process.noisy(latents, noise, timesteps)

            self.batch = batch
            prediction = self.predict(noisy, timesteps)
            loss = self.loss(prediction, latents, noise, timesteps)
            accelerator.backward(loss)
            value = float(loss.detach())  # after SPF, whose second step of a pair has no loss of its own to show
            if not math.isfinite(value):
                raise SPFError(
                    f"the loss is {value} at step {step + 1}: training has diverged. Use a lower --lr"
                    + (" or --mixed-precision bf16." if settings.mixed_precision == "fp16" else ".")
                )
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            if step % log_every == 0 or step == settings.steps - 1:
                logs = self.generate_step_logs(value, float(schedule.get_last_lr()[0]))
                history.append({"step": step, **logs})
                accelerator.log(logs, step=step)
            progress("training", step + 1, settings.steps, {"loss": value, **self.shown})
            every(step + 1)
        return settings.steps, history


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in the block only asks the loop to stop after its step; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def numbered(out: Path, step: int) -> Path:
    """kohya's name of a LoRA saved along the way: `NAME-step00000100.safetensors`."""
    return writer.renamed(out, f"-step{step:08d}{out.suffix}")


def _silent(*_: Any) -> None:
    pass


Attach = Callable[[nn.Module, Trainer], Callable[[], None]]
"""Attaches to a network that is created and not applied yet, and to its trainer; returns what detaches it."""


def train(
    settings: Settings,
    progress: Progress = _silent,
    warn: Callable[[str], None] = logger.warning,
    attach: Attach | None = None,
    faults: Sequence[str] = (),
    wrong: Collection[str] = (),
) -> Result:
    """Train a LoRA and save it.

    After Ctrl-C the weights so far are saved: to `settings.out`, or beside it if that file is an older one.

    Args:
        settings: the run.
        progress: called while images are encoded and after every step.
        warn: receives what the user should know and nothing stops for.
        attach: another objective, at the same seam; with `settings.spf` too, around SPF's.
        faults: what is known to be wrong already. Then nothing is trained, and everything else that is wrong is looked
            for.
        wrong: SPF's settings whose value is not known (`config.Read`).

    Raises:
        SPFError: with every mistake found, before training where it can be; existing files are left alone.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it misses an optional kernel, aloud
    problems = list(faults)
    if settings.save_precision not in DTYPES or settings.mixed_precision not in DTYPES:
        problems.append("the precision must be no, fp16 or bf16 (and fp16, bf16 or fp32 for the file).")
    inner = accelerator = model = cache = network = trainer = None
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
    attached = contextlib.ExitStack()
    try:
        if settings.spf is not None:
            attached.callback(lora.attach(network, ReferenceHost(trainer), settings.spf).spf.close)  # type: ignore
        if attach is not None:
            attached.callback(attach(network, trainer))
        network.apply_to([], model.denoiser, apply_text_encoder=False, apply_unet=True)  # type: ignore[operator]
        model.denoiser.to(accelerator.device)  # not before: `spf_base` has made it smaller
        network.to(accelerator.device).requires_grad_(True).train()
        dtype = DTYPES[settings.save_precision]
        output.check_space(settings.out, network, dtype)
        model.denoiser.train()
        if settings.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()

        def ran() -> Run | None:
            return None if settings.spf is None else trainer.spf.numbers.run()  # type: ignore[attr-defined]

        def write(path: Path, steps: int, card: bool = False) -> list[str]:
            metadata = _metadata(settings, path, model, resolution, steps, sum(cache.repeats), ran())
            return output.save(path, network, metadata, dtype, paths=paths, card=card)

        def every(step: int) -> None:
            if settings.save_every and step % settings.save_every == 0 and step < settings.steps:
                write(numbered(settings.out, step), step)

        with interruptible() as stopped:
            steps, history = trainer.run(network, cache, progress, every, stopped)
            if steps == 0:
                raise KeyboardInterrupt
            path = settings.out
            if steps < settings.steps and path.exists():
                path = numbered(path, steps)
            notes = write(path, steps, card=True)
        attached.close()  # the last one first; SPF's own end would take its patches away from below the other's
        accelerator.end_training()
    except torch.cuda.OutOfMemoryError as error:
        raise SPFError(
            "the GPU is out of memory. Use --gradient-checkpointing, --mixed-precision bf16, a smaller --batch-size or "
            "a smaller --resolution."
        ) from error
    finally:
        attached.close()
    return Result(path, steps, history, notes, ran())


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


def _metadata(
    settings: Settings, path: Path, model: BaseModel, resolution: int, steps: int, images: int, run: Run | None
) -> dict[str, str]:
    arguments: dict[str, str] = settings.full_network_args
    ours = {**(settings.spf.to_metadata() if settings.spf else {}), **({} if run is None else {KEY: run.as_json()})}
    plain = settings.network == DEFAULT_NETWORK and arguments == PLAIN_LORA
    return output.kohya_metadata(
        out=path,
        model_name=settings.model,
        family=model.family,
        prediction=model.process.prediction,
        # What the file is, for whoever reads it: a plain LoRA is the same from either module.
        network="networks.lora" if plain else settings.network,
        network_args={**({} if plain else arguments), **ours},
        rank=settings.rank,
        alpha=settings.rank if settings.alpha is None else settings.alpha,
        learning_rate=settings.learning_rate,
        steps=steps,
        planned_steps=settings.steps,
        batch_size=settings.batch_size,
        resolution=resolution,
        seed=settings.seed,
        images=images,
        mixed_precision=settings.mixed_precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        min_snr_gamma=settings.min_snr_gamma,
    )
