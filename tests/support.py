"""What is supported, and what was run where: the tables of docs/support.md, from what the code accepts and tests.

`python -m tests.support` writes them. A host's rows come from one function in `HOSTS`; another host is one more.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from spf_plugin.families.known import FAMILIES
from spf_plugin.hosts.kohya.scripts import SCRIPTS, Script
from spf_plugin.hosts.musubi import architectures, scripts
from spf_plugin.tools import plan_musubi
from tests.hosts.conftest import RELEASES
from tests.hosts.dits.kinds import KINDS
from tests.hosts.musubi import kinds as musubi_kinds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
#: A release of `tests.hosts.conftest.RELEASES` -> the commit that is checked out for it, and what it is called.
CHECKOUTS = {
    "v0.9": ("v0.9.1", "v0.9.1"),
    "v0.10": ("48d368fa557731ad0488c07304dfeba8c07910eb", "main of February 2026"),
    "v0.11": ("v0.11.1", "v0.11.1"),
}
#: The same of musubi-tuner.
MUSUBI_CHECKOUT = ("30c658c4f4b0bf05038b3346eff9670259b10fc7", "v0.3.4")
#: What ran outside the suite's usual machine, by the host and where; nothing here follows from the code.
ELSEWHERE = {
    "sd-scripts": {
        "UNets": "50 of 191 tests on an H200 with earlier defaults, 41 passed "
        "([what failed](../CONTRIBUTING.md#tests)); not since",
        "transformers": "never",
    },
    "musubi-tuner": {"all": "never"},
    "spf train": {"all": "lab rows of earlier defaults on an H200 ([figures](lab-figures.md#on-a-gpu))"},
}


@dataclass(frozen=True)
class Row:
    """One trainer of a host.

    Attributes:
        host: whose it is.
        trainer: how it is started.
        models: what it trains, as people say it.
        family: modules in `spf_plugin/families` that know these models.
        accepted: versions of the host that SPF takes.
        everything: number of test functions that train with it, and the version that runs all of them.
        contract: those of them that hold what SPF takes for granted, and the versions that run only these.
        presets: in `presets/`.
        plan: `spf plan` knows its sizes.
        gpu: what ran on one.
    """

    host: str
    trainer: str
    models: str
    family: str
    accepted: str
    everything: str
    contract: str
    presets: Sequence[str]
    plan: bool
    gpu: str

    def cells(self) -> list[str]:
        return [
            self.host,
            f"`{self.trainer}`",
            self.models,
            self.family,
            self.accepted,
            self.everything,
            self.contract,
            ", ".join(f"`{name}`" for name in self.presets) or "none",
            "yes" if self.plan else "no",
            self.gpu,
        ]


HEAD = (
    "host",
    "trainer",
    "models",
    "family",
    "accepted",
    "everything runs on",
    "the contract runs on",
    "presets",
    "`spf plan`",
    "on a GPU",
)


# -- what the tests say of themselves ---------------------------------------------------------------------------------


def marks(function: Any) -> Iterator[Any]:
    """A test's markers, and those of single values of its parameters."""
    for mark in getattr(function, "pytestmark", ()):
        yield mark
        for value in mark.args[1] if mark.name == "parametrize" else ():
            yield from getattr(value, "marks", ())


def tests_with(fixture: str) -> Iterator[tuple[str, Any]]:
    """The test functions of `tests/hosts` that ask for a fixture."""
    for file in sorted((ROOT / "tests" / "hosts").glob("test_*.py")):
        module = importlib.import_module(f"tests.hosts.{file.stem}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and name.startswith("test_") and fixture in inspect.signature(function).parameters:
                yield f"{file.name}::{name}", function


def tests_of(kind: str | None) -> tuple[list[str], list[str]]:
    """All tests that train a kind of transformer (None: a UNet) in sd-scripts, and those that are the contract."""
    everything, contract = [], []
    for name, function in tests_with("dit" if kind else "host"):
        found = {mark.name: mark for mark in marks(function)}
        if kind and kind not in (found["kinds"].args if "kinds" in found else KINDS):
            continue
        everything.append(name)
        shared = found.get("contract")
        if shared is not None and (not kind or kind in (shared.args or KINDS)):
            contract.append(name)
    return everything, contract


# -- hosts ------------------------------------------------------------------------------------------------------------


def module_of(model: str) -> str:
    """The family's file for one of sd-scripts' kinds of model."""
    known = {family.__module__.rsplit(".", 1)[-1] for family in FAMILIES}
    return {"chroma": "flux"}.get(model, model if model in known else "unet")


def presets() -> Mapping[str, list[str]]:
    """Trainer's file -> the presets whose first lines start it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "presets").rglob("*.toml")):
        started = re.search(r"^# Use: accelerate launch (?:\S+/)?(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if started:
            found.setdefault(started[1].rpartition("/")[2], []).append(path.stem)
    return found


def planned() -> set[str]:
    """The models that `spf plan` has sizes of."""
    tools = ROOT / "spf_plugin" / "tools"
    names = ("plan.json", "plan_dit.json", "plan_musubi.json")
    files = [json.loads((tools / name).read_text(encoding="utf-8")) for name in names]
    return {model for file in files for model in file["models"]}


def sd_scripts() -> Iterator[Row]:
    """The trainers that its host takes."""
    known, sizes = presets(), planned()
    names = {release: CHECKOUTS[release][1] for release in RELEASES}
    for script in filter(lambda script: script.supported, SCRIPTS):
        whole = [names["v0.10"]] if script.is_dit else [names["v0.9"], names["v0.10"]]
        kinds: list[str | None] = [*script.models] if script.is_dit else [None]
        counts = {kind: tests_of(kind) for kind in kinds}
        some = {kind: f" for {script.models[kind]}" if kind and len(kinds) > 1 else "" for kind in kinds}
        whose = "" if script.is_dit else " of both UNet trainers"
        yield Row(
            "sd-scripts",
            script.file,
            ", ".join(script.models.values()),
            ", ".join(sorted({f"`{module_of(model)}.py`" for model in script.models})),
            accepted(script),
            f"{', '.join(whole)}: "
            + ", ".join(f"{len(everything)} tests{some[kind]}{whose}" for kind, (everything, _) in counts.items()),
            f"{names['v0.11']}: " + ", ".join(f"{len(held)} of them{some[kind]}" for kind, (_, held) in counts.items()),
            known.get(script.file, ()),
            set(script.models) <= sizes,
            ELSEWHERE["sd-scripts"]["transformers" if script.is_dit else "UNets"],
        )


def accepted(script: Script) -> str:
    """Only the loop of 2025 has transformers in one with the UNets' (`rules.trainer_problem`)."""
    return "from v0.10 (2025) to v0.11.x" if script.is_dit else "v0.8.7 to v0.11.x"


def musubi_tests(kind: str) -> list[str]:
    """All tests that train a kind in musubi-tuner, by the rule of its `conftest.pytest_generate_tests`."""
    found = []
    for file in sorted((ROOT / "tests" / "hosts" / "musubi").glob("test_*.py")):
        module = importlib.import_module(f"tests.hosts.musubi.{file.stem}")
        whole = getattr(module, "pytestmark", ())
        whole = whole if isinstance(whole, list | tuple) else [whole]
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if not (own and name.startswith("test_") and "musubi" in inspect.signature(function).parameters):
                continue
            named = {mark.name: mark for mark in (*whole, *getattr(function, "pytestmark", ()))}
            shared = musubi_kinds.KINDS if "contract" in named else musubi_kinds.KINDS[:1]
            if kind in (named["kinds"].args if "kinds" in named else shared):
                found.append(f"{file.name}::{name}")
    return found


def musubi_tuner() -> Iterator[Row]:
    """The trainers that its host takes."""
    known, sizes = presets(), planned()
    first = musubi_kinds.KINDS[0]
    for script in filter(lambda script: script.supported, scripts.SCRIPTS):
        kinds = [name for name in musubi_kinds.KINDS if script.arch == musubi_kinds.kind(name).ARCH]
        counts = " and ".join(str(len(musubi_tests(kind))) for kind in kinds)
        family = architectures.named(script.arch).family
        module = next(f.__module__.rsplit(".", 1)[-1] for f in FAMILIES if f.__name__ == family)
        yield Row(
            "musubi-tuner",
            script.file,
            script.said + (" 2.1, 2.2: text to image and video" if script.clips else ""),
            f"`{module}.py`",
            MUSUBI_CHECKOUT[1],
            f"{MUSUBI_CHECKOUT[1]}: {counts} tests" if first in kinds else "",
            "" if first in kinds else f"{MUSUBI_CHECKOUT[1]}: {counts} tests",
            known.get(script.file, ()),
            {name for name, model in plan_musubi.MODELS.items() if model.arch == script.arch} <= sizes,
            ELSEWHERE["musubi-tuner"]["all"],
        )


def reference() -> Iterator[Row]:
    """SPF's own trainer."""
    files = ("test_reference_trainer.py", "test_sd3_diffusers.py")
    sources = [(ROOT / "tests" / name).read_text(encoding="utf-8") for name in files]
    count = sum(len(re.findall(r"^def test_", source, re.MULTILINE)) for source in sources)
    yield Row(
        "its own",
        "spf train",
        "SD 1.x, SD 2.x, SDXL; SD3 in diffusers' format",
        "`unet.py`, `sd3_diffusers.py`",
        "diffusers 0.25 or newer",
        f"the suite's diffusers: {count} tests, and the demo on the embedded model",
        "",
        (),
        True,
        ELSEWHERE["spf train"]["all"],
    )


HOSTS: Sequence[Callable[[], Iterator[Row]]] = (sd_scripts, musubi_tuner, reference)


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def trainers_table() -> str:
    return markdown(HEAD, [row.cells() for host in HOSTS for row in host()])


def packages_table() -> str:
    """What has to be there, from `pyproject.toml`."""
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [["Python", project["requires-python"].removeprefix(">="), "always"]]
    wanted = {"always": project["dependencies"], **project["optional-dependencies"]}
    for extra, packages in wanted.items():
        for package in packages:
            found = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", package)
            if found:  # and no extra of our own
                lines.append([found[1], found[2] or "any", extra if extra == "always" else f"for `[{extra}]`"])
    return markdown(("package", "oldest version", "needed"), lines)


TABLES = {"trainers": trainers_table, "packages": packages_table}


def filled(text: str) -> str:
    """A page with its tables, each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert len(block.findall(text)) == 1, name
        text = block.sub(lambda match, table=table: f"{match[1]}\n{table()}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
