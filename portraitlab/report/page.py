"""One self-contained HTML page: pictures are inside it, nothing is fetched, no scripts."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portraitlab.report.figures import Image8, png

TEMPLATE = Path(__file__).with_name("page.html")


def data_uri(picture: bytes | Image8) -> str:
    """A PNG, or an image `[H, W, 3]` uint8, as the source of an `img`."""
    content = picture if isinstance(picture, bytes) else png(picture)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(image: bytes | Image8, alt: str, **more: str) -> dict[str, str]:
    """What the template needs of one picture."""
    return {"src": data_uri(image), "alt": alt, **more}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Fill in the template and write the page in one piece.

    Args:
        path: the HTML file.
        content: the template's variables; a missing one is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=False, keep_trailing_newline=True
    )
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)
    write_bytes(path, html.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    os.replace(aside, path)
