"""The lab's tables, for the terminal and for docs/lab.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from rich.console import Group
from rich.table import Table

from portraitlab.captions import find_target
from portraitlab.lab.curves import Mean, at_response, response
from portraitlab.lab.results import Result
from portraitlab.lab.rows import ROWS
from portraitlab.lab.tasks import Task

#: score -> column head, factor, number format
COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "response_explicit": ("response, explicit", 1, "{:.2f}"),
    "response_partial": ("partial", 1, "{:.2f}"),
    "leak": ("leak", 1, "{:.3f}"),
    "drift_explicit": ("drift, explicit", 1000, "{:.1f}"),
    "drift_partial": ("partial", 1000, "{:.1f}"),
    "reconstruction": ("base prompts", 1000, "{:.1f}"),
    "noise_drift": ("noise drift", 1000, "{:.1f}"),
    "attributes_explicit": ("attributes kept", 1, "{:.2f}"),
    "follows": ("follows", 1, "{:.2f}"),
    "uninvited": ("uninvited", 1, "{:.2f}"),
    "kid": ("KID", 1, "{:.2f}"),
    "clip": ("CLIP", 1, "{:.3f}"),
    "first_alone": ("first alone", 1, "{:.2f}"),
    "second_alone": ("second alone", 1, "{:.2f}"),
    "first_bled": ("first uninvited", 1, "{:.3f}"),
    "second_bled": ("second uninvited", 1, "{:.3f}"),
    "drift_alone": ("drift, one alone", 1000, "{:.1f}"),
}
Cells = tuple[list[str], list[list[str]]]
"""The head of a table and its lines."""
#: Of results of two targets at once alone.
AT_ONCE = ("first_alone", "second_alone", "first_bled", "second_bled", "drift_alone")
COMMON = tuple(name for name in COLUMNS if name not in AT_ONCE)
AT_RESPONSE = ("drift_explicit", "drift_partial", "leak", "reconstruction", "attributes_explicit", "uninvited")


def _said(mean: Mean | None, factor: float, form: str) -> str:
    if mean is None:
        return "not reached"
    text = form.format(mean.value * factor)
    return text + (f" ({form.format(mean.error * factor)})" if np.isfinite(mean.error) else "")


def by_row(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.row, []).append(result)
    order = ["base", *ROWS]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def rows(results: Sequence[Result], measures: Sequence[str] | None = None) -> Cells:
    """A line for every row and learning rate: mean over the training seeds (standard error).

    Args:
        results: of one task.
        measures: keys of `COLUMNS`; None: all that these results have.
    """
    if measures is None:
        measures = [name for name in COLUMNS if all(name in result.scores for result in results)]
    head = ["row", "learning rate", "seeds", *(COLUMNS[measure][0] for measure in measures)]
    lines = []
    for name, group in by_row(results).items():
        for rate in sorted({result.learning_rate for result in group}):
            point = [result for result in group if result.learning_rate == rate]
            cells = [
                _said(Mean.of([result.scores[measure] for result in point]), *COLUMNS[measure][1:])
                for measure in measures
            ]
            lines.append([name, f"{rate:g}" if name != "base" else "", str(len(point)), *cells])
    return head, lines


def equal_response(results: Sequence[Result], wanted: float) -> Cells:
    """A line for every method with a sweep: its measures where it responds `wanted`."""
    head = ["method", "seeds", "highest response", *(COLUMNS[m][0] for m in AT_RESPONSE)]
    lines = []
    for name, group in by_row(results).items():
        if name == "base":
            continue
        highest = max(
            Mean.of([response(r) for r in group if r.learning_rate == rate]).value
            for rate in {r.learning_rate for r in group}
        )
        cells = []
        for measure in AT_RESPONSE:
            found = at_response(group, measure, wanted)
            bound = found.bound.replace("<", ">") if measure == "attributes_explicit" else found.bound  # more is better
            text = bound + _said(found.mean, *COLUMNS[measure][1:])
            cells.append(text + (f", {found.missed} missed" if found.mean and found.missed else ""))
        lines.append([name, str(len({r.seed for r in group})), f"{highest:.2f}", *cells])
    return head, lines


def _at_one_rate(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Each row's LoRAs at the learning rate that has most seeds; at the lowest of several such."""
    found = {}
    for name, group in by_row(results).items():
        rates = [result.learning_rate for result in group]
        rate = max(sorted(set(rates)), key=rates.count)
        found[name] = [result for result in group if result.learning_rate == rate]
    return found


def _by_task(
    tasks: Mapping[str, Sequence[Result]], cell: Callable[[Mapping[str, Sequence[Result]], str], str]
) -> Cells:
    """A line for every row, a column for every task; `cell` gets the task's LoRAs by row, and the row."""
    found = {task: _at_one_rate(results) for task, results in tasks.items()}
    names = by_row(result for results in tasks.values() for result in results)
    return ["row", *found], [[name, *(cell(rows_of, name) for rows_of in found.values())] for name in names]


def across(tasks: Mapping[str, Sequence[Result]], measures: Sequence[str]) -> Cells:
    """A line for every row, a column for every task: the means of one or more measures.

    Args:
        tasks: name of a task -> its results.
        measures: keys of `COLUMNS`.
    """

    def cell(rows_of: Mapping[str, Sequence[Result]], name: str) -> str:
        if name not in rows_of:
            return ""
        means = [Mean.of([result.scores[m] for result in rows_of[name]]).value for m in measures]
        return " / ".join(COLUMNS[m][2].format(mean * COLUMNS[m][1]) for m, mean in zip(measures, means, strict=True))

    return _by_task(tasks, cell)


def together(tasks: Mapping[str, Sequence[Result]], measures: Sequence[str]) -> Cells:
    """A line for every task and row: mean over the training seeds (standard error), at one learning rate.

    Args:
        tasks: name of a task -> its results.
        measures: keys of `COLUMNS`.
    """
    head, _ = rows([], measures)
    lines = []
    for task, results in tasks.items():
        chosen = [result for group in _at_one_rate(results).values() for result in group]
        lines += [[task, *line] for line in rows(chosen, measures)[1]]
    return ["target", *head], lines


def beside(tasks: Mapping[str, Sequence[Result]], row: str, measures: Sequence[str]) -> Cells:
    """A line for every other row, a column for every task: in how many training sets `row` measures less.

    Args:
        tasks: name of a task -> its results.
        row: what the others are compared with, seed by seed.
        measures: keys of `COLUMNS`.
    """

    def cell(rows_of: Mapping[str, Sequence[Result]], name: str) -> str:
        ours, theirs = ({r.seed: r.scores for r in rows_of.get(n, ())} for n in (row, name))
        both = sorted(ours.keys() & theirs.keys())
        less = (sum(ours[seed][m] < theirs[seed][m] for seed in both) for m in measures)
        return f"{' / '.join(map(str, less))} of {len(both)}" if both else ""

    head, lines = _by_task(tasks, cell)
    return head, [line for line in lines if line[0] not in (row, "base")]


def _ratios(rows_of: Mapping[str, Sequence[Result]], name: str, row: str, measure: str) -> list[float]:
    """A measure of the LoRAs of a row, divided by that of `row` on the same training set, in the order of the sets.

    The untuned model has no set of its own: it is divided by every LoRA of `row`. By 0 nothing is.
    """
    units = {r.seed: r.scores[measure] for r in rows_of.get(row, ())}
    values = {r.seed: r.scores[measure] for r in rows_of.get(name, ())}
    if name == "base" and values:
        values = dict.fromkeys(units, next(iter(values.values())))
    return [values[seed] / units[seed] for seed in sorted(units.keys() & values.keys()) if units[seed]]


def relative(tasks: Mapping[str, Sequence[Result]], row: str, measures: Sequence[str]) -> Cells:
    """A line for every other row, a column for every task: its measures in units of those of `row`.

    The ratio is taken training set by training set; the mean over the sets (standard error).

    Args:
        tasks: name of a task -> its results.
        row: what the others are divided by.
        measures: keys of `COLUMNS`.
    """

    def cell(rows_of: Mapping[str, Sequence[Result]], name: str) -> str:
        found = (_ratios(rows_of, name, row, m) for m in measures)
        return " / ".join(_said(Mean.of(ratios), 1, "{:.2f}") for ratios in found if ratios)

    head, lines = _by_task(tasks, cell)
    return head, [line for line in lines if line[0] != row]


def ranges(tasks: Mapping[str, Sequence[Result]], row: str, measures: Sequence[str]) -> Cells:
    """A line for every other row, a column for every task and one for all: the lowest and highest ratio of the training
    sets, whose mean `relative` has.

    Args:
        tasks: name of a task -> its results.
        row: what the others are divided by.
        measures: keys of `COLUMNS`.
    """
    found = {task: _at_one_rate(results) for task, results in tasks.items()}
    names = [name for name in by_row(r for results in tasks.values() for r in results) if name != row]

    def cell(name: str, ways: Iterable[Mapping[str, Sequence[Result]]]) -> str:
        every = ([v for rows_of in ways for v in _ratios(rows_of, name, row, m)] for m in measures)
        return " / ".join(f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in every if ratios)

    lines = [[name, *(cell(name, [one]) for one in found.values()), cell(name, list(found.values()))] for name in names]
    return ["row", *found, "all"], lines


def compared(here: Sequence[Result], there: Sequence[Result], measures: Sequence[str]) -> Cells:
    """A line for every row and learning rate of `there`: the same LoRAs' means, `here / there`.

    Where `here` lacks a line's LoRAs, a dash stands for them. The last two lines are about all LoRAs that both have.

    Args:
        here: results.
        there: the same LoRAs trained and measured elsewhere.
        measures: keys of `COLUMNS`.
    """
    ours = {result.key: result.scores for result in here}
    head = ["row", "learning rate", "seeds", *(COLUMNS[measure][0] for measure in measures)]
    lines = []
    for name, group in by_row(there).items():
        for rate in sorted({result.learning_rate for result in group}):
            point = [result for result in group if result.learning_rate == rate]
            point = [result for result in point if result.key in ours] or point
            cells = []
            for measure in measures:
                _, factor, form = COLUMNS[measure]
                sides = ([ours[r.key][measure] for r in point if r.key in ours], [r.scores[measure] for r in point])
                cells.append(" / ".join(form.format(factor * Mean.of(s).value) if s else "-" for s in sides))
            lines.append([name, f"{rate:g}" if name != "base" else "", str(len(point)), *cells])
    both = [(ours[r.key], r.scores) for r in there if r.key in ours and r.row != "base"]
    if both:
        for name, summary in (("mean difference", np.mean), ("largest difference", np.max)):
            sizes = [(m, float(summary([abs(a[m] - b[m]) for a, b in both]))) for m in measures]
            lines.append([name, "", str(len(both)), *(COLUMNS[m][2].format(COLUMNS[m][1] * s) for m, s in sizes)])
    return head, lines


def sequences(results: Iterable[Result], taught: tuple[str, ...]) -> Cells:
    """A line for every row and length of a sequence: how each word taught so far responds, and what else changed.

    Targets with the same phrase are one word. Drift and reconstruction are those of the last target's prompts, against
    the untuned model.
    """
    measures = ("drift_explicit", "drift_partial", "reconstruction", "noise_drift", "leak", "uninvited")
    words = list(dict.fromkeys(find_target(name).phrase for name in taught))
    head = ["row", "after", "seeds", "response, all words", *words, *(COLUMNS[m][0] for m in measures)]
    lines = []
    for name, group in by_row(results).items():
        for count in range(1, len(taught) + 1):
            after = [r for r in group if Task.of(r.task).sequence == taught[:count]]
            if not after:
                continue
            seeds = sorted({r.seed for r in after})
            shows = {
                seed: {find_target(r.task["target"]).phrase: response(r) for r in after if r.seed == seed}
                for seed in seeds
            }
            each = [[shown[word] for shown in shows.values() if word in shown] for word in words]
            last = [r for r in after if r.task["target"] == taught[count - 1]]
            lines.append([
                name, f"{count}. {taught[count - 1]}", str(len(seeds)),
                _said(Mean.of([float(np.mean(list(shown.values()))) for shown in shows.values()]), 1, "{:.2f}"),
                *(f"{Mean.of(values).value:.2f}" if values else "" for values in each),
                *(_said(Mean.of([r.scores[m] for r in last]), *COLUMNS[m][1:]) for m in measures),
            ])  # fmt: skip
    return head, lines


def terminal(head: Sequence[str], lines: Sequence[Sequence[str]], title: str, width: int) -> Group:
    """For rich: as few tables below each other as `width` characters allow, each with the lines' names.

    Lines and columns change places where that takes fewer.
    """

    def parts(rows: Sequence[Sequence[str]]) -> list[list[int]]:
        """The columns of each table, but for the first one."""
        needed = [max(len(word) for word in (*name.split(), *cells)) + 3 for name, *cells in zip(*rows, strict=True)]
        found: list[list[int]] = [[]]
        for i in range(1, len(needed)):
            if found[-1] and needed[0] + sum(needed[k] for k in (*found[-1], i)) >= width:
                found.append([])
            found[-1].append(i)
        return found

    straight = [list(head), *map(list, lines)]
    turned = [list(cells) for cells in zip(*straight, strict=True)]
    chosen = min((straight, turned), key=lambda rows: len(parts(rows)))
    shown = []
    for i, columns in enumerate(parts(chosen)):
        table = Table(title=None if i else title, title_justify="left")
        for k in (0, *columns):
            table.add_column(chosen[0][k].replace(" ", "\n"), justify="right" if k else "left", no_wrap=True)
        for line in chosen[1:]:
            table.add_row(*(line[k] for k in (0, *columns)))
        shown.append(table)
    return Group(*shown)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """For docs/lab.md."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = [[f"`{line[0]}`", *line[1:]] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *cells])
