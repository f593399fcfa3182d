"""The rules of the layout: arrows point down, one module patches, importing the package has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spf_plugin"
# From the bottom up: a room may import only rooms on lower levels. A room is a package, or a module beside them.
LEVELS: list[set[str]] = [
    {"__init__", "patching", "terminal"},
    {"errors"},
    {"core", "files"},
    {"seam", "config", "lorafile"},
    {"families", "adapter", "network_args"},
    {"text"},
    {"step", "pairs", "probe"},
    {"enhancement"},
    {"shown"},
    {"hosts.base", "hosts.frames", "hosts.looking", "hosts.answering"},
    {"hosts.resuming"},
    {"hosts.postfix", "hosts.state"},
    {"attachment", "hosts.kohya", "hosts.musubi"},
    {"lora"},
    {"trainer", "hosts.reference"},
    {"tools"},
    {"__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
LONGEST = 400  # lines of a module


def imports(path: Path) -> set[str]:
    """Every module that a file imports, within functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """`hosts/kohya/loop` is in `hosts.kohya`, `core/sfcm` in `core`, `lora` in `lora`."""
    first, *rest = module.removesuffix("/__init__").split("/")
    if first == "hosts":
        return f"hosts.{rest[0]}" if rest else "hosts.base"
    return first


def level(name: str) -> int:
    """A host that is new stands where the reference trainer's does."""
    return LEVEL["hosts.reference"] if name.startswith("hosts.") and name not in LEVEL else LEVEL[name]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    own = room(module)
    for name in imports(PACKAGE / f"{module}.py"):
        parts = name.split(".")
        inside = PACKAGE.joinpath(*parts[1:])
        if parts[0] != "spf_plugin" or not (inside.is_dir() or inside.with_suffix(".py").is_file()):
            continue  # another package's, or something in a module
        other = room("/".join(parts[1:])) if len(parts) > 1 else "__init__"
        assert other == own or level(other) < level(own) or {own, other} == {"trainer", "hosts.reference"}, name


def test_every_package_has_a_door_that_says_what_it_is() -> None:
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core/")])
def test_the_method_imports_only_torch(module: str) -> None:
    others = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} - set(sys.stdlib_module_names)
    assert others <= {"torch", "spf_plugin"}


@pytest.mark.parametrize(
    ("own", "theirs"), [("hosts.kohya", {"library", "train_network", "networks"}), ("hosts.musubi", {"musubi_tuner"})]
)
def test_only_one_package_knows_a_host(own: str, theirs: set[str]) -> None:
    loop = f"spf_plugin.{own}.loop"
    for module in MODULES:
        modules = imports(PACKAGE / f"{module}.py")
        if room(module) != own:
            assert not {name.split(".")[0] for name in modules} & theirs, module
            assert module == "lora" or not any(name.startswith(loop) for name in modules)


def test_families_and_hosts_know_nothing_of_each_other() -> None:
    for module in MODULES:
        modules = imports(PACKAGE / f"{module}.py")
        if module.startswith("families/"):
            assert not any(name.startswith("spf_plugin.hosts") for name in modules), module
        elif module.startswith("hosts/"):
            known = {name for name in modules if name.startswith("spf_plugin.families.")}
            assert {".".join(name.split(".")[:3]) for name in known} <= {"spf_plugin.families.base"}, module


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_long(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_networks_package() -> None:
    """sd-scripts' networks/ is a namespace package; a regular one of ours would shadow it."""
    assert not (ROOT / "networks" / "__init__.py").exists()


def test_importing_the_entry_is_light_and_harmless() -> None:
    code = (
        "import sys, os\n"
        "before = dict(os.environ)\n"
        "import spf_plugin.lora\n"
        "heavy = {'torchvision', 'open_clip', 'diffusers', 'transformers', 'matplotlib', 'typer', 'lycoris'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert dict(os.environ) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_bare_folder_on_the_path(tmp_path: Path) -> None:
    """Some users copy spf_plugin/ beside their trainer and install nothing."""
    import shutil

    shutil.copytree(PACKAGE, tmp_path / "spf_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import spf_plugin, spf_plugin.lora; print(spf_plugin.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert str(tmp_path) in done.stdout, done.stderr
