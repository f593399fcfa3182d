"""`spf cache-prompts`: encode what SPF needs of a musubi-tuner data set, beside the trainer's own cached text."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from spf_plugin.config import read_targets
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.hosts.musubi.architectures import NAMES, named
from spf_plugin.tools.cli.console import Console
from spf_plugin.tools.cli.progress import progress_bars

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
Arch = Enum("Arch", {name: name for name in NAMES}, type=str)  # type: ignore[misc]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cache_prompts(
    context: typer.Context,
    arch: Annotated[Arch, typer.Option(help="The model that will be trained.")],
    target: Annotated[str, typer.Option(help="spf_target of the training, as the captions say it. Several with |.")],
) -> None:
    """Encode the prompts that SPF compares with, for a data set of musubi-tuner.

    All other options are those of the trainer's own script that caches text for this model: --dataset_config, those
    that name its text encoder, and --device and --keep_cache if wanted. Run it in the trainer's environment, after that
    script. What is current is left alone, so it can be stopped and started again.

    Exit status: 0 all prompts are there, 2 something is wrong with the data set or the options.
    """
    console = Console(soft_wrap=True)
    try:
        encoded, current, removed = encode(arch.value, _targets(target), context.args, console)
    except SPFError as problem:
        console.print(escape(str(problem)), style="red", highlight=False)
        raise typer.Exit(2) from None
    console.print(f"prompts of {encoded} items encoded, of {current} current already", highlight=False)
    for path in removed:
        console.print(f"removed {escape(path)}, whose cached text is gone", highlight=False)


def _targets(text: str) -> tuple[Target, ...]:
    try:
        return read_targets(text)
    except ValueError as error:
        raise SPFError(f"--target {text!r} {error}") from None


def encode(
    name: str, targets: tuple[Target, ...], words: list[str], console: Console
) -> tuple[int, int, tuple[str, ...]]:
    """Encode; returns how many items were encoded, how many were current, and the files that were removed.

    Args:
        name: of the architecture.
        targets: the target phrases.
        words: options of the host's own script.
        console: for progress.

    Raises:
        SPFError: with every item whose prompts could not be made; all others are written.
    """
    from torch import nn

    from spf_plugin.families import known
    from spf_plugin.hosts.musubi import caching

    architecture = named(name)
    source = Path("src").absolute()
    if (source / "musubi_tuner").is_dir():  # in the folder of a musubi-tuner that is not installed
        sys.path.append(str(source))
    try:
        parser = caching.parser(architecture)
    except ImportError as error:
        raise SPFError(
            f"musubi-tuner cannot be imported here: {error}. Run this in the Python environment that trains, and in "
            "musubi-tuner's folder where it is not installed there."
        ) from error
    parser.prog = f"spf cache-prompts --arch {name}"
    args = parser.parse_args(words)
    family = known.named(architecture.family)(nn.Module())
    with progress_bars(console) as show:
        done = caching.run(
            architecture, family, targets, args, lambda done, total: show("encoding prompts", done, total, {})
        )
    return done.encoded, done.current, done.removed
