"""The lab's commands."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console

from portraitlab import environment
from portraitlab.captions import KNOWN, find_target
from portraitlab.lab import maps, plots, results, tables
from portraitlab.lab.rows import FORMER, LEARNING_RATE, ROWS
from portraitlab.lab.running import Bench, Point
from portraitlab.lab.tasks import DATA, Task
from portraitlab.model_files import MODEL_FOLDER
from spf_plugin.config import MAPS
from spf_plugin.errors import SPFError, nearest
from spf_plugin.tools.cli.progress import progress_bars

#: How the rows begin that vary a part of a method.
VARIANTS = ("spf-", "plain-")
#: But these are methods of their own.
METHODS = ("spf-published-paper", "spf-published-soft")
#: What runs within an hour on two CPU cores, with the other defaults.
SMALL = "plain,masked-prior-1,dop-10,spf"

Rows = Annotated[str, typer.Option(help="Rows with commas, or `all` but earlier defaults; `list` shows them.")]
Taught = Annotated[str, typer.Option(help=f"What is taught: {', '.join(KNOWN)}; two at once: NAME+NAME.")]
Seeds = Annotated[str, typer.Option(help="Training seeds with commas.")]
Steps = Annotated[int, typer.Option(min=4, help="Training steps.")]
Data = Annotated[str, typer.Option(help=f"Training pictures: {', '.join(DATA)}.")]
Prompts = Annotated[int, typer.Option(min=1, help="Held-out persons; each has two prompts.")]
EvaluationSeed = Annotated[int, typer.Option(min=0, help="Chooses the held-out persons.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Model = Annotated[Path, typer.Option(help="Model folder.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's own")]
OnlyTarget = Annotated[str | None, typer.Option(help="Only this target.", show_default="all")]
OnlyData = Annotated[str | None, typer.Option(help="Only these training pictures.", show_default="all")]
OnlyPrompts = Annotated[int | None, typer.Option(help="Only with so many persons.", show_default="all")]
OnlyEvaluationSeed = Annotated[int | None, typer.Option(help="Only with these persons.", show_default="all")]
OfBase = Annotated[str, typer.Option(help=f"Of this embedded model: {', '.join(results.BASES)}.")]
RUNS = Path("runs/lab")
PAGES = [
    results.PUBLISHED.with_name(name)
    for name in ("lab.md", "lab-dit.md", "lab-figures.md", "several-targets.md", "garment.md")
]
#: A table of the page: `spf lab table ... --markdown` in a comment, and what it prints.
BLOCK = re.compile(r"(?P<opening><!-- spf lab (?P<words>table .*?) -->).*?(?P<closing><!-- end -->)", re.DOTALL)

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
    for name in targets:
        try:
            find_target(name)
        except ValueError as error:
            problems.append(str(error))
    if data not in DATA:
        problems.append(f"--data {data!r}: choose one of {', '.join(DATA)}")
    if problems:
        raise SPFError(problems)


def _read(out: Path | None, base: str) -> list[results.Result]:
    """What was measured on one of the embedded models."""
    known = results.read(None if out is None else out / "results").values()
    return [result for result in known if result.base == base]


def _rows(text: str) -> list[str]:
    return [name for name in ROWS if not name.startswith(FORMER)] if text == "all" else text.split(",")


@contextmanager
def _bench(
    console: Console, out: Path, model: Path, device: str | None, threads: int | None, fresh: bool = False
) -> Iterator[Bench]:
    """A bench with progress bars; mistakes and Ctrl-C end the program in one line."""
    environment.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    try:
        with progress_bars(console) as show:
            yield Bench(out, model, device or ("cuda" if torch.cuda.is_available() else "cpu"), show, fresh)
    except SPFError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on", style="yellow")
        raise typer.Exit(130) from None


@app.command()
def run(
    rows: Rows = SMALL,
    target: Taught = "sunglasses",
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure here what docs/lab.jsonl has, too.")] = False,
) -> None:
    """Train and measure what is missing of these rows, and show them."""
    console = Console(soft_wrap=True)
    names = _rows(rows)
    with _bench(console, out, model, device, threads, fresh) as bench:
        _check(names, [target], data)
        task = Task(target, steps=steps, data=data, prompts=prompts, evaluation_seed=evaluation_seed)
        rates = _numbers(learning_rates, "--learning-rates", float)
        points = [Point(n, rate, seed) for seed in _numbers(seeds, "--seeds", int) for n in names for rate in rates]
        known = len(points) - len(bench.missing(task, points))
        console.print(f"{known} of {len(points)} LoRAs are measured already", highlight=False)
        bench.run(task, points)
    shown = {bench.key(task, point) for point in points} | {results.key(task, None, 0, 0, model)}
    found = [result for key, result in results.read(out / "results").items() if key in shown]
    title = f"{_words(task)}: mean over training seeds (standard error), drift x 1000"
    console.print(tables.terminal(*tables.rows(found), title, console.width))


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
        _check(_rows(rows), names, data)
        task = Task(names[0], steps=steps, data=data, prompts=prompts, evaluation_seed=evaluation_seed)
        for seed in _numbers(seeds, "--seeds", int):
            for row in _rows(rows):
                bench.run_sequence(task, names, Point(row, learning_rate, seed))
    found = _read(out, results.base_of(model))
    console.print(tables.terminal(*tables.sequences(found, tuple(names)), "drift x 1000", console.width))


@app.command("maps")
def map_quality(
    kinds: Annotated[str, typer.Option(help="Maps with commas.")] = ",".join(MAPS),
    row: Annotated[str, typer.Option(help="Whose LoRA and whose constants make the maps.")] = "plain",
    target: Taught = "sunglasses",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Of the LoRA.")] = LEARNING_RATE,
    seed: Annotated[int, typer.Option(help="Of the LoRA.")] = 0,
    pictures: Annotated[int, typer.Option(min=1, help="Training pictures to look at.")] = 8,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Every attention layer alone.")] = False,
    steps: Steps = 150,
    data: Data = "polluted",
    out: Out = RUNS,
    model: Model = MODEL_FOLDER,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, for the documentation.")] = False,
    threads: Threads = None,
) -> None:
    """Show how well each control map finds the target in training pictures, noise level by noise level."""
    console = Console(soft_wrap=True)
    with _bench(console, out, model, None, threads) as bench:
        _check([row], [target], data)
        task, point = Task(target, steps=steps, data=data), Point(row, learning_rate, seed)
        lora = bench.trained(task, point)
        config = ROWS["spf"].config(task)

        def report(done: int, total: int) -> None:
            bench.show("maps", done, total, {})

        with ROWS[row].in_effect():
            head, lines = maps.quality(task, lora, model, config, kinds.split(","), pictures, report, seed, by_layer)
    if markdown:
        print(tables.markdown(head, lines))
    else:
        console.print(tables.terminal(head, lines, f"maps of {row} at {learning_rate:g}: {target}", console.width))


@app.command("list")
def list_rows() -> None:
    """Show every row and its settings: SPF's without their prefix, constants as MODULE.NAME."""
    width = max(map(len, ROWS)) + 2
    for name, row in ROWS.items():
        steps = {} if row.steps is None else {"steps": row.steps}
        words = [f"{k}={v}" for k, v in {**row.spf, **row.options, **row.constants, **steps}.items()]
        print(f"{name:<{width}}{' '.join([*filter(None, (row.peer, row.variant)), *words])}".rstrip())


@app.command()
def table(
    at: Annotated[float | None, typer.Option(help="Compare at this response, from the sweeps.")] = None,
    taught: Annotated[bool, typer.Option("--sequences", help="The targets taught one after the other.")] = False,
    across: Annotated[bool, typer.Option("--across", help="One table: a line a row, a column a target.")] = False,
    together: Annotated[bool, typer.Option("--together", help="One table: a line a target and row.")] = False,
    beside: Annotated[
        str | None, typer.Option(help="Count the training sets in which this row measures less than the others.")
    ] = None,
    relative: Annotated[str | None, typer.Option(help="As --across, in units of what this row measures.")] = None,
    ranges: Annotated[
        str | None, typer.Option(help="As --relative: the lowest and highest of the training sets.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Other results beside the published ones: a folder's, or a .jsonl file's.")
    ] = None,
    target: OnlyTarget = None,
    data: OnlyData = None,
    prompts: OnlyPrompts = None,
    evaluation_seed: OnlyEvaluationSeed = None,
    base: OfBase = "unet",
    rows: Annotated[str | None, typer.Option(help="Only these rows.", show_default="all")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these training seeds.", show_default="all")] = None,
    columns: Annotated[str | None, typer.Option(help=f"Only these of {', '.join(tables.COLUMNS)}.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, for the documentation.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Only what docs/lab.jsonl has.")] = False,
    out: Out = RUNS,
) -> None:
    """Show everything measured so far (here, and for the documentation), a table a task."""
    console = Console(soft_wrap=True)
    asked_for = [] if columns is None else columns.split(",")
    measures = asked_for or list(tables.COMMON)
    unknown = [f"no column {name!r}{nearest(name, tables.COLUMNS)}" for name in measures if name not in tables.COLUMNS]
    known = _read(None if published or compare else out, base)
    known = [result for result in known if all(name in result.scores for name in asked_for)]
    names = {*ROWS, *(result.row for result in known)}  # earlier ones, which nobody can train any more, have results
    for option, name in (("--beside", beside), ("--relative", relative), ("--ranges", ranges)):
        if name is not None and name not in names:
            unknown.append(f"{option}: no row {name!r}{nearest(name, names)}")
    asked = [taught, across, together, *(option is not None for option in (at, beside, relative, ranges, compare))]
    if sum(asked) > 1:
        unknown.append(
            "--at, --sequences, --compare, --across, --together, --beside, --relative and --ranges are different "
            "tables: ask for one at a time"
        )
    if base not in results.BASES:
        unknown.append(f"--base {base!r}: choose one of {', '.join(results.BASES)}")
    sets: list[int] | None = None
    if seeds is not None:
        try:
            sets = _numbers(seeds, "--seeds", int)
        except SPFError as error:
            unknown += error.problems
    if compare is not None and not compare.exists():
        unknown.append(f"--compare: there is no file or folder {compare}")
    if unknown:
        console.print(str(SPFError(unknown)), style="red", markup=False, highlight=False)
        raise typer.Exit(2)
    chosen = None if rows is None else {*_rows(rows), "base", beside, relative, ranges}

    def wanted(r: results.Result) -> bool:
        return (chosen is None or r.row in chosen) and (sets is None or r.row == "base" or r.seed in sets)

    found = [r for r in known if wanted(r)]
    only = {"target": target, "data": data, "prompts": prompts, "evaluation_seed": evaluation_seed}
    if compare is not None:
        others = [r for r in results.stored(compare).values() if r.base == base and wanted(r)]
        shown = _compared(found, others, measures, only)
    elif across or together or beside or relative or ranges:
        shown = _across(found, together, beside, relative, ranges, measures, only)
    else:
        shown = _tables(found, at, taught, asked_for or None, only)
    for title, (head, lines) in shown:
        if markdown:
            print(f"{title}\n\n{tables.markdown(head, lines)}\n")
        else:
            console.print(tables.terminal(head, lines, title, console.width))


def _tables(
    found: list[results.Result], at: float | None, taught: bool, measures: list[str] | None, only: dict[str, Any]
) -> Iterator[tuple[str, tables.Cells]]:
    """Titles and tables."""
    every = results.tasks(found)
    if taught:
        sequences = {task.sequence for task in every} - {()}
        whole = [s for s in sequences if not any(o != s and o[: len(s)] == s for o in sequences)]
        for names in sorted(whole):
            same = next(task for task in every if task.sequence == names)
            how = _words(replace(same, target="", sequence=()))
            yield f"One after the other: {', '.join(names)}; drift x 1000; {how}.", tables.sequences(found, names)
        return
    for task in every:
        if task.sequence or not _chosen(task, only):
            continue
        group = [r for r in found if r.about(task)]
        if at is None:
            title = f"{_words(task)}: mean over training seeds (standard error), drift x 1000."
            yield title, tables.rows(group, measures)
        else:
            title = f"{_words(task)}: where the response is {at:g}, drift x 1000."
            yield title, tables.equal_response(group, at)


def _compared(
    found: list[results.Result], others: list[results.Result], measures: list[str], only: dict[str, Any]
) -> Iterator[tuple[str, tables.Cells]]:
    """A table for each way to measure that the others have."""
    for task in results.tasks(others):
        if _chosen(task, only):
            here, there = ([r for r in group if r.about(task)] for group in (found, others))
            yield f"{_words(task)}: published / other, drift x 1000.", tables.compared(here, there, measures)


def _across(
    found: list[results.Result],
    together: bool,
    beside: str | None,
    relative: str | None,
    ranges: str | None,
    measures: list[str],
    only: dict[str, Any],
) -> Iterator[tuple[str, tables.Cells]]:
    """One table over the targets of each way to measure them."""
    ways: dict[Task, dict[str, list[results.Result]]] = {}
    for task in results.tasks(found):
        if not task.sequence and _chosen(task, only):
            group = [r for r in found if r.about(task)]
            if any(r.row != "base" for r in group):  # alone, the untuned model is beside nothing
                ways.setdefault(replace(task, target=""), {})[task.target] = group
    named = " / ".join(tables.COLUMNS[measure][0] for measure in measures)
    for way, targets in ways.items():
        how = _words(way)
        if together:
            title = f"{how}: mean over training seeds (standard error), drift x 1000."
            yield title, tables.together(targets, measures)
        elif beside is not None:
            title = f"{named}: training sets in which {beside} measures less; {how}."
            yield title, tables.beside(targets, beside, measures)
        elif relative is not None:
            title = f"{named}, divided by {relative}'s on the same training set: mean (standard error); {how}."
            yield title, tables.relative(targets, relative, measures)
        elif ranges is not None:
            title = f"{named}, divided by {ranges}'s on the same training set: lowest to highest; {how}."
            yield title, tables.ranges(targets, ranges, measures)
        else:
            yield f"{named}: means over training seeds, drift x 1000; {how}.", tables.across(targets, measures)


def _chosen(task: Task, only: dict[str, Any]) -> bool:
    """Whether a task has these values, where one is given."""
    return all(value in (None, getattr(task, name)) for name, value in only.items())


@app.command()
def document() -> None:
    """Fill the tables of the lab's pages in docs/: each stands below the command that makes it."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page with what its commands print, from docs/lab.jsonl alone."""

    def run(words: str) -> str:
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            app([*shlex.split(words), "--published", "--markdown"], standalone_mode=False)
        return stream.getvalue()

    def block(match: re.Match[str]) -> str:
        return f"{match['opening']}\n\n{run(match['words']).strip()}\n\n{match['closing']}"

    return BLOCK.sub(block, text)


def _words(task: Task) -> str:
    return ", ".join(f"{name} {value}" for name, value in task.facts.items() if value != "")


@app.command()
def plot(
    target: OnlyTarget = None,
    data: OnlyData = None,
    prompts: OnlyPrompts = None,
    evaluation_seed: OnlyEvaluationSeed = None,
    base: OfBase = "unet",
    rows: Annotated[
        str | None, typer.Option(help="Only these rows.", show_default="the methods, without their variants")
    ] = None,
    into: Annotated[Path, typer.Option(help="Folder of the plots.")] = RUNS / "plots",
    out: Out = RUNS,
) -> None:
    """Draw response against drift, a curve a method, for every task with a sweep."""
    found = _read(out, base)
    methods = [name for name in ROWS if name in METHODS or not name.startswith(VARIANTS)]
    shown = methods if rows is None else _rows(rows)
    only = {"target": target, "data": data, "prompts": prompts, "evaluation_seed": evaluation_seed}
    into.mkdir(parents=True, exist_ok=True)
    prefix = "" if base == "unet" else f"{base}-"
    for task in results.tasks(found):
        if not _chosen(task, only):
            continue
        group = [r for r in found if r.about(task) and r.row in (*shown, "base")]
        drawing = plots.response_against_drift(group, task.goal.phrase)
        if drawing is not None:
            path = into / f"{prefix}{task.target}-{task.data}-{task.steps}-{task.prompts}-{task.evaluation_seed}.png"
            path.write_bytes(drawing)
            print(path)


@app.command()
def pictures(
    points: Annotated[str, typer.Option(help="Rows and learning rates: plain:2e-3,spf:4e-3.")],
    into: Annotated[Path, typer.Option(help="The PNG to write.")],
    target: Taught = "sunglasses",
    seed: Annotated[int, typer.Option(help="Training seed.")] = 0,
    data: Data = "polluted",
    out: Out = RUNS,
    model: Model = MODEL_FOLDER,
) -> None:
    """Show what measured LoRAs and the base model drew from the same seeds: explicit prompts above, partial below."""
    console = Console(soft_wrap=True)
    with _bench(console, out, model, "cpu", None) as bench:
        chosen = [(name, float(rate)) for name, _, rate in (point.partition(":") for point in points.split(","))]
        _check([name for name, _ in chosen], [target], data)
        task = Task(target, data=data)
        untuned = results.key(task, None, 0, 0, model)
        named = [("base model, prompts without the target", f"{untuned}-without"), ("base model, with it", untuned)]
        named += [(f"{n}, learning rate {rate:g}", bench.key(task, Point(n, rate, seed))) for n, rate in chosen]
        missing = [f"no pictures of {label}: run it first" for label, key in named if not bench.picture(key).exists()]
        if missing:
            raise SPFError(
                [*missing, "published figures have no pictures here: `spf lab run --fresh` draws theirs, too"]
            )
        lines = [(label, np.asarray(Image.open(bench.picture(key)))) for label, key in named]
        Image.fromarray(plots.labelled(lines)).save(into, optimize=True)
    print(into)


@app.command()
def publish(out: Out = RUNS) -> None:
    """Add everything measured here to docs/lab.jsonl, from which the documentation's tables are made."""
    found = results.read(out / "results")
    results.publish(found.values())
    print(f"{len(found)} results in {results.PUBLISHED}")
