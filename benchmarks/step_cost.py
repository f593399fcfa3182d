"""What a training step costs: plain LoRA, SPF and the peers, side by side.

    python -m benchmarks.step_cost                        # FLOPs and tracked memory; needs no GPU and no download
    python -m benchmarks.step_cost --time --device cuda   # also wall time and the allocator's peak

Writes cost.json and cost.md into docs/, and the figures of `spf plan` into the package.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, TIMED, Record, timed, tracked
from spf_plugin.tools.cli.progress import progress_bars

ROOT = Path(__file__).parents[1]
DOCS, PLAN = ROOT / "docs", ROOT / "spf_plugin" / "tools" / "plan.json"
COMMAND = "python -m benchmarks.step_cost"


def environment(device: str) -> dict[str, str]:
    """Where the figures come from."""
    names = ("torch", "diffusers", "lycoris-lora", "bitsandbytes")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none (tensors without data)"
    return {"date": date.today().isoformat(), "python": platform.python_version(), "gpu": gpu} | {
        name: version(name) for name in names
    }


def write(path: Path, text: str) -> None:
    """Write aside, then replace."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_page() -> None:
    """docs/cost.md, from what was measured before."""
    stored = json.loads((DOCS / "cost.json").read_text(encoding="utf-8"))
    records = {record.key: record for record in map(Record.from_json, stored["records"])}
    page = report.markdown(records, stored["environment"], stored["timed_on"], stored["command"])
    write(DOCS / "cost.md", page)


def main(
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    only: Annotated[str, typer.Option(help="Only this model: sd1, sd2 or sdxl.")] = "",
    time: Annotated[bool, typer.Option("--time", help="Also run the steps for real and time them.")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    device: Annotated[str, typer.Option(help="Where to time: cuda, or cpu for small models.")] = "cuda",
) -> None:
    """Measure, print one table, and keep it."""
    if time and device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--time needs a CUDA GPU; this PyTorch sees none. Leave it out.")
    torch.set_num_threads(1)
    console = Console()
    console.width = max(console.width, 150)  # a wrapped table cannot be read
    kept = DOCS / "cost.json"
    records: dict[Any, Record] = {}
    stored: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() and not fresh else {}
    for values in stored.get("records", ()):
        record = Record.from_json(values)
        records[record.key] = record
    cases = [(setup, steps) for setup, steps in CASES if only in ("", setup.family)]
    todo = [(s, tuple(name for name in steps if (s, name) not in records)) for s, steps in cases]
    total = sum(len(steps) for _, steps in todo)
    tracked_on = environment("cpu") if total else stored["environment"]
    timed_on = environment(device) if time else stored.get("timed_on")

    def save() -> None:
        ordered = [records[s, name] for s, steps in CASES for name in steps if (s, name) in records]
        values = {
            "command": COMMAND,
            "environment": tracked_on,
            "timed_on": timed_on,
            "records": [record.as_json() for record in ordered],
        }
        write(kept, json.dumps(values, indent=1) + "\n")

    def publish() -> None:
        write(PLAN, json.dumps(report.plan_figures(records, COMMAND), indent=1) + "\n")
        write_page()

    done = 0
    with progress_bars(Console(stderr=True)) as progress:
        for setup, steps in todo:
            for record in tracked(setup, steps) if steps else ():
                records[record.key] = record
                done += 1
                progress("tracking", done, total, {})
                save()
        for setup, steps in TIMED if time else ():
            if only not in ("", setup.family):
                continue
            rounds = [0]

            def tick(rounds: list[int] = rounds, all_rounds: int = (pairs + 1) * len(steps)) -> None:
                rounds[0] += 1
                progress(report.title(setup), rounds[0], all_rounds, {})  # noqa: B023

            result = timed(type(setup)(**{**setup.__dict__, "device": device}), steps, pairs, tick)
            for name in steps:
                record = records[setup, name]
                record.seconds = result.median(name)
                record.ratio = result.ratio(name)
                record.gpu_peak = result.peaks.get(name)
            save()
    save()
    publish()
    console.print(report.table(records))


if __name__ == "__main__":
    typer.run(main)
