"""Commands, settings and code in the documentation, as its readers would copy them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "portraitlab" / "model" / "README.md",
    ]
)
PROGRAMS = ("spf", "python", "pip", "pytest", "accelerate", "git", "export", "uv")
#: What a reader fills in, where a command line insists on a number or one of several words.
_FILLED_IN = {"GB": "12", "kohya|diffusers|peft|comfyui": "kohya"}


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        page: where it stands, relative to the repository.
        line: number of its (first) line.
        words: it, without variables before it and comments behind it.
        whole: a line of its own, to be copied; else a mention in a sentence, which may leave arguments out.
    """

    page: str
    line: int
    words: tuple[str, ...]
    whole: bool

    @property
    def program(self) -> str:
        """`python` for `venv/bin/python` and `python\\python.exe`; `pip` for `python -m pip`, `!pip` and `uv pip`."""
        name = re.split(r"[/\\]", self.words[0])[-1].removesuffix(".exe").removeprefix("!")
        if (name, *self.words[1:3]) == ("python", "-m", "pip") or (name, *self.words[1:2]) == ("uv", "pip"):
            return "pip"
        return name

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def reading_words(page: Path) -> int:
    """Words of a page that are read: no code, no comments, and no tables, which are looked up."""
    text = re.sub(r"<!--.*?-->|^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return sum(len(line.split()) for line in text.splitlines() if not line.startswith(("|", "    ")))


def links(page: Path) -> list[Path]:
    """The files of this repository that a page links to, in its order."""
    found = re.findall(r"\]\(([^)#\s:]+)", page.read_text(encoding="utf-8"))
    return [(page.parent / target).resolve() for target in found]


def _words(text: str) -> tuple[str, ...]:
    text = re.sub(r"\s+#.*$", "", re.sub(r"^(?:\w+=\S+\s+)+(?=\w)", "", text.strip()))
    words = [re.sub(r"\.\.\.$", "", word) for word in shlex.split(text.replace("\\", "\\\\"))]
    return tuple(_FILLED_IN.get(word, word) for word in words if word)


def blocks(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Fenced and indented blocks: number of the first line, language, lines with continuations joined."""
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            language, first = lines[i][3:].strip(), i + 1
            end = next(n for n in range(first, len(lines)) if lines[n].startswith("```"))
            yield first + 1, language, _joined(lines[first:end])
            i = end + 1
        elif re.match(r" {4,}\S", lines[i]) and not lines[i - 1].strip():
            end = next((n for n in range(i, len(lines)) if not re.match(r" {4,}\S", lines[n])), len(lines))
            yield i + 1, "", _joined([line.strip() for line in lines[i:end]])
            i = end
        else:
            i += 1


def _joined(lines: list[str]) -> list[str]:
    return re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).split("\n")


def is_command(line: str) -> bool:
    """Whether a line, or the text of a code span, starts a program that we know."""
    words = line.split()
    first = next((word for word in words if not re.fullmatch(r"\w+=\S+", word)), "")
    return len(words) > 1 and re.split(r"[/\\]", first)[-1].removesuffix(".exe").removeprefix("!") in PROGRAMS


def commands() -> list[Command]:
    """All of them: lines of blocks, and code spans."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for first, language, lines in blocks(page):
            if language in ("", "sh", "bash", "console"):
                found += [Command(name, first + n, _words(x), True) for n, x in enumerate(lines) if is_command(x)]
        prose = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"), flags=re.M | re.S)
        for match in re.finditer(r"`([^`]+)`", prose):
            text = re.sub(r"\s+", " ", match[1].replace(r"\|", "|"))
            sentence = text.endswith("...)") or re.search(r"[^.]\.$", text)  # an error message that begins so
            if is_command(text) and not sentence:
                found.append(Command(name, prose.count("\n", 0, match.start()) + 1, _words(text), False))
    return found
