"""The demo: one polluted set of portraits, a plain LoRA, an SPF LoRA, and a page that compares them.

`python -m portraitlab.demo` trains both through the reference trainer, on the same images for the same steps from the
same random numbers, and writes the page. Nothing is downloaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from portraitlab import demo_page, environment
from portraitlab.captions import TARGETS
from portraitlab.customisation import EvaluationPrompt, evaluation_prompts, write_set
from portraitlab.judge import load_judge, predict
from portraitlab.measure import Scores, score, untouched_region
from portraitlab.model_files import BASES, JUDGE_FILE, load_pipeline, min_snr_gamma, sample
from spf_plugin.config import PREFIX, SPFConfig, parse
from spf_plugin.errors import SPFError
from spf_plugin.tools.cli.progress import progress_bars
from spf_plugin.tools.cli.train import key_values
from spf_plugin.trainer.loop import Attach, train
from spf_plugin.trainer.settings import Result, Settings

#: Without any weight SPF trains a plain LoRA, byte for byte, and reports its drift.
ONLY_MEASURE = {
    "text_consistent_multiplier": 0.0,
    "fine_grained_multiplier": 0.0,
    "output_multiplier": 0.0,
    "base_preservation_multiplier": 0.0,
}
RANK, LEARNING_RATE, BATCH = 8, 2e-3, 8
SAMPLER_STEPS, GUIDANCE = 20, 3.5
EVALUATION_SEED = 0

app = typer.Typer(add_completion=False)
Show = Callable[[str, int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """One LoRA: its run, seconds per training step, and its images for the prompts without and with the target."""

    result: Result
    step_seconds: float
    without: NDArray[np.uint8]
    with_: NDArray[np.uint8]
    scores: Scores


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows; `runs` has one `{"plain": ..., "spf": ...}` per seed."""

    target: str
    seeds: Sequence[int]
    steps: int
    spf: SPFConfig
    model: Path
    data: Sequence[Path]
    prompts: Sequence[EvaluationPrompt]
    base_without: NDArray[np.uint8]
    base_with: NDArray[np.uint8]
    base_scores: Scores
    runs: Sequence[Mapping[str, Trained]]


def settings(model: Path, data: Path, out: Path, spf: SPFConfig | None, steps: int, seed: int) -> Settings:
    """The training run of the demo."""
    return Settings(
        model=str(model),
        data=data,
        out=out,
        spf=spf,
        steps=steps,
        rank=RANK,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        seed=seed,
        min_snr_gamma=min_snr_gamma(model),
        device="cpu",
    )


def timed_training(run: Settings, label: str, show: Show, attach: Attach | None = None) -> tuple[Result, float]:
    """Train, and measure the seconds of a step (loading and caching left out)."""
    started = ended = 0.0

    def progress(what: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        nonlocal started, ended
        if what == "training":
            ended = time.perf_counter()
            started = ended if done == 1 else started
            show(label, done, total, numbers)

    result = train(run, progress, attach=attach)
    if result.steps < run.steps:
        raise KeyboardInterrupt
    return result, (ended - started) / max(result.steps - 1, 1)


def draw(model: Path, lora: Path | None, texts: Sequence[str], seeds: Sequence[int], label: str, show: Show) -> Any:
    """Images of the base model, or of it with a LoRA, as diffusers loads it: uint8 `[N, 128, 128, 3]`."""
    pipeline = load_pipeline(model)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        pipeline.fuse_lora()
    return sample(
        pipeline,
        texts,
        seeds,
        steps=SAMPLER_STEPS,
        guidance=GUIDANCE,
        batch=8,
        report=lambda done, total: show(label, done, total, {}),
    )


def compare(
    target: str, seeds: Sequence[int], steps: int, prompts_per_kind: int, spf: SPFConfig, *, model: Path, judge: Path,
    out: Path, show: Show,
) -> Comparison:  # fmt: skip
    """Train both LoRAs for every seed, sample, and score.

    Raises:
        SPFError: the model or the judge is missing.
    """
    goal = TARGETS[target]
    trained = "train_dit" if model == BASES["dit"] else "train_base"
    for needed, fix in ((model / "model_index.json", f"{trained} and export_base"), (judge, "train_judge")):
        if not needed.exists():
            raise SPFError(f"{needed} is missing. portraitlab's {fix} make it.")
    reader = load_judge(judge)
    prompts = evaluation_prompts(target, count=prompts_per_kind, seed=EVALUATION_SEED)
    noise = [prompt.seed for prompt in prompts]
    texts = [prompt.base_prompt for prompt in prompts] + [prompt.target_prompt for prompt in prompts]
    untouched = untouched_region(goal)

    def drawn(lora: Path | None, label: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        both = draw(model, lora, texts, noise + noise, label, show)
        return both[: len(prompts)], both[len(prompts) :]

    def scored(without: NDArray[np.uint8], with_: NDArray[np.uint8]) -> Scores:
        return score(
            goal,
            base=base_without,
            without=without,
            with_=with_,
            seen_base=seen_base,
            seen_without=predict(reader, without),
            seen_with=predict(reader, with_),
            untouched=untouched,
        )

    base_without, base_with = drawn(None, "base: drawing")
    seen_base = predict(reader, base_without)
    runs, folders = [], []
    for seed in seeds:
        folder = out / f"seed{seed}"
        write_set(folder / "data", target, seed=seed)
        folders.append(folder / "data")
        trained = {}
        for name, config in (("plain", replace(spf, **ONLY_MEASURE)), ("spf", spf)):
            label = f"{name} {seed}" if len(seeds) > 1 else name
            run = settings(model, folder / "data", folder / f"{target}-{name}.safetensors", config, steps, seed)
            result, seconds = timed_training(run, f"{label}: training", show)
            without, with_ = drawn(result.path, f"{label}: drawing")
            trained[name] = Trained(result, seconds, without, with_, scored(without, with_))
        runs.append(trained)
    return Comparison(
        target, seeds, steps, spf, model, folders, prompts, base_without, base_with,
        scored(base_without, base_with), runs,
    )  # fmt: skip


def numbers(comparison: Comparison) -> dict[str, Any]:
    """The scores as plain JSON, per method and seed."""
    return {
        "target": comparison.target,
        "steps": comparison.steps,
        "spf": comparison.spf.to_metadata(),
        "base": comparison.base_scores.as_dict(),
        **{
            name: {
                str(seed): run[name].scores.as_dict() | {"step_seconds": round(run[name].step_seconds, 4)}
                for seed, run in zip(comparison.seeds, comparison.runs, strict=True)
            }
            for name in ("plain", "spf")
        },
    }


def table(comparison: Comparison) -> Table:
    """The scores for the terminal, means over the seeds."""
    shown = Table(title=f"{TARGETS[comparison.target].phrase}: what each model does", title_justify="left")
    shown.add_column("")
    for head in ("base", "plain LoRA", "SPF LoRA"):
        shown.add_column(head, justify="right")
    for key, name, _, form in demo_page.MEASURES:
        cells = [comparison.base_scores.as_dict()[key]]
        cells += [np.mean([run[m].scores.as_dict()[key] for run in comparison.runs]) for m in ("plain", "spf")]
        shown.add_row(name, *(form.format(cell) for cell in cells))
    seconds = [np.mean([run[m].step_seconds for run in comparison.runs]) for m in ("plain", "spf")]
    shown.add_row("seconds per training step", "", *(f"{s:.2f}" for s in seconds))
    return shown


@app.command()
def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="runs/demo-TARGET, with the base if it is another"),
    ] = None,
    target: Annotated[str, typer.Option(help=f"What to teach: {', '.join(TARGETS)}.")] = "sunglasses",
    steps: Annotated[int, typer.Option(min=4, help="Training steps of each LoRA.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Training seed; also draws the training set.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several seeds instead, such as 0,1,2.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind (explicit, partial).")] = 12,
    quick: Annotated[bool, typer.Option("--quick", help="A short look: fewer steps and prompts.")] = False,
    spf: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An spf_ setting; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="PyTorch's own")] = None,
    base: Annotated[str, typer.Option(help=f"Which embedded model: {', '.join(BASES)}.")] = "unet",
    model: Annotated[Path | None, typer.Option(help="Another model's folder.", show_default="that of --base")] = None,
    judge: Annotated[Path, typer.Option(help="The judge's weights.")] = JUDGE_FILE,
) -> None:
    """Train a plain LoRA and an SPF LoRA on the same polluted portraits and compare them on one page."""
    console = Console(soft_wrap=True)
    begun = time.monotonic()
    environment.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if quick:
        steps, prompts = min(steps, 80), min(prompts, 4)
    try:
        if target not in TARGETS:
            raise SPFError(f"--target {target!r}: choose one of {', '.join(TARGETS)}.")
        if base not in BASES:
            raise SPFError(f"--base {base!r}: choose one of {', '.join(BASES)}.")
        try:
            chosen = [int(word) for word in seeds.split(",")] if seeds else [seed]
        except ValueError:
            raise SPFError(f"--seeds {seeds!r}: write whole numbers with commas, such as 0,1,2.") from None
        words = key_values(spf or [], "--spf")
        given = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in words.items()}
        config = parse({PREFIX + "target": TARGETS[target].phrase, PREFIX + "network": "lycoris.kohya", **given})
        folder = (out or Path("runs") / f"demo-{target}{'' if base == 'unet' else '-' + base}").expanduser()
        with progress_bars(console) as show:
            comparison = compare(
                target, chosen, steps, prompts, config, model=model or BASES[base], judge=judge, out=folder, show=show
            )
            command = demo_page.command_of(comparison, prompts, words)
            report = demo_page.write_report(folder, comparison, command, time.monotonic() - begun, show)
    except SPFError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped", style="yellow")
        raise typer.Exit(130) from None
    (folder / "numbers.json").write_text(json.dumps(numbers(comparison), indent=1) + "\n", encoding="utf-8")
    console.print(table(comparison))
    console.print(f"LoRA files  {', '.join(str(t.result.path) for run in comparison.runs for t in run.values())}")
    console.print(f"report      {report.resolve()}  ({time.monotonic() - begun:.0f} s in all)", highlight=False)


if __name__ == "__main__":
    app()
