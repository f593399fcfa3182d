"""`spf doctor`: one page about this machine, to paste into a bug report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spf_plugin.files import expanded
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.doctor import Doctor, examine

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
_GIB = 1024**3
_LABEL = 14  # columns


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _gpu(found: Doctor) -> list[tuple[str, str]]:
    facts = found.torch
    if not facts:
        return [("GPU", "unknown: torch cannot be asked")]
    build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "ROCm" if facts["hip_build"] else "CPU only"
    rows = [("torch build", build), ("CUDA available", _yes(facts["cuda"]))]
    for i, (name, free, total, capability) in enumerate(facts["devices"]):
        rows.append((f"GPU {i}", f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, capability {capability}"))
    if facts["cuda"]:
        rows.append(("bf16", _yes(facts.get("bf16"))))
    return rows


def _attention(found: Doctor) -> str:
    """Which attention a run can ask for."""
    ways = []
    if found.torch.get("sdpa"):
        ways.append(f"--sdpa ({', '.join(found.torch['attention'])})")
    xformers = found.package("xformers")
    if xformers.version and not xformers.error:
        ways.append(f"--xformers ({xformers.version})")
    return "; ".join(ways) or "neither --sdpa nor --xformers"


def _sections(found: Doctor) -> dict[str, list[tuple[str, str]]]:
    sections = {
        "system": [*found.system.items()],
        "packages": [(package.name, package.state) for package in found.packages],
        "GPU and attention": [*_gpu(found), ("attention", _attention(found))],
        "free disk": [(what, f"{free / _GIB:.1f} GiB ({folder})") for what, folder, free in found.disks],
    }
    if found.host or found.host_version:
        sections[found.host_name] = [("release", found.host_version), *found.host.items()]
    sections["problems"] = [(str(i), text) for i, text in enumerate(found.problems, 1)] or [("none", "")]
    return sections


@app.command()
def doctor(
    sd_scripts: Annotated[
        Path | None, typer.Option("--sd-scripts", metavar="DIR", help="Look at this copy of sd-scripts too.")
    ] = None,
    musubi_tuner: Annotated[
        Path | None, typer.Option("--musubi-tuner", metavar="DIR", help="Look at this copy of musubi-tuner too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is installed here, whether it works, and whether the trainer fits. Paste the page into a bug report.

    Run it in the Python environment that trains. Nothing is sent anywhere; user names in paths are left out.

    Exit status: 0 nothing stands against a run, 1 something does.
    """
    if sd_scripts and musubi_tuner:
        raise typer.BadParameter("--sd-scripts and --musubi-tuner have environments of their own: look at one in each")
    folder = sd_scripts or musubi_tuner
    with Console(stderr=True).status("looking") as status:
        found = examine(
            expanded(folder) if folder else None,
            lambda what: status.update(f"looking at {escape(what)}"),
            name="musubi-tuner" if musubi_tuner else "sd-scripts",
        )
    if as_json:
        say(json.dumps(found.as_json(), indent=2))
    else:
        console = Console()
        console.print(f"[bold]SPF {found.plugin}[/bold]", highlight=False)
        for title, rows in _sections(found).items():
            console.print(f"\n[bold]{title}[/bold]", highlight=False)
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(no_wrap=True, min_width=_LABEL)
            table.add_column(overflow="fold")
            for label, value in rows:
                style = "red" if title == "problems" and value else "red" if "cannot be imported" in value else ""
                table.add_row(Text(label, style="dim"), Text(value, style=style))
            console.print(table, highlight=False)
    raise typer.Exit(int(bool(found.problems)))
