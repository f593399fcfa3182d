"""The messages that users can meet, read from the source: texts with a gap where a value goes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spf_plugin"
GAP = "\0"
#: Where a message is made and raised later: `module: functions` (all of them where empty).
MADE = {
    "config.py": set(),
    "files.py": {"impossible"},
    "network_args.py": set(),
    "core/prompt.py": {"parse_targets"},
    "core/coverage.py": {"problems"},
    "hosts/kohya/rules.py": {
        "trainer_problem",
        "look",
        "_base_problems",
        "_target_problems",
        "_dit_problems",
        "_dropout_problems",
        "_early_layers",
        "_noisy_text",
        "_skipped_warnings",
    },
    "hosts/kohya/cached_text.py": set(),
    "hosts/kohya/own_targets.py": {"readable"},
    "hosts/musubi/rules.py": set(),
    "hosts/musubi/loop.py": {"problems"},
    "hosts/musubi/replay.py": {"problems"},
    "hosts/musubi/caching.py": {"problems"},
    "hosts/resuming.py": set(),
    "hosts/looking.py": {"repeated", "folder_problems", "name_problems"},
    "adapter/quantised.py": {"problems", "device_problems"},
    "lorafile/record.py": {"problem"},
    "trainer/cache.py": {"_said"},
    "trainer/start.py": {"ready", "_resolution_problems"},
    "tools/cli/train.py": {"key_values"},
    "tools/check/musubi/options.py": {"parse_words", "value_of"},
    "tools/check/source.py": {"parse_words", "value_of"},
}
#: Functions that return messages.
RETURNED = {
    "problem",
    "name_problems",
    "impossible",
    "trainer_problem",
    "_read_file",
    "parse",
    "key_values",
    "check_words",
    "check_targets",
    "by_time",
    "by_encoding",
    "_skipped_warnings",
    "folder_problems",
    "repeated",
}
#: ValueErrors of the mathematics, which no setting leads to.
INTERNAL = {"core/sfcm.py", "core/losses.py"}


@dataclass(frozen=True)
class Message:
    """One message of the source: its text, with `GAP` for every value, its line, and the function that makes it."""

    text: str
    place: str
    function: str

    def holds(self, quote: str) -> bool:
        """Whether the words of a quote, with `...` for its gaps, stand in this message in their order."""
        position = 0
        for words in quote.split("..."):
            words = words.strip(" .")  # "...." is a gap before a full stop, or behind one
            found = self.text.find(words, position)
            if found < 0:
                return False
            position = found + len(words)
        return True

    def made(self, said: str) -> bool:
        """Whether these words hold this message, with values in its gaps."""
        return re.search(".*".join(map(re.escape, self.text.split(GAP))), said, re.DOTALL) is not None


def _texts(node: ast.expr | None) -> Iterator[str]:
    """The text of an expression with gaps; both sides of a choice; every element of a list."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        choices = [list(_texts(part)) or [GAP] for part in node.values]
        yield from map("".join, product(*choices))
    elif isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        yield from (list(_texts(node.value.body)) or [GAP]) + (list(_texts(node.value.orelse)) or [GAP])
    elif isinstance(node, ast.BinOp):
        left = list(_texts(node.left)) or [GAP]
        right = list(_texts(node.right)) or [GAP]
        yield from (a + b for a in left[:1] for b in right[:1])
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body), *_texts(node.orelse))
    elif isinstance(node, ast.List | ast.Tuple):
        for element in node.elts:
            yield from _texts(element)
    elif isinstance(node, ast.ListComp):
        yield from _texts(node.elt)


def _found(path: Path) -> Iterator[Message]:
    name = path.relative_to(PACKAGE).as_posix()
    made = MADE.get(name)

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        here = made is not None and (not made or function in made)
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            raises = called == "SPFError" or (called == "ValueError" and here)
            if node.args and (raises or (called == "append" and here)):
                for text in _texts(node.args[0]):
                    yield text, node.lineno, function
        if isinstance(node, ast.Return | ast.Assign) and here and function in RETURNED:
            for text in _texts(node.value):
                yield text, node.lineno, function
        if isinstance(node, ast.AugAssign) and here:
            for text in _texts(node.value):
                yield text, node.lineno, function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    for text, line, function in visit(ast.parse(path.read_text(encoding="utf-8")), ""):
        if len(text.replace(GAP, "").split()) > 1 and not text.startswith("|"):
            yield Message(text, f"{name}:{line}", function)


def all_messages() -> list[Message]:
    """Every message of every module."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).as_posix() not in INTERNAL]
    return [message for path in paths for message in _found(path)]


if __name__ == "__main__":
    for message in all_messages():
        print(message.place, message.text.replace(GAP, "..."))
