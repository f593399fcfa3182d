"""The measured costs as a table, as docs/cost.md, and as the figures of `spf plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cases import (
    ALL_LAYERS,
    CASES,
    DOP,
    MAPS_KEPT,
    NO_QUERIES,
    OUTPUT_ONLY,
    PLAIN,
    PRESERVATION,
    PUBLISHED,
    PURE_CC,
    REFERENCE,
    SPF,
    Record,
)
from benchmarks.steps import STEPS, Setup
from spf_plugin.config import SPFConfig
from spf_plugin.hosts.kohya.scripts import MODELS
from spf_plugin.tools import plan, plan_musubi, preset
from spf_plugin.tools.plan import LORA_BYTES, OPTIMIZERS, aligned_share
from spf_plugin.tools.plan_dit import FIRST, RANK, SECOND, SIDE, TRANSFORMERS

MIB = 2**20
TEMPLATE = Path(__file__).with_name("cost_template.md")
PRESETS = Path(__file__).parents[1] / "presets"
NAMES = {"sd1": "SD1.5", "sd2": "SD2.1", "sdxl": "SDXL", "tiny": "tiny"}
LABELS = {
    PLAIN: "plain LoRA",
    SPF: "SPF, first step of a pair",
    PRESERVATION: "SPF, second step of a pair",
    ALL_LAYERS: "SPF, first step, spf_layers=all",
    DOP: "DOP (ai-toolkit)",
    PURE_CC: "PureCC",
}
NOT_MEASURED = "not measured yet"
Records = Mapping[tuple[Setup, str], Record]


@dataclass(frozen=True)
class Row:
    """A line of the table; the first is what the ratios refer to."""

    setup: Setup
    label: str
    record: Record
    plain: Record
    share: float = 1.0  # of the steps; the others are plain

    @property
    def flops(self) -> float:
        return 1 + (self.record.flops / self.plain.flops - 1) * self.share

    @property
    def static(self) -> int:
        """Bytes of the weights and of AdamW8bit's state."""
        models = 2 if self.record.step == PURE_CC else 1
        lora = self.plain.lora_parameters * (LORA_BYTES + OPTIMIZERS["adamw8bit"])
        weights, parameters = self.setup.weights, self.plain.unet_parameters
        unet = parameters * 4 if weights == "fp32" else plan.unet_bytes(self.setup.family, weights, parameters)
        return int(unet * models + lora)

    @property
    def total(self) -> int:
        return self.static + self.record.peak

    @property
    def more(self) -> int:
        """Bytes beyond a plain LoRA."""
        return self.total - Row(self.setup, "", self.plain, self.plain).total

    @property
    def memory(self) -> float:
        return self.total / (self.total - self.more)

    def cells(self) -> list[str]:
        time = NOT_MEASURED if self.record.ratio is None else f"{1 + (self.record.ratio - 1) * self.share:.2f}"
        if self.record.seconds is not None and self.share == 1:
            time += f" ({1000 * self.record.seconds:.0f} ms)"
        peak = NOT_MEASURED if self.record.gpu_peak is None else f"{self.record.gpu_peak / MIB:.0f} MB"
        return [
            self.label,
            f"{self.flops:.3f}",
            f"{self.record.peak / MIB:.0f} MB",
            f"{self.total / MIB:.0f} MB",
            f"{self.memory:.3f}",
            f"{self.more / MIB:+.0f} MB" if self.record is not self.plain else "",
            time,
            peak,
        ]


HEAD = ["step", "FLOPs", "step's peak", "with weights", "memory", "more", "GPU time", "GPU peak"]


def title(setup: Setup) -> str:
    weights = "" if setup.weights == "bf16" else f", {setup.weights} weights"
    rank = "" if setup.rank == Setup.rank else f", rank {setup.rank}"
    how = "checkpointing" if setup.checkpointing else "no checkpointing"
    return f"{NAMES[setup.family]}, {setup.resolution} px, batch {setup.batch}, {how}{weights}{rank}"


def rows(records: Records, setup: Setup) -> list[Row]:
    """The lines of a setup: what was tracked, and what SPF's schedules make of it."""
    plain, spf = records.get((setup, PLAIN)), records.get((setup, SPF))
    if plain is None:
        return []
    out = [Row(setup, LABELS[PLAIN], plain, plain)]
    if spf is not None:
        out.append(Row(setup, LABELS[SPF], spf, plain))
        out.append(Row(setup, "SPF, whole run", spf, plain, aligned_share(SPFConfig(), STEPS)))
    for name in (PRESERVATION, ALL_LAYERS, DOP, PURE_CC):
        if (setup, name) in records:
            out.append(Row(setup, LABELS[name], records[setup, name], plain))
    return out


def table(records: Records) -> Table:
    """Everything, for a terminal."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Cost of a training step, beside a plain LoRA")
    for i, name in enumerate(HEAD):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    for setup, _ in CASES:
        lines = rows(records, setup)
        if lines:
            out.add_row(f"[bold]{title(setup)}[/bold]")
        for row in lines:
            out.add_row(*row.cells())
    return out


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def _targets(records: Records) -> list[list[str]]:
    """What was aimed at, and what came out."""
    lines = []
    for setup, _ in CASES[:PUBLISHED]:
        found = rows(records, setup)
        if not setup.checkpointing or len(found) < 3:
            continue
        _, always, default = found[:3]
        bound = 150 if setup.family == "sdxl" and setup.batch == 1 else None
        memory = f"{always.memory:.3f}" + (f", {always.more / MIB:+.0f} MB (at most +150)" if bound else "")

        def said(value: float, limit: float) -> str:
            return f"{value:.3f} {'met' if value <= limit else f'missed by {value - limit:.3f}'}"

        met = always.memory <= 1.03 and (bound is None or always.more <= bound * MIB)
        lines.append(
            [
                f"{NAMES[setup.family]} {setup.resolution} px, batch {setup.batch}",
                said(always.flops, 1.35),
                said(default.flops, 1.20),
                memory + (" met" if met else " missed"),
            ]
        )
    return lines


def _ways(records: Records) -> list[list[str]]:
    """The measured ways down, at batch 1 with checkpointing."""
    lines = []
    for setup in (Setup("sd1", 512, 1, True), Setup("sdxl", 1024, 1, True)):
        plain, spf = records.get((setup, PLAIN)), records.get((setup, SPF))
        if plain is None or spf is None:
            continue

        def line(what: str, record: Record, share: float = 1.0, s: Setup = setup, p: Record = plain) -> list[str]:
            row = Row(s, what, record, p, share)
            return [NAMES[s.family], what, f"{row.flops:.3f}", f"{row.more / MIB:+.0f} MB"]

        if (setup, REFERENCE) in records:
            floor = 1 + records[setup, REFERENCE].flops / plain.flops
            lines.append([NAMES[setup.family], "a plain step and a reference pass: the floor", f"{floor:.3f}", ""])
        lines.append(line("SPF, first step of a pair", spf))
        for what, name in (
            ("the same, maps of all 77 tokens kept for backward (as before)", MAPS_KEPT),
            ("the same, `spf_layers=all` (SDXL: 70 layers in place of 11)", ALL_LAYERS),
            ("the same, `spf_fine_grained_multiplier=0`", NO_QUERIES),
            ("the same, only the output loss", OUTPUT_ONLY),
        ):
            if (setup, name) in records:
                lines.append(line(what, records[setup, name]))
        for what, config in (
            ("a whole run", SPFConfig()),
            ("without pairs: `spf_base_preservation_multiplier=0`", SPFConfig(base_preservation_multiplier=0)),
            ("stage 1 without reference: `spf_stage2_start=0.25`", SPFConfig(stage2_start=0.25)),
        ):
            lines.append(line(what, spf, aligned_share(config, STEPS)))
    return lines


def _weights(records: Records) -> list[list[str]]:
    """The frozen UNet in fewer bits, at batch 1 with checkpointing."""
    lines = []
    for family, resolution in (("sd1", 512), ("sdxl", 1024)):
        for weights in ("bf16", "fp8", "int8", "nf4"):
            setup = Setup(family, resolution, 1, True, weights=weights)
            found = rows(records, setup)
            if len(found) < 2:
                continue
            plain, spf = found[:2]
            unet = plan.unet_bytes(family, weights, plain.plain.unet_parameters)
            sizes = (unet, plain.record.peak, spf.record.peak, spf.total)
            how = {"bf16": "16 bit", "fp8": "`--fp8_base` (the host's)"}.get(weights, f"`spf_base={weights}`")
            seconds = spf.record.seconds
            time = NOT_MEASURED if seconds is None else f"{1000 * seconds:.0f} ms"
            lines.append([NAMES[family], how, *(f"{size / MIB:.0f} MB" for size in sizes), time])
    return lines


def _on_gpu(records: Records) -> str:
    """What the GPU's columns say of the tracked ones, and how far their times can be trusted."""
    extra, batches = [], []
    for setup, steps in CASES:
        plain, four = (records.get((replace(setup, batch=n), PLAIN)) for n in (setup.batch, 4))
        if plain is None or plain.gpu_peak is None:
            continue
        for name in steps:
            record = records.get((setup, name))
            if name != PLAIN and record is not None and record.gpu_peak is not None:
                more = (record.peak - plain.peak, record.gpu_peak - plain.gpu_peak)
                extra.append([title(setup), LABELS[name], *(f"{size / MIB:+.0f} MB" for size in more)])
        if setup.batch == 1 and setup.checkpointing and four is not None and plain.seconds and four.seconds:
            batches.append(f"{four.seconds / plain.seconds:.2f} times ({NAMES[setup.family]})")
    if not extra:
        return "Not measured yet."
    said = ""
    if batches:
        said = (
            f"A plain step with batch 4 took {' and '.join(batches)} as long as one with batch 1.\n"
            "**Where that is near 1, the GPU waited for the CPU that launches its kernels**: the times then compare\n"
            "Python and launches, not a GPU's work, and FLOPs say more about a card that is busy.\n\n"
        )
    head = ["setup", "step", "memory beyond a plain LoRA's: tracked", "the GPU's allocator"]
    return said + "\n".join(_markdown(head, extra))


def _unsaved(records: Records) -> str:
    """What the weights' bits do to a plain step's own memory without checkpointing."""
    peaks = []
    for weights in ("bf16", "fp8", "nf4"):
        record = records.get((Setup("sdxl", 1024, 1, False, weights=weights), PLAIN))
        if record is None:
            return ""
        peaks.append(f"{record.peak / MIB:.0f} MB")
    return (
        f"Without checkpointing a plain step of SDXL needs {peaks[0]}, {peaks[1]} with fp8_base (its backward keeps a\n"
        f"16-bit copy of every weight, so nothing is saved), and {peaks[2]} with nf4, which keeps none."
    )


def _presets() -> list[list[str]]:
    """The shipped presets of SD, SDXL and of musubi-tuner, by the arithmetic of `spf plan`."""
    lines = []
    for path in (*sorted(PRESETS.glob("sd*-*gb.toml")), *sorted(PRESETS.glob("musubi/*-*gb.toml"))):
        run, _ = preset.read(path)
        if run.transformer is not None and run.musubi is None:  # SD3
            continue
        found = plan.predict(run)
        card = int(path.stem.rsplit("-", 1)[1].removesuffix("gb"))
        step = found.parts["activations and gradients"]
        rest = found.peak - step - plan.CONTEXT
        lines.append(
            [
                f"`{path.relative_to(PRESETS).as_posix()}`",
                f"{rest / MIB:.0f} MB",
                f"{step / MIB:.0f} MB",
                f"{plan.CONTEXT / MIB:.0f} MB",
                plan.gib(found.peak),
                f"{card} GB " + ("holds" if found.peak <= card * plan.GIB else "**does not hold**"),
            ]
        )
    return lines


_STEPS = (PLAIN, FIRST, SECOND)


def _steps(said: str, run: plan.Run, steps: list[dict[str, int]]) -> list[str]:
    """A line of what a transformer's steps take: those of `_STEPS`, tracked, in a run."""
    plain, spf = plan.predict(run), plan.predict(replace(run, spf=SPFConfig()))
    return [
        said + ("" if run.checkpointing else ", no checkpointing"),
        *(f"{step['peak'] / MIB:.0f} MB" for step in steps),
        f"{(spf.peak - plan.CONTEXT) / MIB:.0f} MB",
        f"{(spf.peak - plan.CONTEXT) / (plain.peak - plan.CONTEXT):.3f}",
        *(f"{step['flops'] / steps[0]['flops']:.3f}" for step in steps[1:]),
        f"{spf.flop_ratio:.3f}",
    ]


def _transformers() -> list[list[str]]:
    """Plain steps of the transformers and those of a pair, tracked on the host's classes (`benchmarks.dit_cost`)."""
    lines = []
    for model, of in TRANSFORMERS.items():
        for how in (True, False):
            run = plan.Run(model, SIDE, SIDE, rank=RANK, checkpointing=how, optimizer="AdamW8bit")
            lines.append(_steps(MODELS[model], run, [of.tracked(name, checkpointing=how) for name in _STEPS]))
    return lines


def _musubi() -> list[list[str]]:
    """The same of musubi-tuner's (`benchmarks.musubi_cost`), each with its larger sample."""
    lines = []
    for model, of in plan_musubi.MODELS.items():
        for how in (True, False):
            size = {"width": 832, "height": 480, "frames": 21} if of.clips else {"width": SIDE, "height": SIDE}
            run = plan.Run(model, rank=RANK, checkpointing=how, optimizer="AdamW8bit", **size)
            lines.append(_steps(of.said, run, [of.tracked(name, checkpointing=how)[-1] for name in _STEPS]))
    return lines


def _musubi_weights() -> list[list[str]]:
    """The frozen weights of musubi-tuner's models on the card, and what the smaller ones add to a step."""
    lines = []
    for of in plan_musubi.MODELS.values():
        (dense, *_), *others = (
            of.tracked(FIRST, checkpointing=True, weights=weights) if weights in of.weights else []
            for weights in (plan_musubi.DENSE, plan_musubi.CAST, plan_musubi.SCALED)
        )
        kinds = [plan_musubi.DENSE, plan_musubi.CAST, plan_musubi.SCALED]
        sizes = [plan.gib(of.frozen_bytes(w, 0)) if w in of.weights else "not possible" for w in kinds]
        added = [f"{(one[0]['peak'] - dense['peak']) / MIB:+.0f} MB" if one else "" for one in others]
        least = plan.gib(of.frozen_bytes(plan_musubi.SCALED, of.swappable))
        lines.append([of.said, *sizes, *added, f"{of.swappable}: {least}"])
    return lines


def _words(environment: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def markdown(records: Records, environment: Mapping[str, str], timed_on: Mapping[str, str] | None, command: str) -> str:
    """docs/cost.md, from its template; `plan.json` must be written before.

    Args:
        records: what was tracked and timed.
        environment: where it was tracked.
        timed_on: where the GPU columns come from, or None.
        command: what made it.
    """
    lines = []
    for setup, _ in CASES[:PUBLISHED]:
        found = rows(records, setup)
        if found:
            lines += [f"**{title(setup)}**", "", *_markdown(HEAD, [row.cells() for row in found]), ""]
    others = [found[:2] for setup, _ in CASES[PUBLISHED:] if (found := rows(records, setup))]
    if others:
        other_head = ["for `spf plan`, tracked", "step's peak, plain", "SPF", "FLOPs of an aligned step"]
        other_rows = []
        for plain, *spf in others:
            cells = [f"{spf[0].record.peak / MIB:.0f} MB", f"{spf[0].flops:.3f}"] if spf else ["", ""]
            other_rows.append([title(plain.setup), f"{plain.record.peak / MIB:.0f} MB", *cells])
        lines += _markdown(other_head, other_rows)
    head = ["", "first step of a pair, FLOPs at most 1.35", "a whole run, at most 1.20", "memory, at most 1.03"]
    weights_head = ["", "frozen UNet", "UNet", "plain step's peak", "SPF step's peak", "SPF with weights", "SPF step"]
    transformers_head = ["", "plain step's peak", "first of a pair", "second", "SPF with weights", "memory"]
    transformers_head += ["first step's FLOPs", "second's", "a run's"]
    small_head = ["frozen transformer", "16 bits", "`fp8_base` alone", "with `fp8_scaled`"]
    small_head += ["a step more, `fp8_base` alone", "with `fp8_scaled`", "most swapped blocks, with `fp8_scaled`"]
    preset_head = ["preset", "weights and optimizer", "step, tracked", "assumed", "together", "card"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        command=command,
        environment=_words(environment),
        timed=f"measured on a GPU ({_words(timed_on)})" if timed_on else "not measured yet",
        targets="\n".join(_markdown(head, _targets(records))),
        table="\n".join(lines).rstrip(),
        on_gpu=_on_gpu(records),
        ways="\n".join(_markdown(["", "", "FLOPs", "memory"], _ways(records))),
        weights="\n".join(_markdown(weights_head, _weights(records))),
        unsaved=_unsaved(records),
        transformers="\n".join(_markdown(transformers_head, _transformers())),
        musubi="\n".join(_markdown(transformers_head, _musubi())),
        musubi_weights="\n".join(_markdown(small_head, _musubi_weights())),
        presets="\n".join(_markdown(preset_head, _presets())),
        context=plan.gib(plan.CONTEXT),
        share=f"{aligned_share(SPFConfig(), STEPS):.2f}",
    )


def plan_figures(records: Records, command: str) -> dict[str, Any]:
    """plan.json."""
    models: dict[str, Any] = {}
    for setup, _ in CASES:
        plain, spf = records.get((setup, PLAIN)), records.get((setup, SPF))
        if plain is None or spf is None or setup.rank != Setup.rank:
            continue
        model = models.setdefault(
            setup.family,
            {
                "unet_parameters": plain.unet_parameters,
                "lora_parameters_per_rank": plain.lora_parameters // setup.rank,
                "figures": {},
            },
        )
        how = "checkpointing" if setup.checkpointing else "no checkpointing"
        point = {"pixels": setup.resolution**2 * setup.batch, "resolution": setup.resolution, "batch": setup.batch}
        for name, record in ((PLAIN, plain), (SPF, spf)):
            point[name] = {"flops": record.flops, "peak": record.peak}  # type: ignore[assignment]
        model["figures"].setdefault(setup.weights, {}).setdefault(how, []).append(point)
    return {"command": command, "basis": "tracked, not measured on a GPU", "rank": Setup.rank, "models": models}
