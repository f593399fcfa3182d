"""One self-contained HTML page: pictures are inside it, nothing is fetched, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spf_plugin.files import replace
from spf_plugin.tools.report.figures import Image8, jpeg, png

FOLDER = Path(__file__).parent
TEMPLATE = FOLDER / "page.html"
#: Pictures whose longer side has more pixels go into the page smaller, and as JPEG.
SHOWN_SIDE = 384


def data_uri(picture: bytes | Image8) -> str:
    """A PNG, or an image `[H, W, 3]` uint8, as the source of an `img`."""
    if isinstance(picture, bytes):
        return "data:image/png;base64," + base64.b64encode(picture).decode()
    if max(picture.shape[:2]) > SHOWN_SIDE:
        return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture, SHOWN_SIDE)).decode()
    return data_uri(png(picture))


def picture(image: bytes | Image8, alt: str, **more: str) -> dict[str, str]:
    """What the template needs of one picture."""
    return {"src": data_uri(image), "alt": alt, **more}


def write(path: Path, content: Mapping[str, Any], template: Path = TEMPLATE) -> None:
    """Fill in the template and write the page in one piece.

    Args:
        path: the HTML file.
        content: the template's variables; a missing one is an error.
        template: it may extend `layout.html` and import `parts.html`, which lie here.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, FOLDER], encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    write_bytes(path, environment.get_template(template.name).render(content).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    replace(aside, path)
