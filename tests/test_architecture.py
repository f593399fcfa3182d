"""The rules of the layout: arrows point down, one module patches, importing the package has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spf_plugin"
# From the bottom up: a module may import only what stands on a lower level.
LEVELS: list[set[str]] = [
    {"errors", "patching", "prompt"},
    {"config", "sfcm"},
    {"losses", "probe", "adapter", "text", "quantised"},
    {"objective", "pairs"},
    {"host", "saving"},
    {"attachment"},
    {"hosts.kohya"},
    {"lora"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
PURE = {"sfcm", "losses"}  # the maths: torch and the standard library only


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    names = {name.removeprefix("spf_plugin.") for name in imports(path) if name.startswith("spf_plugin.")}
    return names & set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_arrows_point_down(name: str) -> None:
    for imported in own(PACKAGE / f"{name.replace('.', '/')}.py"):
        assert LEVEL[imported] < LEVEL[name] or (name, imported) == ("losses", "sfcm"), f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_maths_imports_only_torch(name: str) -> None:
    others = {i.split(".")[0] for i in imports(PACKAGE / f"{name}.py")} - set(sys.stdlib_module_names)
    assert others <= {"torch", "spf_plugin"}


def test_only_one_module_knows_the_host() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() == "hosts/kohya":
            continue
        modules = {name.split(".")[0] for name in imports(path)}
        assert not modules & {"library", "train_network", "networks"}, path


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
