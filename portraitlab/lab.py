"""The lab: one row is one way to train, run for some seeds and measured. `python -m portraitlab.lab --help`.

A row's result depends on its settings, the model and the task only, and is kept under a name made of them: a second run
computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from portraitlab import demo, environment
from portraitlab.autoencoder import to_tensor
from portraitlab.captions import TARGETS
from portraitlab.customisation import EvaluationPrompt, evaluation_prompts, write_set
from portraitlab.judge import Judge, load_judge, predict
from portraitlab.measure import score, untouched_region
from portraitlab.model_files import CLIP_FOLDERS, JUDGE_FILE, MODEL_FOLDER
from spf_plugin import clip
from spf_plugin.cli.progress import progress_bars
from spf_plugin.config import PREFIX, SPFConfig, parse
from spf_plugin.errors import SPFError, nearest

GUIDED = {"clip": str(CLIP_FOLDERS[0])}


@dataclass(frozen=True)
class Row:
    """A way to train: SPF settings (without the prefix) and what differs from the demo's training run."""

    spf: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


def _without(*terms: str) -> Row:
    return Row({f"{term}_multiplier": 0 for term in terms})


PLAIN = {"text_consistent_multiplier": 0, "fine_grained_multiplier": 0, "output_multiplier": 0, "base_preservation": 0}
ROWS: dict[str, Row] = {
    "plain": Row(PLAIN),
    **{f"plain-{steps}": Row(PLAIN, {"steps": steps}) for steps in (25, 50, 100)},
    "spf": Row({}),
    "spf-100": Row({}, {"steps": 100}),
    "spf-400": Row({}, {"steps": 400}),
    # Beside spf-every-1:
    "spf-anchor": Row({"every": 1, "response": "anchor", **GUIDED}),
    "spf-directional": Row({"every": 1, "response": "directional", **GUIDED}),
    "spf-every-1": Row({"every": 1}),
    "spf-every-4": Row({"every": 4}),
    "spf-stage2-0": Row({"stage2_start": 0}),
    "spf-stage2-0.5": Row({"stage2_start": 0.5}),
    "spf-no-text-consistent": _without("text_consistent"),
    "spf-no-fine-grained": _without("fine_grained"),
    "spf-no-output": _without("output"),
    "spf-no-base-preservation": Row({"base_preservation": 0}),
    **{f"spf-map-{kind}": Row({"map": kind}) for kind in ("paper", "difference", "target", "hard", "none")},
    "spf-cross-attention": Row({"train": "cross_attention"}),
    "plain-cross-attention": Row({**PLAIN, "train": "cross_attention"}),
}

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train and measure rows on the embedded model.")


@dataclass(frozen=True)
class Task:
    """What is taught and how it is judged; everything random follows from the training seed and from here."""

    target: str = "blonde"
    steps: int = 200
    prompts: int = 12
    clean: bool = False
    evaluation_seed: int = 0


def settings(task: Task, row: Row) -> SPFConfig:
    """The SPF settings of a row, defaults included."""
    words = {PREFIX + name: value for name, value in row.spf.items()}
    return parse({PREFIX + "target": TARGETS[task.target].phrase, PREFIX + "network": "lycoris.kohya", **words})


def key(task: Task, row: Row, seed: int, model: Path) -> str:
    """A name for a result, made of all that it depends on."""
    weights = hashlib.sha256((model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    here = str(MODEL_FOLDER.parent)  # the same result under another path
    spf = {name: value.replace(here, "") for name, value in settings(task, row).to_metadata().items()}
    facts = [vars(task), spf, dict(row.training), seed, weights]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Measuring:
    """The evaluation prompts of a task, the base model's images for them, and what reads images.

    Args:
        task: the task.
        model: folder of the base model.
        show: progress.
    """

    def __init__(self, task: Task, model: Path, show: demo.Show):
        self.goal, self.model, self.show = TARGETS[task.target], model, show
        self.prompts: list[EvaluationPrompt] = evaluation_prompts(
            task.target, count=task.prompts, seed=task.evaluation_seed
        )
        self.judge: Judge = load_judge(JUDGE_FILE)
        self.scorer = clip.load(str(CLIP_FOLDERS[1]))
        self.untouched = untouched_region(self.goal)
        self.base_without, self.base_with = self.draw(None, "base")
        self.seen_base = predict(self.judge, self.base_without)

    def draw(self, lora: Path | None, label: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images for all prompts without and with the target."""
        texts = [p.base_prompt for p in self.prompts] + [p.target_prompt for p in self.prompts]
        seeds = [p.seed for p in self.prompts] * 2
        both = demo.draw(self.model, lora, texts, seeds, f"{label}: drawing", self.show)
        return both[: len(self.prompts)], both[len(self.prompts) :]

    def scores(self, without: NDArray[np.uint8], with_: NDArray[np.uint8]) -> dict[str, float]:
        """`measure.Scores`, and what only numbers between 0 and 1 can say: mean judge probability, CLIP similarity."""
        seen_with = predict(self.judge, with_)
        found = score(
            self.goal,
            base=self.base_without,
            without=without,
            with_=with_,
            seen_base=self.seen_base,
            seen_without=predict(self.judge, without),
            seen_with=seen_with,
            untouched=self.untouched,
        ).as_dict()
        with torch.no_grad():
            text = self.scorer.text([self.goal.phrase])[0]
            found["clip_with"] = float((self.scorer.image(to_tensor(with_)) @ text).mean())
            found["clip_without"] = float((self.scorer.image(to_tensor(without)) @ text).mean())
        return found


def run_row(task: Task, row: Row, seed: int, measuring: Measuring, folder: Path, label: str) -> dict[str, float]:
    """Train one LoRA and measure it."""
    data = folder / f"data-{task.target}{'-clean' if task.clean else ''}-{seed}"
    if not data.exists():
        write_set(data, task.target, seed=seed, **({"pollution": 0.0} if task.clean else {}))
    out = folder / "loras" / f"{label.replace(' ', '-')}.safetensors"
    run = demo.settings(measuring.model, data, out, settings(task, row), task.steps, seed)
    result, seconds = demo.timed_training(replace(run, **row.training), f"{label}: training", measuring.show)
    return measuring.scores(*measuring.draw(result.path, label)) | {"step_seconds": seconds}


def results(folder: Path) -> list[dict[str, Any]]:
    """Everything that was measured so far."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]


COLUMNS = (
    ("response", "response", "{:.2f}"), ("clip_with", "CLIP", "{:.3f}"), ("leak", "leak", "{:.2f}"),
    ("drift", "drift x1000", "{:.1f}"), ("drift_without", "drift without x1000", "{:.1f}"),
    ("uninvited_background", "uninvited background", "{:.2f}"), ("uninvited_clothes", "uninvited clothes", "{:.2f}"),
    ("step_seconds", "s/step", "{:.2f}"),
)  # fmt: skip


def table_of(found: Sequence[Mapping[str, Any]]) -> Table:
    """Mean over the seeds and, in brackets, its standard error."""
    shown = Table(title="mean over training seeds (standard error)", title_justify="left")
    shown.add_column("row")
    shown.add_column("seeds", justify="right")
    for _, head, _ in COLUMNS:
        shown.add_column(head, justify="right")
    names = list(dict.fromkeys(entry["row"] for entry in found))
    for name in sorted(names, key=lambda n: (n != "base", list(ROWS).index(n) if n in ROWS else 0)):
        entries = [entry["scores"] for entry in found if entry["row"] == name]
        cells = []
        for column, _, form in COLUMNS:
            values = np.array([entry.get(column, np.nan) for entry in entries], dtype=float)
            values = values * (1000 if column.startswith("drift") else 1)
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            text = form.format(values.mean()) if np.isfinite(values.mean()) else ""
            cells.append(text + (f" ({form.format(error)})" if text and np.isfinite(error) else ""))
        shown.add_row(name, str(len(entries)), *cells)
    return shown


@app.command()
def run(
    rows: Annotated[str, typer.Option(help="Rows with commas; `list` shows them all.")] = "plain,spf",
    target: Annotated[str, typer.Option(help=f"What to teach: {', '.join(TARGETS)}.")] = "blonde",
    seeds: Annotated[str, typer.Option(help="Training seeds with commas.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=4, help="Training steps.")] = 200,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind (explicit, partial).")] = 12,
    clean: Annotated[bool, typer.Option("--clean", help="A training set without pollution.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/lab"),
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL_FOLDER,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's own")] = None,
) -> None:
    """Run what is missing of these rows, and show them."""
    console = Console(soft_wrap=True)
    environment.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    task = Task(target, steps, prompts, clean)
    names = rows.split(",")
    try:
        unknown = [f"no row {name!r}{nearest(name, ROWS)}" for name in names if name not in ROWS]
        if target not in TARGETS:
            unknown.append(f"--target {target!r}: choose one of {', '.join(TARGETS)}")
        if unknown:
            raise SPFError(unknown)
        wanted = [(name, seed) for name in names for seed in map(int, seeds.split(","))]
        with progress_bars(console) as show:
            measuring: Measuring | None = None
            for name, seed in wanted:
                path = out / "results" / f"{key(task, ROWS[name], seed, model)}.json"
                if path.exists():
                    continue
                measuring = measuring or Measuring(task, model, show)
                label = f"{target} {name} {seed}"
                entry = {"row": name, "seed": seed, "task": vars(task)}
                _write(path, entry | {"scores": run_row(task, ROWS[name], seed, measuring, out, label)})
                base = out / "results" / f"base-{key(task, Row({}), 0, model)}.json"
                _write(base, {"row": "base", "seed": 0, "task": vars(task), "scores": measuring.scores(
                    measuring.base_without, measuring.base_with)})  # fmt: skip
    except SPFError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on", style="yellow")
        raise typer.Exit(130) from None
    chosen = [e for e in results(out) if e["task"] == vars(task) and e["row"] in (*names, "base")]
    console.print(table_of(chosen))


def _write(path: Path, entry: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


@app.command("list")
def list_rows() -> None:
    """Show every row and its settings."""
    for name, row in ROWS.items():
        words = [f"{k}={v}" for k, v in {**row.spf, **row.training}.items()]
        print(f"{name:<26}{' '.join(words)}")


@app.command()
def table(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/lab"),
) -> None:
    """Show everything measured so far, a table a task."""
    console = Console(soft_wrap=True)
    found = results(out)
    for task in {json.dumps(entry["task"], sort_keys=True): entry["task"] for entry in found}.values():
        console.print("  ".join(f"{k}={v}" for k, v in task.items()))
        console.print(table_of([entry for entry in found if entry["task"] == task]))


if __name__ == "__main__":
    app()
