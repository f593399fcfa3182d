"""`spf check`: what a training run will do, before it does it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spf_plugin.core.prompt import Kind
from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import expanded
from spf_plugin.hosts.kohya.scripts import SCRIPTS, named
from spf_plugin.hosts.musubi import scripts as musubi_scripts
from spf_plugin.tools.check.asking import Progress, at_hand
from spf_plugin.tools.check.captions import Described
from spf_plugin.tools.check.findings import LEVELS, Finding, some
from spf_plugin.tools.check.musubi import asking as musubi_asking
from spf_plugin.tools.check.musubi import run as musubi
from spf_plugin.tools.check.run import Report
from spf_plugin.tools.check.run import check as look
from spf_plugin.tools.check.source import parse_words
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.cli.progress import progress_bars

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_MARKS = {"error": "ERROR", "warning": "warning", "note": "note"}
_NAME = 16  # columns for an image's name on a narrow terminal
_WIDE = 100  # columns from which on the table has a column for every kind of part


def _range(positions: tuple[int, ...]) -> str:
    """`"8-9"`, `"8"`, `"1-2, 8-9"`, or `"cut off"`."""
    if not positions:
        return "cut off"
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _parts(row: Described) -> Text:
    """The base phrases of a prompt, each with its token positions."""
    text = Text()
    pairs = list(zip(row.prompt.phrases, row.full.phrases, strict=True))
    lost = sum(not positions for _, positions in pairs)
    for phrase, positions in pairs[: len(pairs) - lost] if lost > 1 else pairs:  # what is cut off is at the end
        if text:
            text.append(" | ", style="dim")
        text.append(phrase.replace("\ufeff", ""))
        text.append(f" {_range(positions)}", style="dim" if positions else "red")
    if lost > 1:
        text.append(f" | {lost} more phrases cut off", style="red")
    return text or Text("(nothing)", style="yellow")


def _target(row: Described) -> Text:
    if not row.prompt.has_target:
        return Text("none", style="yellow")
    text = Text(row.prompt.target, style="green")
    text.append(f" {_range(row.full.target)}", style="dim" if row.full.target else "red")
    replaced = [piece.text for piece in row.prompt.pieces if piece.kind is Kind.REPLACEMENT]
    return text.append(f" -> {', '.join(replaced)}", style="cyan") if replaced else text


def _captions(report: Report, rows: list[Described], width: int) -> Table:
    """The split of some prompts: which words are base, which the target, and at which tokens they lie."""
    about = "~ " if not report.tokenizer else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    wide = width >= _WIDE
    table.add_column("image", overflow="ellipsis", no_wrap=True, max_width=32 if wide else _NAME)
    table.add_column("base phrases, tokens", overflow="fold", ratio=None)
    table.add_column("target", overflow="fold", min_width=10)
    table.add_column("tokens", justify="right", no_wrap=True)
    for row in rows:
        name = row.name if wide else row.entry.path.stem
        if not wide and len(name) > _NAME:
            name = "…" + name[-_NAME + 1 :]  # names mostly differ at their end
        count = Text(f"{about}{row.tokens}", style="red" if row.cut else "")
        table.add_row(Text(name), _parts(row), _target(row), count)
    return table


def _findings(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        body = Text(finding.message)
        if finding.fix:
            body.append(f"\nfix: {finding.fix}", style="cyan")
        names = [name.split("/")[-1] for name in finding.images]
        if any(name not in finding.message for name in names[:3]):
            body.append(f"\nin: {some(names)}", style="dim")
        table.add_row(Text(_MARKS[finding.level], style=_STYLES[finding.level]), body)
    return table


def _chosen(report: Report, shown: int) -> list[Described]:
    """Which prompts to show: first those that errors and warnings name, then the others, in their order."""
    named = {name for finding in report.findings if finding.level != "note" for name in finding.images}
    rows = sorted(report.rows, key=lambda row: row.name not in named)
    chosen = rows if shown == 0 else rows[:shown]
    return [row for row in report.rows if row in chosen]


def _print(console: Console, report: Report, shown: int) -> None:
    rows = _chosen(report, shown)
    targets = " | ".join(map(str, report.targets))
    own = {str(value) for s in report.data.subsets if (value := s.custom_attributes.get("spf_target"))}
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("target", Text(" | ".join(filter(None, [targets, *sorted(own)])) or "none", style="green"))
    facts.add_row("images", f"{report.images} ({report.steps_per_epoch} an epoch, with repeats)")
    folders = some([Path(s.label).name + f" x{s.num_repeats}" for s in report.data.subsets], 4)
    facts.add_row("folders", escape(folders or "none"))
    source = escape(report.tokenizer) or "[yellow]none found: token numbers are estimates (--tokenizer DIR)[/yellow]"
    facts.add_row("data set", Text(report.read))
    facts.add_row("tokens", f"{report.limit} fit; tokenizer: {source}")
    parts: list[Table | Text] = [facts]
    if rows:
        parts.append(_captions(report, rows, console.width))
        hidden = len(report.rows) - len(rows)
        if hidden:
            parts.append(Text(f"... and {hidden} more (--images 0 shows all)\n", style="dim"))
    if report.findings:
        parts.append(_findings(report.findings))
    counts = [(level, sum(f.level == level for f in report.findings)) for level in LEVELS]
    said = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts if n)
    verdict = "this run would be wrong" if report.failed else "ready to train"
    parts.append(
        Text(f"\n{verdict}" + (f": {said}" if said else ""), style="bold red" if report.failed else "bold green")
    )
    console.print(Group(*parts), highlight=False)


def _look(words: list[str], target: str | None, tokenizer: Path | None, progress: Progress) -> Report:
    """By the trainer that the words name, or whose data set the file is."""
    script, other = named(words[0]), musubi_scripts.named(words[0])
    where = Path(words[0])
    if words[0].endswith(".py") and not (script or other):
        known = [each.file for each in (*SCRIPTS, *musubi_scripts.SCRIPTS)]
        name = words[0].replace("\\", "/").rsplit("/", 1)[-1]
        raise SPFError(
            f"{name} is no trainer of LoRAs that SPF knows{nearest(name, known) or '.'} Name one such as "
            "train_network.py, or leave it out."
        )
    words = words[1:] if script or other else words
    path = None if not words or words[0].startswith("--") else expanded(words[0])
    words = words[1:] if path else words
    if other or (script is None and path and musubi.is_data_set(path)):
        copy = musubi_asking.at_hand(where if other else None)
        return musubi.check(path, words, script=other, target=target, tokenizer=tokenizer, host=copy, progress=progress)
    options = parse_words(words, script)
    given = options.pop("config_file", None)
    if path is None and given:
        path = Path(given if str(given).endswith(".toml") else f"{given}.toml")  # as the host does
    if path and not os.path.exists(path):
        raise SPFError(f"{path}: there is no such file or folder. Relative paths begin in {Path.cwd()}.")
    host = at_hand(where if script else None)
    return look(path, options, script=script, target=target, tokenizer=tokenizer, host=host, progress=progress)


@app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}, no_args_is_help=True
)
def check(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SCRIPT] CONFIG [--OPTION VALUE]",
            help="The trainer, such as anima_train_network.py, where model and options do not tell it, and always for "
            "musubi-tuner's, such as zimage_train_network.py; the --config_file of the run, its --dataset_config, or a "
            "folder of images; then options as the trainer takes them, such as --train_data_dir, --network_args. They "
            "win.",
            show_default=False,
        ),
    ],
    target: Annotated[str | None, typer.Option(help="What the LoRA shall learn, in place of spf_target.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder's tokenizer.", show_default="searched")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="How many captions to show; 0 shows all.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with everything.")] = False,
) -> None:
    """Look at a run before it starts: how each caption is split, what is missing, and what would be learned by mistake.

    Reads what the trainer reads: by its own code where a copy of it is at hand (where the SCRIPT lies, in the working
    folder, or installed in this Python), else by a model of it; with musubi-tuner also the latents, texts and prompts
    that are cached. Start it where you start the training: relative paths begin there.

    Exit status: 0 the run can start (there may be warnings), 1 it would be wrong, 2 a file cannot be read.

    Example: spf check presets/sd15-8gb.toml --train_data_dir photos --target "blonde hair"
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with progress_bars(Console(stderr=True)) as show:
            report = _look(
                words,
                target,
                tokenizer,
                lambda what, done, total: show(what, done, total, {}) if errors.is_terminal else None,
            )
    except SPFError as error:
        errors.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(2) from None
    if as_json:
        say(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        _print(Console(), report, images)
    raise typer.Exit(int(report.failed))
