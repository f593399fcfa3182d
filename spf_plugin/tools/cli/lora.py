"""`spf lora`: check, fix and convert LoRA files, and write their WebUI cards."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import inspect, reader, sidecars, writer
from spf_plugin.lorafile.convert import to_comfyui, to_diffusers, to_kohya
from spf_plugin.lorafile.findings import Finding, Verdict, other_kind
from spf_plugin.lorafile.inspect import Contents, Description
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.names import BASE_LABEL
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.cli.numbers import finite

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Check, fix and convert LoRA files; write their WebUI cards.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

LONGEST = 400  # characters of a value that is shown
_STATUS = {
    "loads": Text("loads", style="green"),
    "differs": Text("differs", style="yellow"),
    "fails": Text("fails", style="bold red"),
}


class Loader(str, enum.Enum):
    """The five programs whose rules are known."""

    a1111 = "a1111"
    forge = "forge"
    comfyui = "comfyui"
    diffusers = "diffusers"
    sdcpp = "sd.cpp"


class Precision(str, enum.Enum):
    """Precision of the saved factors."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Target(str, enum.Enum):
    """Naming to convert to."""

    kohya = "kohya"
    diffusers = "diffusers"
    peft = "peft"
    comfyui = "comfyui"


_DTYPES = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def _fail(error: SPFError) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(escape(str(error)), style="red", highlight=False)
    return typer.Exit(2)


# ---- check ----------------------------------------------------------------------------------------------------------


def _counts(counts: dict[str, Any], labels: dict[str, str]) -> str:
    """``UNet 16, text encoder 8 / 4`` from component -> Counter of values, and component -> its name."""
    parts = []
    for component in [c for c in labels if c in counts]:
        values = counts[component]
        shown = ["none" if v is None else f"{v:g}" for v, _ in values.most_common(3)]
        more = f" and {len(values) - 3} more" if len(values) > 3 else ""
        parts.append(f"{labels[component]} {' / '.join(shown)}{more}")
    return ", ".join(parts) or "none"


def _facts(contents: Contents, description: Description) -> dict[str, str]:
    """Label -> value of the lines above the table."""
    algorithms = ", ".join(f"{name} ({n})" for name, n in description.algorithms.most_common())
    labels = inspect.labels(description)
    out = {
        "base": f"{BASE_LABEL[description.base]} (by {description.evidence})",
        "algorithm": algorithms,
        "modules": inspect.targets(description),
        "rank": _counts(dict(description.ranks), labels),
        "alpha": _counts(dict(description.alphas), labels),
        "dtype": ", ".join(f"{name} ({n})" for name, n in description.dtypes.most_common()),
    }
    settings = inspect.settings(contents.metadata)
    return out | {_cut(label): _cut(value) for label, value in settings.items()}  # anything may stand there


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def _report(path: Path, facts: dict[str, str], results: list[Verdict]) -> Group:
    """What one file is and how each loader takes it."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim")
    lines.add_column(overflow="fold")
    for label, value in facts.items():
        lines.add_row(escape(label), escape(value))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("loader", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what happens", overflow="fold", ratio=3)
    table.add_column("fix", overflow="fold", ratio=1)
    for verdict in results:
        first = True
        ordered = sorted(verdict.findings, key=lambda f: ("fail", "warn", "note").index(f.level))
        if verdict.status == "fails":  # what else would be fine does not matter then
            ordered = [f for f in ordered if f.level != "note"]
        for finding in ordered or [Finding("note", "ok", "as its author meant it")]:
            style = {"fail": "red", "warn": "yellow", "note": "dim"}[finding.level]
            table.add_row(
                verdict.loader if first else "",
                _STATUS[verdict.status] if first else "",
                Text(finding.message, style=style),
                Text(finding.fix),
            )
            first = False
    return Group(Text(str(path), style="bold"), lines, table)


def _as_json(path: Path, contents: Contents, description: Description, results: list[Verdict]) -> dict[str, Any]:
    """One file's entry of `--json`."""
    return {
        "file": str(path),
        "base": description.base,
        "evidence": description.evidence,
        "algorithms": dict(description.algorithms),
        "components": dict(description.components),
        "targets": inspect.targets(description),
        "ranks": {c: {str(r): n for r, n in v.items()} for c, v in description.ranks.items()},
        "alphas": {c: {str(a): n for a, n in v.items()} for c, v in description.alphas.items()},
        "dtypes": dict(description.dtypes),
        "settings": inspect.settings(contents.metadata),
        "hash": contents.metadata.get("sshs_model_hash"),
        "loaders": {
            v.loader: {"status": v.status, "findings": [dict(vars(finding)) for finding in v.findings]} for v in results
        },
    }


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="LoRA files (.safetensors).", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of tables.")] = False,
    loader: Annotated[
        list[Loader] | None, typer.Option("--loader", "-l", help="Only this loader; may be repeated.")
    ] = None,
) -> None:
    """Say what each file is and whether A1111, Forge, ComfyUI, diffusers and stable-diffusion.cpp load it.

    Exit status: 0 every file loads everywhere as meant, 1 a loader refuses one or applies it differently, 2 a file
    cannot be read.
    """
    console = Console()
    wanted = {choice.value for choice in loader} if loader else {choice.value for choice in Loader}
    status = 0
    entries = []
    for path in files:
        try:
            contents = inspect.from_file(path)
        except SPFError as error:
            status = 2
            entries.append({"file": str(path), "error": str(error)})
            if not as_json:
                _fail(error)
            continue
        description = inspect.describe(contents)
        results = [v for v in verdicts(contents, description) if v.loader.lower() in wanted]
        if any(v.status != "loads" for v in results):
            status = max(status, 1)
        entries.append(_as_json(path, contents, description, results))
        if not as_json:
            console.print(_report(path, _facts(contents, description), results))
    if as_json:
        say(json.dumps(entries, indent=2))
    raise typer.Exit(status)


# ---- fix, convert ---------------------------------------------------------------------------------------------------

In = Annotated[Path, typer.Argument(metavar="IN", help="The LoRA to read.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Where to write the result.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT where it exists.")]


def _check_out(out: Path, force: bool) -> None:
    if out.suffix.lower() != ".safetensors":
        raise SPFError(f"{out} must end in .safetensors: WebUIs list nothing else.")
    if out.exists() and not force:
        raise SPFError(f"{out} exists; --force replaces it.")


def _said(out: Path, notes: list[str]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for note in notes:
        console.print(f"[dim]-[/dim] {escape(note)}")
    console.print(f"wrote [bold]{escape(str(out))}[/bold]")


def _verdicts(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list[Verdict]:
    contents = inspect.gather(tensors.items(), metadata)
    return verdicts(contents, inspect.describe(contents))


@app.command()
def fix(
    source: In,
    out: Out,
    dtype: Annotated[Precision | None, typer.Option(help="Save in this precision; as it is by default.")] = None,
    one_rank: Annotated[
        bool, typer.Option("--one-rank", help="Pad all ranks to the largest, for diffusers 0.32; the file grows.")
    ] = False,
    force: Force = False,
) -> None:
    """Mend what can be mended without changing a weight: names, shapes, alphas, dtypes, metadata, hash.

    Exit status: 0 every loader takes the result, 1 one of them still refuses it, 2 nothing was written.
    """
    try:
        _check_out(out, force)
        state_dict, metadata = reader.load(source)
        fixed, strings, notes = normalise(
            state_dict, metadata, dtype=_DTYPES[dtype] if dtype else None, one_rank=one_rank
        )
        after = _verdicts(fixed, strings)
        worse = [v.loader for old, v in zip(_verdicts(state_dict, metadata), after, strict=True) if v.worse_than(old)]
        if worse:
            named = ", ".join(worse)
            raise SPFError(f"{named} would take the result worse than {source} as it is: nothing was written.")
        refused = [v for v in after if v.status == "fails"]
        if len(refused) == len(Loader):
            why = next(f.message for f in refused[-1].findings if f.level == "fail")
            raise SPFError(f"{source} cannot be mended, no program would load the result. {why} Nothing was written.")
        writer.save(out, fixed, strings)
    except SPFError as error:
        raise _fail(error) from None
    _said(out, notes or ["nothing needed mending"])
    raise typer.Exit(int(bool(refused)))


@app.command()
def convert(
    source: In,
    out: Out,
    to: Annotated[Target, typer.Option("--to", help="Naming of the result.", show_default=False)],
    force: Force = False,
) -> None:
    """Rewrite a LoRA in kohya's, diffusers', peft's or (of a transformer) ComfyUI's naming. diffusers' and peft's need
    diffusers installed for SD and SDXL.
    """
    try:
        _check_out(out, force)
        state_dict, metadata = reader.load(source)
        kind, _ = other_kind(inspect.describe(inspect.gather(state_dict.items(), metadata)))
        if kind:
            raise SPFError(f"{source} is {kind}, and no names of a LoRA can be given to it. Nothing was written.")
        # diffusers' formats keep no alpha, and its 0.35 then takes every rank for the most common one
        padded = to in (Target.diffusers, Target.peft)
        converted, strings, notes = normalise(state_dict, metadata, one_rank=padded)
        if to in (Target.kohya, Target.comfyui):
            said: list[str] = []
            converted = to_kohya(converted, strings, said)
            notes = said or notes  # of what was put together, not of how loaders take it apart
        if to is Target.comfyui:
            converted, notes = to_comfyui(converted, strings), said
        elif to is not Target.kohya:
            notes = []  # they describe how loaders take the kohya form
            converted = to_diffusers(converted, strings, peft=to is Target.peft, notes=notes)
        writer.save(out, converted, strings)
    except SPFError as error:
        raise _fail(error) from None
    _said(out, notes or ["only names changed"])


# ---- sidecar --------------------------------------------------------------------------------------------------------


@app.command()
def sidecar(
    file: Annotated[Path, typer.Argument(help="The LoRA file.", show_default=False)],
    activation_text: Annotated[
        str | None, typer.Option(help="Text the card adds to the prompt; the target phrases by default.")
    ] = None,
    weight: Annotated[float, typer.Option(callback=finite, help="Preferred weight; 0 leaves it to the WebUI.")] = 0.0,
    negative_text: Annotated[str, typer.Option(help="Text for the negative prompt.")] = "",
    description: Annotated[str, typer.Option(help="Shown on the card.")] = "",
    notes: Annotated[str, typer.Option(help="Shown in the card's editor.")] = "",
    preview: Annotated[Path | None, typer.Option(help="Image to copy to NAME.preview.EXT.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Update an existing card, replace its preview.")] = False,
) -> None:
    """Write NAME.json (and NAME.preview.png) beside a LoRA, as the cards of A1111, Forge and ComfyUI read them."""
    try:
        contents = inspect.from_file(file)
        base = inspect.describe(contents).base
        if activation_text is None:
            activation_text = ", ".join(sidecars.target_phrases(contents.metadata))
        card = sidecars.Card(
            activation_text, weight, sidecars.SD_VERSION.get(base, "Unknown"), negative_text, description, notes
        )
        written = [sidecars.write_card(file, card, force=force)]
        if preview is not None:
            written.append(sidecars.write_preview(file, preview, force=force))
    except SPFError as error:
        raise _fail(error) from None
    for path in written:
        say(f"wrote {path}")
