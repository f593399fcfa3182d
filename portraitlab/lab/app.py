"""The lab's commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from portraitlab import environment
from portraitlab.captions import REPLACEMENTS, TARGETS
from portraitlab.lab import plots, results, tables
from portraitlab.lab.rows import LEARNING_RATE, ROWS
from portraitlab.lab.running import Bench, Point
from portraitlab.lab.tasks import DATA, Task
from portraitlab.model_files import MODEL_FOLDER
from spf_plugin.cli.progress import progress_bars
from spf_plugin.errors import SPFError, nearest

KNOWN = (*TARGETS, *REPLACEMENTS)
#: What runs within an hour on two CPU cores, with the other defaults.
SMALL = "plain,masked-prior-1,dop-10,spf"

Rows = Annotated[str, typer.Option(help="Rows with commas; `list` shows them all.")]
Seeds = Annotated[str, typer.Option(help="Training seeds with commas.")]
Steps = Annotated[int, typer.Option(min=4, help="Training steps.")]
Data = Annotated[str, typer.Option(help=f"Training pictures: {', '.join(DATA)}.")]
Prompts = Annotated[int, typer.Option(min=1, help="Held-out persons; each has two prompts.")]
EvaluationSeed = Annotated[int, typer.Option(min=0, help="Chooses the held-out persons.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Model = Annotated[Path, typer.Option(help="Model folder.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's own")]
RUNS = Path("runs/lab")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure semantic pollution on the embedded model, method by method.",
)


def _numbers(text: str, option: str, convert: Callable[[str], Any]) -> list[Any]:
    try:
        return [convert(word) for word in text.split(",")]
    except ValueError:
        raise SPFError(f"{option} {text!r}: write numbers with commas.") from None


def _check(rows: list[str], targets: list[str], data: str) -> None:
    problems = [f"no row {name!r}{nearest(name, ROWS)}" for name in rows if name not in ROWS]
    problems += [f"no target {name!r}: choose from {', '.join(KNOWN)}" for name in targets if name not in KNOWN]
    if data not in DATA:
        problems.append(f"--data {data!r}: choose one of {', '.join(DATA)}")
    if problems:
        raise SPFError(problems)


@contextmanager
def _bench(console: Console, out: Path, model: Path, device: str | None, threads: int | None) -> Iterator[Bench]:
    """A bench with progress bars; mistakes and Ctrl-C end the program in one line."""
    environment.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    try:
        with progress_bars(console) as show:
            yield Bench(out, model, device or ("cuda" if torch.cuda.is_available() else "cpu"), show)
    except SPFError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on", style="yellow")
        raise typer.Exit(130) from None


@app.command()
def run(
    rows: Rows = SMALL,
    target: Annotated[str, typer.Option(help=f"What is taught: {', '.join(KNOWN)}.")] = "sunglasses",
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", "--lr", help="The sweep, with commas: a method's curve.")
    ] = f"{LEARNING_RATE:g}",
    seeds: Seeds = "0,1,2",
    steps: Steps = 150,
    data: Data = "polluted",
    prompts: Prompts = 24,
    evaluation_seed: EvaluationSeed = 0,
    out: Out = RUNS,
    model: Model = MODEL_FOLDER,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train and measure what is missing of these rows, and show them."""
    console = Console(soft_wrap=True)
    names = rows.split(",")
    with _bench(console, out, model, device, threads) as bench:
        _check(names, [target], data)
        task = Task(target, steps=steps, data=data, prompts=prompts, evaluation_seed=evaluation_seed)
        rates = _numbers(learning_rates, "--learning-rates", float)
        points = [Point(n, rate, seed) for seed in _numbers(seeds, "--seeds", int) for n in names for rate in rates]
        known = len(points) - len(bench.missing(task, points))
        console.print(f"{known} of {len(points)} LoRAs are measured already", highlight=False)
        bench.run(task, points)
    found = [r for r in results.read(out / "results").values() if r.about(task) and r.row in (*names, "base")]
    _show(console, task, *tables.rows(found), "mean over training seeds (standard error); drift x1000")


@app.command()
def sequence(
    targets: Annotated[str, typer.Option(help="Targets with commas, in the order of teaching.")],
    rows: Rows = "plain,spf",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Of every LoRA.")] = LEARNING_RATE,
    seeds: Seeds = "0",
    steps: Steps = 150,
    data: Data = "polluted",
    prompts: Prompts = 12,
    evaluation_seed: EvaluationSeed = 0,
    out: Out = RUNS,
    model: Model = MODEL_FOLDER,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Teach several targets one after the other, each LoRA merged before the next, and measure all after each."""
    console = Console(soft_wrap=True)
    names = targets.split(",")
    with _bench(console, out, model, device, threads) as bench:
        _check(rows.split(","), names, data)
        task = Task(names[0], steps=steps, data=data, prompts=prompts, evaluation_seed=evaluation_seed)
        for seed in _numbers(seeds, "--seeds", int):
            for row in rows.split(","):
                bench.run_sequence(task, names, Point(row, learning_rate, seed))
    found = list(results.read(out / "results").values())
    _show(console, None, *tables.sequences(found, tuple(names)), "after each target")


@app.command("list")
def list_rows() -> None:
    """Show every row and its settings."""
    for name, row in ROWS.items():
        words = [f"{k}={v}" for k, v in {**row.spf, **row.options}.items()]
        print(f"{name:<28}{' '.join([*([row.peer] if row.peer else []), *words])}")


@app.command()
def table(
    at: Annotated[float | None, typer.Option(help="Compare at this response, from the sweeps.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, for the documentation.")] = False,
    target: Annotated[str | None, typer.Option(help="Only tasks with this target.")] = None,
    out: Out = RUNS,
) -> None:
    """Show everything measured so far (here, and for the documentation), a table a task."""
    console = Console(soft_wrap=True)
    found = list(results.read(out / "results").values())
    for task in results.tasks(found):
        if task.sequence or target not in (None, task.target):
            continue
        group = [r for r in found if r.about(task)]
        head, lines = tables.rows(group) if at is None else tables.equal_response(group, at)
        title = "mean over training seeds (standard error)" if at is None else f"where the response is {at:g}"
        if markdown:
            print(f"{_words(task)}; {title}; drift x1000\n\n{tables.markdown(head, lines)}\n")
        else:
            _show(console, task, head, lines, f"{title}; drift x1000")
    sequences = {task.sequence for task in results.tasks(found)} - {()}
    whole = [s for s in sequences if not any(o != s and o[: len(s)] == s for o in sequences)]
    for taught in sorted(whole) if at is None and target is None else ():
        head, lines = tables.sequences(found, taught)
        title = f"one after the other: {', '.join(taught)}"
        if markdown:
            print(f"{title}\n\n{tables.markdown(head, lines)}\n")
        else:
            _show(console, None, head, lines, title)


def _words(task: Task) -> str:
    return "  ".join(f"{name}={value}" for name, value in task.facts.items())


def _show(console: Console, task: Task | None, head: list[str], lines: list[list[str]], title: str) -> None:
    if task is not None:
        console.print(_words(task), highlight=False)
    console.print(tables.terminal(head, lines, title, console.width))


@app.command()
def plot(
    rows: Annotated[str | None, typer.Option(help="Only these rows.", show_default="all")] = None,
    into: Annotated[Path, typer.Option(help="Folder of the plots.")] = RUNS / "plots",
    out: Out = RUNS,
) -> None:
    """Draw response against drift, a curve a method, for every task with a sweep."""
    found = list(results.read(out / "results").values())
    chosen = None if rows is None else {*rows.split(","), "base"}
    into.mkdir(parents=True, exist_ok=True)
    for task in results.tasks(found):
        group = [r for r in found if r.about(task) and (chosen is None or r.row in chosen)]
        drawing = plots.response_against_drift(group, task.goal.phrase)
        if drawing is not None:
            path = into / f"{task.target}-{task.data}-{task.steps}-{task.prompts}-{task.evaluation_seed}.png"
            path.write_bytes(drawing)
            print(path)


@app.command()
def publish(out: Out = RUNS) -> None:
    """Add everything measured here to docs/lab.jsonl, from which the documentation's tables are made."""
    found = results.read(out / "results")
    results.publish(found.values())
    print(f"{len(found)} results in {results.PUBLISHED}")
