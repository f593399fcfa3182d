"""`spf report` from settings to files: load, draw, measure, write."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spf_plugin import __version__
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.lorafile import inspect
from spf_plugin.lorafile.names import BASE_LABEL
from spf_plugin.tools.report import extras, held_out, maps, measures, models, page, prompts, subject
from spf_plugin.tools.report.content import build
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.prompts import Question
from spf_plugin.tools.report.results import Request, Result, Row, Variant
from spf_plugin.tools.report.subject import Photos

TIMESTEPS = (100, 300, 500, 700, 900)
DRAWS = 2
DENOISERS = ("unet/", "transformer/")
PROMPTS = 4  # of the LoRA's captions
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "open_clip_torch",
    "torchmetrics",
    "lpips",
    "opencv-python",
    "opencv-python-headless",
    "matplotlib",
    "numpy",
)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Show = Callable[[str, int, int, Mapping[str, float]], None]
Note = Callable[[str], None]


def run(settings: Request, show: Show, note: Note) -> Path:
    """Make the report.

    Args:
        settings: what to do.
        show: progress, see `spf_plugin.tools.cli.progress`.
        note: called with every warning; they also stand on the page.

    Returns:
        `report.html`; beside it PNGs and `numbers.json`.

    Raises:
        SPFError: a mistake in the settings; nothing was written.
        ImportError: a library of the extra `[report]` is not installed.
    """
    import diffusers  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401

    begun = time.monotonic()
    notes: list[str] = []

    def warn(text: str) -> None:
        notes.append(text)
        note(text)

    metadata = [inspect.from_file(path).metadata for path in settings.loras]
    found = prompts.targets(metadata[0], settings.target, str(settings.loras[0]))
    texts, source = _texts(settings, metadata[0], found)
    questions = prompts.questions(texts, found)
    held = _held_out(settings, texts, metadata, found)
    photos = subject.read(settings.subject) if settings.subject is not None else Photos()
    _check_out(settings.out)
    device, dtype = _device(settings)
    show("loading", 0, 1, {})
    measuring = extras.load(settings, questions, warn)
    pipeline, parts = models.load(settings.model, device, dtype)
    show("loading", 1, 1, {})
    size = settings.size or parts.resolution
    if size % parts.latent_scale or size < parts.latent_scale * 8:
        raise SPFError(
            f"--size {size}: must be a multiple of {parts.latent_scale}, and {parts.latent_scale * 8} or more."
        )
    for path in settings.loras:
        for text in models.check_lora(path, parts.family):
            warn(text)
    hashes = _hashes(settings, show)

    variants = [_variant(pipeline, settings, questions, held, photos, size, None, None, hashes, show)]
    for index, path in enumerate(settings.loras):
        with models.applied(pipeline, path, settings.weight):
            variants.append(
                _variant(
                    pipeline, settings, questions, held, photos, size, index, variants[0], hashes, show, metadata[0]
                )
            )
    rows = [*measures.pixel_rows(variants), *measures.drift_rows(variants, DRAWS)]
    rows += measures.held_rows(variants, held, len(TIMESTEPS) * DRAWS) if held.texts else []
    shots = [(question, seed) for question in questions for seed in settings.seeds]
    more, used = extras.measure(
        measuring, variants, shots, held, photos, device, lambda label, done, total: show(label, done, total, {})
    )
    facts = _facts(settings, parts, pipeline, size, device, dtype, time.monotonic() - begun)
    result = Result(
        settings,
        questions,
        source,
        variants,
        [*rows, *more],
        measuring.missing,
        facts,
        {**hashes, **used},
        TIMESTEPS,
        DRAWS,
        notes,
        held,
        photos,
    )
    show("writing", 0, 1, {})
    path = write(result)
    show("writing", 1, 1, {})
    return path


def _texts(settings: Request, metadata: Mapping[str, str], found: tuple[Target, ...]) -> tuple[list[str], str]:
    if settings.prompts:
        return list(settings.prompts), "given"
    counts = prompts.tag_counts(metadata)
    texts = prompts.from_tags(counts, found, PROMPTS)
    if texts:
        return texts, "made from the captions' commonest parts, which the LoRA's metadata counts (ss_tag_frequency)"
    return list(prompts.GENERAL), "general ones: the LoRA's metadata has no captions; --prompt gives others"


def _held_out(
    settings: Request, texts: list[str], metadata: list[Mapping[str, str]], found: tuple[Target, ...]
) -> HeldOut:
    if isinstance(settings.held_out, Path):
        return held_out.given(prompts.read_file(settings.held_out, "--held-out"), found)
    captions = [tag for one in metadata for tag in prompts.tag_counts(one)]
    return held_out.choose(settings.held_out, found, [*texts, *captions])


def _check_out(out: Path) -> None:
    if out.is_file():
        raise SPFError(f"--out {out} is a file. Give a folder; report.html is written into it.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise SPFError(f"--out {out}: the report cannot be written there: {error.strerror or error}.") from error


def _device(settings: Request) -> tuple[torch.device, torch.dtype]:
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SPFError("--device cuda: this PyTorch sees no CUDA GPU. Leave the option out to draw on the CPU.")
    chosen = settings.dtype or ("fp16" if name == "cuda" else "fp32")
    if chosen == "fp16" and name == "cpu":
        raise SPFError("--dtype fp16 needs a GPU. Leave it out, or use fp32 or bf16.")
    return torch.device(name), _DTYPES[chosen]


def _hashes(settings: Request, show: Show) -> dict[str, str]:
    show("hashing", 0, 1, {})
    hashes = models.model_hashes(settings.model)
    for path in settings.loras:
        hashes[str(path)] = models.sha256(path)
    show("hashing", 1, 1, {})
    return hashes


def _variant(
    pipeline: Any, settings: Request, questions: list[Question], held: HeldOut, photos: Photos, size: int,
    index: int | None, base: Variant | None, hashes: Mapping[str, str], show: Show,
    metadata: Mapping[str, str] | None = None,
) -> Variant:  # fmt: skip
    """Draw and probe the pipeline as it is; `index` is None for the base model, else the LoRA's."""
    kind, label = ("base", "base model") if index is None else (("spf", "LoRA"), ("plain", "LoRA 2"))[index]
    if index is None:
        name = Path(settings.model).name or settings.model
        main = next((key for key in hashes if key.startswith(DENOISERS) or key == name), "")
        digest = hashes.get(main, "")
    else:
        name, digest = settings.loras[index].stem, hashes[str(settings.loras[index])]
    seeds = [seed for _ in questions for seed in settings.seeds]
    texts = [question.base for question in questions for _ in settings.seeds]
    texts += [question.full for question in questions for _ in settings.seeds]
    captions = [caption for caption in photos.captions for _ in settings.seeds]
    count, end = len(seeds), 2 * len(seeds) + len(held.texts)
    images = models.draw(
        pipeline,
        [*texts, *held.texts, *captions],
        [*seeds, *seeds, *settings.seeds[:1] * len(held.texts), *settings.seeds * len(photos.captions)],
        steps=settings.steps,
        guidance=settings.guidance,
        size=size,
        batch=settings.batch,
        show=lambda done, total: show(f"{label}: drawing", done, total, {}),
    )
    seen, drifts = [], []
    if base is not None:
        config, total = prompts.map_settings(metadata or {}), len(questions) + len(held.texts)
        for i, question in enumerate(questions):
            found = maps.explain(
                pipeline,
                base.without[i * len(settings.seeds)],
                question.full,
                question.target,
                timesteps=TIMESTEPS,
                kinds=(config.map,),
                gain=config.map_gain,
                layers=config.layers,
                draws=DRAWS,
            )
            seen.append(found)
            show(f"{label}: probing", i + 1, total, {})
        for i, text in enumerate(held.texts):
            drifts.append(maps.unasked(pipeline, base.held[i], text, timesteps=TIMESTEPS, draws=DRAWS))
            show(f"{label}: probing", len(questions) + i + 1, total, {})
    without, with_, unseen = images[:count], images[count : 2 * count], images[2 * count : end]
    return Variant(kind, label, name, digest, without, with_, seen, unseen, drifts, images[end:])


def _facts(
    settings: Request, parts: Any, pipeline: Any, size: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> list[tuple[str, str]]:
    versions = [f"spf-plugin {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    kind = f"{BASE_LABEL[parts.family]}, predicts {parts.process.prediction.replace('_', ' ')}"
    return [
        ("model", f"{settings.model} ({kind})"),
        ("LoRA weight", f"{settings.weight:g}"),
        ("sampling", f"{type(pipeline.scheduler).__name__}, {settings.steps} steps, guidance {settings.guidance:g}, "
         f"{size} pixels, {str(dtype).removeprefix('torch.')}"),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("maps and drift", f"first seed's base image of every prompt, timesteps {', '.join(map(str, TIMESTEPS))}, "
         f"{DRAWS} noise samples each, seed 0"),
        ("versions", ", ".join(versions)),
        ("time", f"{seconds / 60:.1f} minutes on {where}"),
    ]  # fmt: skip


def _numbers(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"values": list(row.values), "n": row.n, "by": row.by}
    return found | ({"groups": {name: list(values) for name, values in row.groups.items()}} if row.groups else {})


def write(result: Result) -> Path:
    """Write the page, the PNGs and `numbers.json`. Returns the page's path.

    Raises:
        SPFError: the folder cannot be written any more.
    """
    out = result.settings.out
    content, pictures = build(result)
    numbers = {
        "hashes": dict(result.hashes),
        "columns": [v.label for v in result.variants],
        "prompts": [{"base": q.base, "full": q.full} for q in result.questions],
        "seeds": list(result.settings.seeds),
        "held_out": {
            "prompts": [{"prompt": t, "group": g} for t, g in zip(result.held.texts, result.held.groups, strict=True)],
            "noted": [{"prompt": text, "why": why} for text, why in result.held.noted],
        },
        "rows": {row.key: _numbers(row) for row in result.rows},
        "not_measured": dict(result.missing),
    }
    try:
        for name, data in pictures.items():
            page.write_bytes(out / name, data)
        page.write_bytes(out / "numbers.json", (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode())
        page.write(out / "report.html", content)
    except OSError as error:
        raise SPFError(f"--out {out}: the report cannot be written there: {error.strerror or error}.") from error
    return out / "report.html"
