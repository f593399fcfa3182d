"""The loaders themselves, on every kind of file: run where their checkouts are, and what they did when they were run.

    SPF_A1111=DIR SPF_FORGE=DIR SPF_COMFYUI=DIR python -m tests.lorafile.real    # writes loader_results.json anew

Of each loader that is at hand; the results of the others stay. diffusers is the installed one.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.lorafile import dit_kinds, dit_programs, kinds, programs

RECORD = Path(__file__).with_name("loader_results.json")
CHECKOUTS = {"a1111": "SPF_A1111", "forge": "SPF_FORGE", "comfyui": "SPF_COMFYUI"}
LABEL = {"a1111": "A1111", "forge": "Forge", "comfyui": "ComfyUI", "diffusers": "diffusers"}
# an error of a delta that is none: relative to its largest value, in the precision a loader multiplies in
NEAR = {"fp32": 2e-4, "fp16": 0.1, "bf16": 0.1}
# What other precisions can change: the algorithms. A larger draw, so that no delta drowns in the model's rounding.
ALGORITHMS = tuple(kinds.BUILD)[:17]
DRAW = {"fp32": 0.1, "fp16": 0.4, "bf16": 0.4}


# the transformers that a loader has; diffusers by its release
HAS = {"a1111": ("sd3",), "forge": ("sd3", "flux", "chroma")}
HAS["diffusers"] = tuple(base for base in dit_programs.CONFIG if dit_programs.has(base))


def build(kind: str, base: str, weights: kinds.Weights, precision: str) -> kinds.File:
    return kinds.build(kind, base, weights, precision, DRAW[precision])


def run(
    loader: str,
    checkout: str | Path,
    base: str,
    files: Sequence[kinds.File],
    weights: kinds.Weights,
    program: str | None = programs.__file__,
    depths: object = None,
) -> list[tuple[dict[str, torch.Tensor], str | None]]:
    """The deltas of each file, and the error if there was one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"base": base, "depths": depths or kinds.depths(base), "files": len(files)}
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        save_file(weights, folder / "model.safetensors")
        for i, file in enumerate(files):
            apart = {key: t.contiguous().clone() for key, t in file.tensors.items()}
            save_file(apart, folder / f"file-{i}.safetensors")
        command = [sys.executable, str(program), loader, str(checkout), name]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        said = json.loads((folder / "said.json").read_text("utf-8"))
        return [(load_file(folder / f"delta-{i}.safetensors"), said[i]["error"]) for i in range(len(files))]


def wrong(file: kinds.File, deltas: dict[str, torch.Tensor], error: str | None, precision: str = "fp32") -> int:
    """Modules of the file that the loader left out or applied wrongly; all of them where it stopped."""
    out = 0
    for name, meant in file.meant.items():
        got = deltas.get(name)
        if error or got is None or got.numel() != meant.numel():
            out += 1
            continue
        off = float((got.double().flatten() - meant.flatten()).abs().max() / meant.abs().max())
        out += not off <= NEAR[precision]
    return out


def outcome(file: kinds.File, deltas: dict[str, torch.Tensor], error: str | None, precision: str = "fp32") -> str:
    """``loads``, ``N of M differ``, or ``fails`` (an error, or nothing is applied)."""
    count = wrong(file, deltas, error, precision)
    if error or not deltas:
        return "fails"
    return f"{count} of {len(file.meant)} differ" if count else "loads"


def outcomes(loader: str, checkout: str | Path) -> dict[str, str]:
    """``kind, base, precision`` -> outcome."""
    out = {}
    for base in kinds.BASES:
        weights = kinds.model(base)
        for precision in kinds.DTYPES:
            wanted = kinds.of_base(base) if precision == "fp32" else ALGORITHMS
            if loader == "diffusers" and precision != "fp32":
                continue  # it multiplies in the pipeline's precision
            files = [build(kind, base, weights, precision) for kind in wanted]
            for kind, file, done in zip(wanted, files, run(loader, checkout, base, files, weights), strict=True):
                out[f"{kind}; {base}; {precision}"] = outcome(file, *done, precision)
    return out


def dit_outcomes(loader: str, checkout: str | Path) -> dict[str, str]:
    """The same of transformers in diffusers' own names, of those that the loader has."""
    out = {}
    for base in dit_kinds.BASES:
        if loader != "comfyui" and base not in HAS[loader]:
            continue
        weights, wanted = dit_kinds.model(base), dit_kinds.of_base(base)
        files = [dit_kinds.build(kind, base, weights) for kind in wanted]
        done = run(loader, checkout, base, files, weights, dit_programs.__file__, dit_programs.CONFIG[base])
        out |= {f"{k}; {base}; fp32": outcome(f, *d) for k, f, d in zip(wanted, files, done, strict=True)}
    return out


def commit(checkout: Path) -> str:
    """The checkout's commit; `SPF_COMMIT` names it where it is no git repository."""
    named = os.environ.get("SPF_COMMIT")
    if named:
        return named
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def installed() -> str:
    """The release of the diffusers that is installed."""
    return importlib.metadata.version("diffusers")


def main() -> None:
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    today = datetime.date.today().isoformat()
    for loader in sys.argv[1:] or [*CHECKOUTS, "diffusers"]:
        label, checkout = LABEL[loader], Path(os.environ.get(CHECKOUTS.get(loader, ""), "."))
        version = installed() if loader == "diffusers" else commit(checkout)
        name = f"{label} {version}" if loader == "diffusers" else label
        results = outcomes(loader, checkout) | dit_outcomes(loader, checkout)
        record[name] = {"version": version, "date": today, "results": results}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
