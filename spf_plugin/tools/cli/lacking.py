"""What to install where a library cannot be imported."""

from __future__ import annotations


def lacking(command: str, error: ImportError, extra: str) -> str:
    """One sentence for the console.

    transformers and diffusers put something that raises a nameless ImportError into the place of what needs another
    package; their text says which.

    Args:
        command: whose import it was.
        error: what it raised.
        extra: of this package, which brings the library.
    """
    said = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    what = f"needs {error.name}" if error.name else f"cannot go on: {said}"
    return f'SPF: {command} {what}: pip install "spf-plugin[{extra}]"'
