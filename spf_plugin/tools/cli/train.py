"""`spf train`: a LoRA from a folder of images and captions, with SPF or without."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from spf_plugin.config import PREFIX, Read, read
from spf_plugin.errors import SPFError, collected
from spf_plugin.files import expanded
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.cli.lacking import lacking
from spf_plugin.tools.cli.numbers import finite
from spf_plugin.tools.cli.progress import progress_bars

INTERRUPTED = 130  # what shells report after Ctrl-C


class Mixed(str, Enum):
    """Precision of training."""

    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


class Saved(str, Enum):
    """Precision of the file."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Device(str, Enum):
    """Where to train."""

    cpu = "cpu"
    cuda = "cuda"


def key_values(words: list[str], option: str) -> dict[str, str]:
    """`KEY=VALUE` words as a dictionary.

    Raises:
        SPFError: a word has no `=`.
    """
    problems = [f"{option} {word!r}: write {option} KEY=VALUE" for word in words if "=" not in word]
    if problems:
        raise SPFError(problems)
    return dict(word.split("=", 1) for word in words)


def spf_settings(target: str | None, words: list[str], network: str, data: Path) -> Read:
    """SPF's settings from the command line."""
    problems: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        with collected(problems):
            given |= key_values([word], "--spf")
    given = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in given.items()}
    if target:
        given[PREFIX + "target"] = target
    found = read({PREFIX + "network": network, **given}, (Path(), data))
    return replace(found, problems=(*problems, *found.problems))


def train(
    model: Annotated[
        str, typer.Option(help="Base model: diffusers folder, hub name, or one .safetensors file (SD1.x, SD2.x, SDXL).")
    ],
    data: Annotated[Path, typer.Option(help="Folder of images with .txt captions; subfolders like 10_name repeat.")],
    out: Annotated[Path, typer.Option(help="The LoRA file to write, NAME.safetensors.")],
    target: Annotated[
        str | None, typer.Option(help="What the LoRA shall learn, as the captions say it. Several with |.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(min=0.0, callback=finite, help="LoRA alpha.", show_default="the rank")
    ] = None,
    lr: Annotated[float, typer.Option(min=0.0, callback=finite, help="Learning rate (AdamW, cosine to 0).")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 1,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Side length in pixels; images are resized and cropped.", show_default="the model's"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Everything random follows from it.")] = 0,
    mixed_precision: Annotated[Mixed, typer.Option(help="Precision of training.")] = Mixed.no,
    save_precision: Annotated[Saved, typer.Option(help="Precision of the file.")] = Saved.fp16,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    min_snr_gamma: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Min-SNR loss weighting, usually 5; 0 is off.")
    ] = 0.0,
    network: Annotated[str, typer.Option(help="Inner network module with kohya's create_network.")] = "lycoris.kohya",
    network_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of the inner network; repeatable.")
    ] = None,
    spf: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any spf_ setting (docs/settings.md); repeatable.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain LoRA, without SPF, for comparison.")] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Also save every N steps.", show_default="no")] = 0,
    log_dir: Annotated[Path | None, typer.Option(help="Write TensorBoard logs here.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to train.", show_default="GPU if there is one")] = None,
) -> None:
    """Train a LoRA for SD1.x, SD2.x or SDXL from a folder of images and captions.

    With a target, SPF keeps everything the target does not name as the base model has it. Ctrl-C saves what there is.

    Example: spf train --model sd15/ --data photos/ --out hair.safetensors --target "blonde hair" --steps 800
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        found = spf_settings(target, [] if plain else spf or [], network, data)
        faults = list(found.problems)
        arguments: dict[str, str] = {}
        for word in network_arg or []:
            with collected(faults):
                arguments |= key_values([word], "--network-arg")
        with console.status("starting"):
            from spf_plugin.trainer.loop import train as run
            from spf_plugin.trainer.settings import Settings
        settings = Settings(
            model=model,
            data=expanded(data),
            out=expanded(out),
            spf=None if plain else found.config,
            steps=steps,
            rank=rank,
            alpha=alpha,
            learning_rate=lr,
            batch_size=batch_size,
            resolution=resolution,
            seed=seed,
            mixed_precision=mixed_precision.value,
            save_precision=save_precision.value,
            gradient_checkpointing=gradient_checkpointing,
            min_snr_gamma=min_snr_gamma,
            network=network if plain else found.config.network,
            network_args=arguments,
            save_every=save_every,
            log_dir=log_dir,
            device=device.value if device else None,
        )
        with progress_bars(console) as progress:
            result = run(
                settings,
                progress,
                lambda text: console.print(f"note: {escape(text)}", highlight=False),
                faults=faults,
                wrong=found.wrong,
            )
    except ImportError as error:
        console.print(escape(lacking("spf train", error, "train")), style="red", highlight=False)
        raise typer.Exit(2) from None
    except SPFError as error:
        console.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; nothing was saved", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
    for note in result.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    if result.run is not None:
        console.print(f"what SPF did: {escape(result.run.problem or str(result.run))}", highlight=False)
    finished = result.steps == steps
    say(f"{'saved' if finished else f'stopped after {result.steps} of {steps} steps; saved'} {result.path}")
    if not finished:
        raise typer.Exit(INTERRUPTED)
