"""`spf plan`: whether a preset fits into a card, before anything is downloaded."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from spf_plugin.errors import SPFError
from spf_plugin.files import expanded
from spf_plugin.hosts.kohya import scripts
from spf_plugin.tools import plan as planning
from spf_plugin.tools import plan_musubi
from spf_plugin.tools import preset as presets
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.cli.numbers import finite
from spf_plugin.tools.plan import GIB, Prediction, Run, gib

DOES_NOT_FIT, MISTAKE = 1, 2


_MODELS = {**scripts.MODELS, **{name: model.said for name, model in plan_musubi.MODELS.items()}}
Model = Enum("Model", {name: name for name in _MODELS}, type=str)  # type: ignore[misc]


def _print(console: Console, run: Run, found: Prediction, notes: list[str]) -> None:
    clip = f", {planning.video_frames(run.frames)} frames" if run.frames > 1 else ""
    console.print(
        f"{_MODELS[run.model]}, {run.width}x{run.height}{clip}, batch {run.batch}, rank {run.rank}, "
        f"{run.optimizer}, checkpointing {'on' if run.checkpointing else 'off'}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size in found.parts.items():
        table.add_row(name, gib(size) if size >= GIB / 10 else f"{size / 2**20:.0f} MB")
    table.add_row("[bold]peak on the card[/bold]", f"[bold]{gib(found.peak)}[/bold]")
    console.print(table)
    console.print(f"time      about {found.flop_ratio:.2f}x a plain LoRA (by FLOPs)")
    console.print(f"LoRA file {found.file_bytes / 1e6:.0f} MB")
    for note in [*notes, f"Memory is {planning.BASIS}."]:
        console.print(f"note: {escape(note)}", style="dim")


def plan(
    preset: Annotated[Path, typer.Argument(help="The run's --config_file, such as presets/sdxl-12gb.toml.")],
    vram: Annotated[
        float | None,
        typer.Option(min=1.0, max=1e6, callback=finite, help="The card's memory in GB.", show_default="none"),
    ] = None,
    model: Annotated[Model | None, typer.Option(help="Base model.", show_default="found or guessed")] = None,
    dataset_config: Annotated[
        Path | None,
        typer.Option("--dataset_config", metavar="FILE", help="musubi-tuner's data set.", show_default="the preset's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict peak VRAM, time and file size of a run from its settings.

    Exit status 0: it fits (or no --vram was given); 1: it does not, and what to change is printed; 2: a mistake.

    Example: spf plan presets/sdxl-8gb.toml --vram 8
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        data = expanded(dataset_config) if dataset_config else None
        run, notes = presets.read(expanded(preset), model.value if model else None, data)
    except SPFError as error:
        errors.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(MISTAKE) from None
    found = planning.predict(run)
    limit = None if vram is None else int(vram * GIB)
    fits = None if limit is None else planning.fits(run, limit)
    steps = planning.changes(run, limit) if limit is not None and not fits else []
    enough = not steps or limit is None or steps[-1].peak <= limit
    if as_json:
        values = {
            "fits": fits,
            "model": run.model,
            "vram_gb": vram,
            "peak_gb": round(found.peak / GIB, 2),
            "parts_gb": {name: round(size / GIB, 3) for name, size in found.parts.items()},
            "flop_ratio": round(found.flop_ratio, 3),
            "file_mb": round(found.file_bytes / 1e6, 1),
            "changes": [{"setting": c.setting, "peak_gb": round(c.peak / GIB, 2)} for c in steps],
            "enough": enough,
            "notes": notes,
            "basis": planning.BASIS,
        }
        say(json.dumps(values, indent=1))
        raise typer.Exit(DOES_NOT_FIT if fits is False else 0)
    console = Console(soft_wrap=True, highlight=False)
    _print(console, run, found, notes)
    if fits is None:
        sizes = ", ".join(f"{size} GB" for size in planning.cards(run))
        console.print(f"fits cards with {sizes}" if sizes else "fits no usual card", style="bold")
    elif fits:
        console.print(f"fits into {vram:g} GB, {gib(limit - found.peak)} to spare", style="bold green")  # type: ignore[operator]
    else:
        reason = "" if run.fused_attention else " as it is: without sdpa attention alone may need more than all of this"
        console.print(f"does not fit into {vram:g} GB{reason}. Change, in this order:", style="bold red")
        for change in steps:
            console.print(f"  {change.setting}  -> {gib(change.peak)}", markup=False)
        if not enough:
            console.print("and even that is not enough for this card.", style="bold red")
        raise typer.Exit(DOES_NOT_FIT)
