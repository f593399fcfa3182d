"""`spf decoder`: fit the matrix that turns a model's latents into colours, for `spf_decoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from spf_plugin.errors import SPFError
from spf_plugin.tools.cli.console import Console
from spf_plugin.tools.cli.progress import progress_bars

ENOUGH = 4  # images; each gives as many equations as the model has latents


def decoder(
    model: Annotated[str, typer.Option(help="The model whose VAE is meant: diffusers folder, hub name, or one file.")],
    data: Annotated[Path, typer.Option(help="Folder of images, searched with its subfolders; no captions needed.")],
    out: Annotated[Path, typer.Option(help="The file to write, NAME.safetensors.")],
    images: Annotated[int, typer.Option(min=ENOUGH, help="At most so many images, evenly chosen.")] = 64,
    resolution: Annotated[
        int | None, typer.Option(help="Side length in pixels.", show_default="the model's own")
    ] = None,
) -> None:
    """Fit the cheapest decoder of the response term for a VAE that has none built in."""
    console = Console(soft_wrap=True)
    try:
        error, count = fit(model, data, out, images, resolution, console)
    except SPFError as problem:
        console.print(escape(str(problem)), style="red", highlight=False)
        raise typer.Exit(2) from None
    console.print(
        f"wrote {escape(str(out))}: misses {error:.3f} (root mean square, pixels in [-1, 1]) on {count} images"
    )
    console.print(f"use it with  spf_decoder={escape(str(out))}")


def fit(
    model_name: str, data: Path, out: Path, images: int, resolution: int | None, console: Console
) -> tuple[float, int]:
    """Fit and write the matrix; returns its error and the number of images.

    Raises:
        SPFError: too few readable images, no such model, or a file name that does not end in .safetensors.
    """
    import torch

    from spf_plugin.enhancement.decoders import fit_linear, save_linear
    from spf_plugin.trainer.data import IMAGE_ENDINGS, load_image
    from spf_plugin.trainer.models import load

    if out.suffix != ".safetensors":
        raise SPFError(f"--out {out}: the name must end in .safetensors.")
    if not data.is_dir():
        raise SPFError(f"--data {data}: there is no such folder.")
    found = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if len(found) < ENOUGH:
        raise SPFError(f"--data {data}: {len(found)} images found, at least {ENOUGH} are needed.")
    chosen = found[:: max(1, len(found) // images)][:images]
    model = load(model_name)
    side = resolution or model.resolution
    random = torch.Generator().manual_seed(0)
    latents, pixels = [], []
    with progress_bars(console) as show:
        for i, path in enumerate(chosen, 1):
            try:
                picture = load_image(path, side).pixels
            except Exception as problem:  # whatever Pillow raises
                raise SPFError(f"{path} cannot be read as an image: {problem}") from problem
            latents.append(model.to_latents(picture, random))
            pixels.append(picture)
            show("encoding images", i, len(chosen), {})
    fitted, error = fit_linear(torch.stack(latents), torch.stack(pixels))
    save_linear(fitted, out)
    return error, len(chosen)
