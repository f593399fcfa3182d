"""`spf report`: what a LoRA changes in a model, and what else it changes, on one page."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from spf_plugin.errors import SPFError
from spf_plugin.files import expanded
from spf_plugin.tools.cli.console import Console, say
from spf_plugin.tools.cli.lacking import lacking
from spf_plugin.tools.cli.numbers import finite
from spf_plugin.tools.cli.progress import progress_bars

INTERRUPTED = 130

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


class Device(str, Enum):
    """Where to draw."""

    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    """Precision of the UNet and the text encoders."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def whole_numbers(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers.

    Raises:
        SPFError: something else.
    """
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise SPFError(f"--seeds {text!r}: write whole numbers with commas, such as 0,1,2.")
    return found


def held_out_of(text: str) -> int | Path:
    """A number of prompts of the bank, or a text file.

    Raises:
        SPFError: neither.
    """
    if text.strip().isdecimal():
        return int(text)
    path = expanded(Path(text))
    if not path.exists():
        raise SPFError(f"--held-out {text}: no number of prompts, and no file.")
    return path


@app.command()
def report(
    model: Annotated[str, typer.Option(help="Base model: diffusers folder, hub name, or one .safetensors file.")],
    lora: Annotated[Path, typer.Option(help="The LoRA file.")],
    lora2: Annotated[Path | None, typer.Option(help="A second one to compare with, such as a plain one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="report-LORA")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeatable. The target is added where it is missing.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    target: Annotated[str | None, typer.Option(help="The target, if the file does not say it. Several with |.")] = None,
    held_out: Annotated[
        str,
        typer.Option(
            metavar="N|FILE",
            help="Also ask for so many prompts that nobody trained, of the plugin's own bank (0: none), or for those "
            "of a text file. Each costs a picture per model, and ten predictions with and ten without each LoRA.",
        ),
    ] = "12",
    seeds: Annotated[str, typer.Option(help="Seeds of the samples, with commas.")] = "0,1",
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, callback=finite, help="Classifier-free guidance.")] = 7.0,
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels.", show_default="the model's")] = None,
    weight: Annotated[float, typer.Option(callback=finite, help="Weight of the LoRAs.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    device: Annotated[Device | None, typer.Option(help="Where.", show_default="GPU if there is one")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision.", show_default="fp16 on a GPU")] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Measure with this CLIP model: a transformers folder, or open_clip's MODEL:PRETRAINED."),
    ] = None,
    dino: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure drift by DINOv2, as PEFT's comparison does: a transformers folder or hub name, such as "
            "facebook/dinov2-base.",
        ),
    ] = None,
    subject: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure by --dino the likeness to photos of the target that were kept back from training, each with "
            "its caption beside.",
        ),
    ] = None,
    lpips: Annotated[
        str | None,
        typer.Option(metavar="alex|FILE", help="Measure LPIPS: torchvision's AlexNet, or its weights as .safetensors."),
    ] = None,
    faces: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure face identity: a folder with YuNet's and SFace's .onnx files from OpenCV's model zoo.",
        ),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure segmentation consistency: a transformers folder or hub name, such as a face parser's.",
        ),
    ] = None,
    target_class: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The target's class in it. Several with |.", show_default="what the target says"
        ),
    ] = None,
) -> None:
    """Show what a LoRA changes in a model, and what it changes unasked, on one self-contained page.

    The base model and the LoRA draw the same prompts from the same seeds, without and with the target; the prompts come
    from the LoRA's own metadata unless you give some. Nothing is downloaded unless you name it.

    Example: spf report --model sd15/ --lora hair-spf.safetensors --lora2 hair-plain.safetensors
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        given = list(prompt or [])
        with console.status("starting"):
            from spf_plugin.tools.report.prompts import read_file
            from spf_plugin.tools.report.results import Request
            from spf_plugin.tools.report.run import run
        if prompts is not None:
            given += read_file(expanded(prompts))
        settings = Request(
            model=model,
            loras=tuple(expanded(path) for path in (lora, lora2) if path is not None),
            out=expanded(out or Path(f"report-{lora.stem}")),
            prompts=tuple(given),
            target=target,
            seeds=whole_numbers(seeds),
            steps=steps,
            guidance=guidance,
            size=size,
            weight=weight,
            batch=batch_size,
            device=device.value if device else None,
            dtype=dtype.value if dtype else None,
            clip=clip,
            dino=dino,
            subject=expanded(subject) if subject is not None else None,
            lpips=lpips,
            faces=faces,
            segmentation=segmentation,
            target_class=target_class,
            held_out=held_out_of(held_out),
        )
        with progress_bars(console) as show:
            path = run(settings, show, lambda text: console.print(f"note: {escape(text)}", highlight=False))
    except ImportError as error:
        console.print(escape(lacking("spf report", error, "report")), style="red", highlight=False)
        raise typer.Exit(2) from None
    except SPFError as error:
        console.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; no report was written", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
    say(f"report {path.resolve()}")
