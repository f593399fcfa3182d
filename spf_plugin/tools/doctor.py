"""What is installed on this machine and whether sd-scripts or musubi-tuner fits: facts for a bug report.

Every package is imported in a process of its own, so that a broken one (or one that crashes) is a line of the report
and not its end. Nothing here needs torch, and nothing leaves the machine.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import spf_plugin
from spf_plugin.hosts.kohya.rules import trainer_problem
from spf_plugin.hosts.kohya.scripts import named
from spf_plugin.hosts.musubi import scripts as musubi

#: import name -> name of the distribution
PACKAGES = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "toml": "toml",
    "bitsandbytes": "bitsandbytes",
    "xformers": "xformers",
    "lycoris": "lycoris-lora",
    "open_clip": "open_clip_torch",
    "typer": "typer",
    "rich": "rich",
}
NEEDED = ("torch", "safetensors", "toml")
#: What stops where an optional package is installed and broken.
STOPS = {
    "diffusers": "sd-scripts does not start",
    "transformers": "sd-scripts does not start",
    "accelerate": "sd-scripts does not start",
    "bitsandbytes": "the 8-bit optimizers (AdamW8bit of the presets) and spf_base=nf4 do not start",
    "xformers": "--xformers does not start (use --sdpa)",
}
_SECONDS = 120.0
_GIB = 1024**3
_PROBE = """
import importlib, json, sys
for name in sys.argv[2:]:
    found = {}
    try:
        module = importlib.import_module(name)
        found["version"] = str(getattr(module, "__version__", ""))
        if name == "torch":
            exec(sys.argv[1])
    except BaseException as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        found["error"] = f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
    print("\\nSPF" + json.dumps([name, found]), flush=True)
"""
_TORCH = """
torch = module
found["cuda_build"], found["hip_build"] = torch.version.cuda, getattr(torch.version, "hip", None)
found["cuda"] = torch.cuda.is_available()
found["devices"] = []
if found["cuda"]:
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        found["devices"].append([torch.cuda.get_device_name(i), free, total, capability])
    found["bf16"] = bool(torch.version.hip) or torch.cuda.get_device_capability()[0] >= 8  # older cards emulate it
cuda = torch.backends.cuda
kinds = {"flash": "flash_sdp_enabled", "memory-efficient": "mem_efficient_sdp_enabled", "math": "math_sdp_enabled"}
found["attention"] = [name for name, ask in kinds.items() if getattr(cuda, ask, bool)()]
found["sdpa"] = hasattr(torch.nn.functional, "scaled_dot_product_attention")
"""


@dataclass(frozen=True)
class Package:
    """One package: `version` is empty where it is not installed, `error` where it can be imported."""

    name: str
    version: str = ""
    error: str = ""

    @property
    def state(self) -> str:
        if self.error:
            return f"{self.version or 'installed'}, cannot be imported: {self.error}"
        return self.version or "not installed"


@dataclass
class Doctor:
    """Everything found.

    Attributes:
        plugin: version of SPF.
        system: operating system, Python, environment.
        packages: versions and states.
        torch: what torch says of the GPU and of attention; empty where it cannot be imported.
        disks: `(what, folder, free bytes)`.
        host: training script, or several -> what SPF says of it, for the folder that was given.
        host_name: `sd-scripts` or `musubi-tuner`.
        host_version: its release as far as its files tell.
        problems: what would keep a run from starting.
    """

    plugin: str = spf_plugin.__version__
    system: dict[str, str] = field(default_factory=dict)
    packages: list[Package] = field(default_factory=list)
    torch: dict[str, Any] = field(default_factory=dict)
    disks: list[tuple[str, str, int]] = field(default_factory=list)
    host: dict[str, str] = field(default_factory=dict)
    host_name: str = "sd-scripts"
    host_version: str = ""
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def package(self, name: str) -> Package:
        return next(package for package in self.packages if package.name == name)


def import_elsewhere(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Import packages in a process of its own: per package its version (and torch's facts), or the error.

    A package that ends the process is the last thing the process tried; the others follow in another.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = list(names)
    while waiting:
        ended = ""
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE, _TORCH, *waiting],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                env={**os.environ, "BITSANDBYTES_NOWELCOME": "1"},
            )
            output = done.stdout
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            ended = f"the import ended Python with status {done.returncode}" + (f": {lines[-1]}" if lines else "")
        except subprocess.TimeoutExpired as stopped:
            output = (
                stopped.stdout if isinstance(stopped.stdout, str) else (stopped.stdout or b"").decode(errors="replace")
            )
            ended = f"the import was not done after {_SECONDS:.0f} seconds"
        for line in output.splitlines():
            if line.startswith("SPF["):
                name, facts = json.loads(line[3:])
                found[name] = facts
        waiting = [name for name in waiting if name not in found]
        if waiting:
            found[waiting.pop(0)] = {"error": ended}
    return found


def look_at_packages(
    ask: Callable[[Sequence[str]], dict[str, dict[str, Any]]] = import_elsewhere,
) -> tuple[list[Package], dict[str, Any]]:
    """The state of every package, and what torch says of the GPU."""
    versions: dict[str, str] = {}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    here = [name for name, version in versions.items() if version or importlib.util.find_spec(name)]
    answers = ask(here)
    packages = []
    torch: dict[str, Any] = {}
    for name, version in versions.items():
        facts = answers.get(name, {})
        packages.append(Package(name, facts.get("version") or version, facts.get("error", "")))
        if name == "torch":
            torch = {k: v for k, v in facts.items() if k not in ("version", "error")}
    return packages, torch


# -- sd-scripts -------------------------------------------------------------------------------------------------------


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """What stands for a method whose name alone matters."""


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def trainer_class(folder: Path, script: str) -> type | None:
    """The trainer class of a script, with its methods' names and nothing in them: enough to ask whether SPF fits.

    sd-scripts is read and not imported, as its import takes long and needs everything to be right.
    """
    base_nodes = _classes(folder / "train_network.py")
    nodes = {**base_nodes, **_classes(folder / script)}

    def make(name: str) -> type:
        node = nodes.get(name)
        if node is None:
            return object
        names = [b.attr if isinstance(b, ast.Attribute) else getattr(b, "id", "") for b in node.bases]
        bases = tuple(dict.fromkeys(make(n) for n in names if n != name)) or (object,)
        methods = {item.name: _nothing for item in node.body if isinstance(item, ast.FunctionDef)}
        return type(name, bases, methods)

    own = [name for name in _classes(folder / script) if name.endswith("Trainer")]
    return make(own[-1]) if own else None


def _described(folder: Path) -> str:
    """`git describe` of a checkout; empty where it is none, or git is not here."""
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--tags", "--always"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
            return done.stdout.strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            pass
    return ""


def host_release(folder: Path) -> str:
    """`git describe` of a checkout, else which training loop its source has."""
    if described := _described(folder):
        return described
    source = (folder / "train_network.py").read_text(encoding="utf-8", errors="replace")
    return "process_batch loop (2025 on)" if "def process_batch" in source else "monolithic loop (up to v0.9.1)"


def look_at_host(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """An sd-scripts folder: release, what SPF says of each training script, and problems."""
    if not (folder / "train_network.py").is_file():
        return "", {}, [f"{folder} is not a copy of sd-scripts: train_network.py is missing. Give its top folder."]
    said, problems, refused = {}, [], []
    for script in sorted(p.name for p in folder.glob("*train_network.py")):
        try:
            trainer = trainer_class(folder, script)
        except (SyntaxError, OSError) as error:
            said[script] = f"cannot be read: {error}"
            continue
        if trainer is None:
            continue
        problem = trainer_problem(trainer())
        known = named(script)
        if problem and (known is None or known.is_dit):
            refused.append(script.removesuffix("_train_network.py"))
            continue
        said[script] = problem or "SPF fits" + (f" ({', '.join(known.models.values())})" if known else "")
        if known is not None and known.dit is not None and not problem:
            network = known.dit.network.replace(".", "/") + ".py"
            if not (folder / network).is_file():
                problem = f"{network}, which makes its LoRA, is missing"
        if problem:
            problems.append(f"{script}: {problem}")
    if refused:
        said["refused"] = f"{', '.join(refused)}: SPF does not know their models"
    if not (folder / "networks" / "lora.py").is_file():
        problems.append(f"{folder / 'networks' / 'lora.py'} is missing: the copy of sd-scripts is not complete.")
    shim = (folder / "networks" / "spf_lora.py").is_file()
    said["spf_lora.py"] = "installed in networks/" if shim else "not in networks/ (spf_plugin.lora needs none)"
    return host_release(folder), said, problems


def look_at_musubi(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """A musubi-tuner folder: release, what SPF says of each LoRA trainer, and problems."""
    package = folder / "src" / "musubi_tuner"
    if not package.is_dir():
        return "", {}, [f"{folder} is not a copy of musubi-tuner: src/musubi_tuner is missing. Give its top folder."]
    problems = []
    loop = package / "training" / "trainer_base.py"
    if "def process_batch" not in _text(loop):
        problems.append(f"{folder} is older than what SPF supports (no process_batch). Update it (tested: v0.3.4).")
    there = [script for script in musubi.SCRIPTS if (package / script.file).is_file()]
    said = {} if problems else {s.file: f"SPF fits ({s.said})" for s in there if s.supported}
    unknown = [
        f"{script.name.removesuffix('_train_network')} ({script.said})" for script in there if not script.supported
    ]
    if unknown:
        said["refused"] = f"{', '.join(unknown)}: SPF does not know their models"
    if not (package / "networks" / "lora.py").is_file():
        problems.append(f"{package / 'networks' / 'lora.py'} is missing: the copy of musubi-tuner is not complete.")
    pinned = re.search(r'^version = "([^"]+)"', _text(folder / "pyproject.toml"), re.M)
    return _described(folder) or (pinned[1] if pinned else ""), said, problems


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# -- all --------------------------------------------------------------------------------------------------------------


def _system() -> dict[str, str]:
    environment = "virtual environment" if sys.prefix != sys.base_prefix else "system Python"
    if os.environ.get("CONDA_DEFAULT_ENV"):
        environment = f"conda {os.environ['CONDA_DEFAULT_ENV']}"
    return {
        "os": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": f"{platform.python_version()} ({environment})",
        "processors": str(os.cpu_count() or "?"),
    }


def _disks() -> Iterator[tuple[str, str, int]]:
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for what, folder in (
        ("working folder", Path.cwd()),
        ("model cache", cache),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        there = next((p for p in [folder, *folder.parents] if p.exists()), None)
        if there is not None:
            yield what, _homely(folder), shutil.disk_usage(there).free


def _homely(path: Path) -> str:
    """A path without the user's name in it: the page is made to be shown to others."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except ValueError:
        return str(path)


def examine(
    host: Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
    *,
    name: Literal["sd-scripts", "musubi-tuner"] = "sd-scripts",
) -> Doctor:
    """Everything.

    Args:
        host: a folder of a trainer, or None.
        progress: called with what is being looked at.
        name: of that trainer.
    """
    found = Doctor(system=_system(), disks=list(_disks()), host_name=name)
    progress("packages")
    found.packages, found.torch = look_at_packages()
    for package in found.packages:
        if package.name in NEEDED and (package.error or not package.version):
            found.problems.append(f"{package.name} is needed: {package.state}")
        elif package.error and package.name in STOPS:
            stops = STOPS[package.name].replace("sd-scripts", name)
            found.problems.append(f"{package.name} is broken, and {stops}: {package.error}")
    low = [f"{what} ({folder})" for what, folder, free in found.disks if free < _GIB]
    if low:
        found.problems.append(f"less than 1 GiB is free in {', '.join(low)}")
    if host is not None:
        progress(name)
        look = look_at_host if name == "sd-scripts" else look_at_musubi
        found.host_version, found.host, problems = look(host)
        found.problems += problems
    return found
