"""Real sd-scripts checkouts, and a way to run their training scripts on tiny models."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import MadeOnce

LAUNCHER = Path(__file__).with_name("launcher.py")
REPOSITORY = Path(__file__).parents[2]
# glibc hands freed tensors back to the kernel and faults them in again: nearly half of a small CPU training's time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_TOP_PAD_": "268435456"}


def find_hosts() -> list[Path]:
    """Checkouts in `SPF_SD_SCRIPTS` (joined by the path separator) and in `~/.cache/spf-plugin/sd-scripts-*`."""
    named = [Path(p) for p in os.environ.get("SPF_SD_SCRIPTS", "").split(os.pathsep) if p]
    cached = sorted((Path.home() / ".cache" / "spf-plugin").glob("sd-scripts-*"))
    return [p.resolve() for p in [*named, *cached] if (p / "train_network.py").is_file()]


def is_new(folder: Path) -> bool:
    return "def process_batch" in (folder / "train_network.py").read_text(encoding="utf-8")


def release(folder: Path) -> str:
    """The oldest release with a checkout's loop and modules, as in `RELEASES`."""
    if not is_new(folder):
        return "v0.9"
    return "v0.11" if (folder / "library" / "dataset.py").is_file() else "v0.10"


RELEASES = ("v0.9", "v0.10", "v0.11")  # one checkout of each is expected
HOSTS = find_hosts()
NEWEST = next((folder for folder in HOSTS if release(folder) == "v0.10"), None) or next(
    filter(is_new, HOSTS), HOSTS[0] if HOSTS else None
)  # of those that run everything
OLDER = next((folder for folder in HOSTS if not is_new(folder)), None)
MISSING = [name for name in RELEASES if name not in map(release, HOSTS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        why = "NO sd-scripts {} CHECKOUT FOUND (see README, Tests)"
        missing = [
            pytest.param(name, marks=pytest.mark.skip(reason=why.format(name)), id=f"no-{name}") for name in MISSING
        ]
        found = [pytest.param(folder, id=folder.name) for folder in HOSTS]
        metafunc.parametrize("host", [*found, *missing], indirect=True, scope="session")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "one_host: one of the two checkouts that run everything runs it; what may differ between them runs on both",
    )
    config.addinivalue_line(
        "markers",
        "contract: what SPF takes for granted in a host; checkouts beside the two that run everything run only it",
    )
    config.addinivalue_line("markers", "kinds(*names): the kinds of diffusion transformers that run a test; else all")


def superfluous(item: pytest.Item) -> bool:
    """Whether a test need not run on its checkout, or not be missed for one that is not there."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "host" not in params or params["host"] == (NEWEST or RELEASES[1]):
        return False
    if params["host"] in (OLDER, *RELEASES[:2]):
        return item.get_closest_marker("one_host") is not None
    return item.get_closest_marker("contract") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [item for item in items if superfluous(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not superfluous(item)]


@dataclass
class Result:
    """A finished run: exit code, everything it printed, and the LoRA it wrote (if any)."""

    returncode: int
    log: str
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "out.safetensors"

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.returncode == 0, self.log[-6000:]
        return load_file(self.file)

    def metadata(self) -> dict[str, str]:
        with safe_open(self.file, "pt") as file:
            return file.metadata()

    @property
    def said(self) -> str:
        """The whole log on one line, without the column of places in the code, around which the logger wraps."""
        return re.sub(r"\s+", " ", re.sub(r" \w+\.py:\d+ *$", "", self.log, flags=re.MULTILINE))

    @property
    def message(self) -> str:
        """The last error, on one line (the host's logger and accelerate wrap theirs)."""
        return re.sub(r"\s+", " ", self.log[-4000:])


class Host:
    """One checkout; `train` runs one of its scripts, in this Python or another."""

    def __init__(
        self, folder: Path, models: Models, work: Path, made_once: MadeOnce, python: str = sys.executable
    ) -> None:
        self.folder, self.models, self.work, self.made_once = folder, models, work, made_once
        self.python = python
        self._count = 0
        self._server: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_new(self) -> bool:
        return is_new(self.folder)

    @property
    def release(self) -> str:
        return release(self.folder)

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **KEEP_MEMORY}
        return {**os.environ, "PYTHONPATH": path, **fixed}

    def arguments(
        self, out: Path, *extra: str, model: str = "sd15", module: str = "spf_plugin.lora", **flags: object
    ) -> list[str]:
        """The command line of a short run; `flags` become `--name value` (True: no value; None: left out)."""
        values: dict[str, object] = {
            "pretrained_model_name_or_path": self.models[model],
            "tokenizer_cache_dir": self.models["tokenizers"],
            "train_data_dir": self.models["images"],
            "caption_extension": ".txt",
            "resolution": "128,128",
            "output_dir": out,
            "output_name": "out",
            "max_data_loader_n_workers": 0,
            "optimizer_type": "AdamW",
            "network_module": module,
            "network_dim": 4,
            "network_alpha": 2,
            "network_train_unet_only": True,
            "seed": 1,
            "learning_rate": 1e-2,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "save_model_as": "safetensors",
            "mixed_precision": "no",
            **flags,
        }
        words: list[str] = []
        for name, value in values.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
        return [*words, *extra]

    def train(
        self,
        *network_args: str,
        model: str = "sd15",
        out: Path | None = None,
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
        **flags: object,
    ) -> Result:
        """Train. `network_args` are the words after `--network_args`; flags as in `arguments`.

        With `command` (and `environment`), that starts the launcher in place of the shared server, which forks and so
        cannot serve CUDA.
        """
        self._count += 1
        out = out or self.work / f"{self._count:03d}"
        out.mkdir(exist_ok=True)
        script = "sdxl_train_network.py" if model == "sdxl" else "train_network.py"
        script = str(flags.pop("script", script))
        extra = ["--network_args", *network_args] if network_args else []
        words = self.arguments(out, *extra, model=model, **flags)
        log = out / "log.txt"
        if command is not None or not hasattr(os, "fork") or torch.cuda.is_available():
            start = command or [self.python]
            with log.open("w", encoding="utf-8") as file:
                code = subprocess.run(
                    [*start, str(LAUNCHER), str(self.folder / script), *words],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**self.environment(), **(environment or {})},
                    stdin=subprocess.DEVNULL,
                ).returncode
        else:
            code = self._ask({"script": script, "args": words, "log": str(log)})
        return Result(code, log.read_text(encoding="utf-8", errors="replace"), out)

    def trained(self, *network_args: str, **flags: Any) -> Result:
        """What `train` gave for these very arguments earlier in this session, in any xdist worker: only to be read."""
        arguments = json.dumps([self.python, self.name, network_args, sorted(flags.items())], default=str)

        def run(out: Path) -> None:
            code = self.train(*network_args, out=out, **flags).returncode
            (out / "returncode").write_text(str(code), encoding="utf-8")

        out = self.made_once("run-" + hashlib.sha256(arguments.encode()).hexdigest()[:16], run)
        code = int((out / "returncode").read_text(encoding="utf-8"))
        return Result(code, (out / "log.txt").read_text(encoding="utf-8", errors="replace"), out)

    def _ask(self, job: dict[str, object]) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                [self.python, str(LAUNCHER), "--serve", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self.environment(),
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the test launcher died"
        return int(json.loads(answer)["returncode"])

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait(timeout=30)


def tokenizer_folders(root: Path) -> None:
    """Where sd-scripts looks for them in its `--tokenizer_cache_dir`."""
    first, *others = (
        "openai_clip-vit-large-patch14",
        "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "stabilityai_stable-diffusion-2",
    )
    tiny.tokenizer_folder(root / first)
    for name in others:
        shutil.copytree(root / first, root / name)


class Models(dict[str, Path]):
    """Tiny models, the tokenizers and a data folder by name, each made when it is first asked for."""

    BUILD: ClassVar[dict[str, Callable[[Path], object]]] = {
        "sd15": tiny.sd15,
        "sdxl": tiny.sdxl_of_hosts,
        "tokenizers": tokenizer_folders,
        "images": tiny.images,
    }

    def __init__(self, made_once: MadeOnce):
        super().__init__()
        self.made_once = made_once

    def __missing__(self, name: str) -> Path:
        self[name] = self.made_once(name, self.BUILD[name])
        return self[name]


@pytest.fixture(scope="session")
def models(made_once: MadeOnce) -> Models:
    return Models(made_once)


@pytest.fixture(scope="session")
def host_of(
    models: Models, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], Host]]:
    """The one `Host` of each checkout."""
    running: dict[Path, Host] = {}

    def get(folder: Path) -> Host:
        if folder not in running:
            running[folder] = Host(folder, models, tmp_path_factory.mktemp("runs"), made_once)
        return running[folder]

    yield get
    for each in running.values():
        each.close()


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest, host_of: Callable[[Path], Host]) -> Host:
    return host_of(request.param)


@pytest.fixture
def older(host_of: Callable[[Path], Host]) -> Host:
    """A checkout of the older release, for what goes from one release to the other."""
    if OLDER is None:
        pytest.skip("NO OLDER sd-scripts CHECKOUT FOUND (see README, Tests)")
    return host_of(OLDER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    whole = [folder for folder in (NEWEST, OLDER) if folder is not None]
    if HOSTS:
        used = ", ".join(folder.name + ("" if folder in whole else " (contract)") for folder in HOSTS)
        terminalreporter.write_line(f"sd-scripts checkouts used: {used}; for tests marked one_host: {whole[0].name}")
    for name in MISSING:
        terminalreporter.write_line(
            f"NO sd-scripts {name} CHECKOUT FOUND: nothing ran on it. See the README, Tests.", red=True, bold=True
        )
