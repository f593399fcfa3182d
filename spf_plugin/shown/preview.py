"""A picture of what SPF does to one training sample: both predictions, the control map, where each phrase looks."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

TILE = 256  # pixels of a tile's longer side
COLUMNS = 4
GAP, LINE = 8, 20
FONT_SIZE = 14
PHRASES = 7  # with the control map and the predictions, at most three rows
BACKGROUND, INK, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
# A dark to bright ramp that also reads without colour vision (inferno, five stops).
RAMP = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]) / 255
OVERLAY = 0.6  # how much of the ramp covers the prediction


@dataclass(frozen=True)
class Sample:
    """One sample of one step, on the CPU.

    Attributes:
        caption: its whole prompt.
        facts: a line about the step.
        base: what the base model would draw of the base prompt, `[3, h, w]` in [0, 1].
        trained: what the trained model would draw of the whole prompt, `[3, h, w]` in [0, 1].
        control: the control map, `[h, w]` in [0, 1].
        phrases: phrase -> where it looks, `[h, w]` in [0, 1]; the target is the first.
    """

    caption: str
    facts: str
    base: Tensor
    trained: Tensor
    control: Tensor
    phrases: Mapping[str, Tensor]


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Colours of `heat` `[h, w]` over the brightness of `image` `[3, h, w]`, both in [0, 1]; `[3, h, w]`."""
    position = heat.clamp(0, 1) * (len(RAMP) - 1)
    low = position.floor().long().clamp(max=len(RAMP) - 2)
    part = (position - low)[..., None]
    colour = (RAMP[low] * (1 - part) + RAMP[low + 1] * part).permute(2, 0, 1)
    return (1 - OVERLAY) * image.mean(dim=0, keepdim=True) + OVERLAY * colour


def _font() -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(FONT_SIZE)
    except (TypeError, OSError):  # Pillow before 10.1, or without FreeType: a bitmap font
        return ImageFont.load_default()


def render(sample: Sample) -> Image.Image:
    """The picture, with its words. Pillow only; about 20 ms."""
    from PIL import Image, ImageDraw

    tiles = [
        ("base model, without the target", sample.base),
        ("with this LoRA", sample.trained),
        ("control map: bright may change", overlay(sample.trained, sample.control)),
    ]
    for i, (phrase, heat) in enumerate(list(sample.phrases.items())[: PHRASES + 1]):
        tiles.append((f"target: {phrase}" if i == 0 else phrase, overlay(sample.trained, heat)))

    h, w = sample.control.shape
    size = (max(1, round(TILE * h / max(h, w))), max(1, round(TILE * w / max(h, w))))
    columns, rows = min(COLUMNS, len(tiles)), -(-len(tiles) // COLUMNS)
    canvas = Image.new(
        "RGB",
        (GAP + columns * (size[1] + GAP), GAP + 2 * LINE + rows * (size[0] + LINE + GAP)),
        BACKGROUND,
    )
    draw, font = ImageDraw.Draw(canvas), _font()

    def write(x: int, y: int, text: str, room: int, fill: tuple[int, int, int]) -> None:
        text = " ".join(text.split())
        try:
            if draw.textlength(text, font) > room:
                lengths = range(min(len(text), room))
                fitting = bisect(lengths, room, key=lambda n: int(draw.textlength(text[:n] + "…", font)))
                text = text[: max(0, fitting - 1)] + "…"
            draw.text((x, y), text, fill, font)
        except UnicodeEncodeError:  # the bitmap font knows Latin letters only
            write(x, y, text.encode("ascii", "replace").decode(), room, fill)

    write(GAP, GAP, sample.caption, canvas.width - 2 * GAP, INK)
    write(GAP, GAP + LINE, sample.facts, canvas.width - 2 * GAP, FAINT)
    for i, (label, pixels) in enumerate(tiles):
        x, y = GAP + i % COLUMNS * (size[1] + GAP), GAP + 2 * LINE + i // COLUMNS * (size[0] + LINE + GAP)
        large = F.interpolate(pixels[None], size=size, mode="bicubic", align_corners=False)[0]
        data = (large.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        canvas.paste(Image.frombytes("RGB", (size[1], size[0]), data.numpy().tobytes()), (x, y + LINE))
        write(x, y, label, size[1], INK)
    return canvas
