"""Real sd-scripts checkouts, and a way to run their training scripts on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import tiny

LAUNCHER = Path(__file__).with_name("launcher.py")
REPOSITORY = Path(__file__).parents[2]
# glibc hands freed tensors back to the kernel and faults them in again: nearly half of a small CPU training's time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_TOP_PAD_": "268435456"}


def find_hosts() -> list[Path]:
    """Checkouts in `SPF_SD_SCRIPTS` (joined by the path separator) and in `~/.cache/spf-plugin/sd-scripts-*`."""
    named = [Path(p) for p in os.environ.get("SPF_SD_SCRIPTS", "").split(os.pathsep) if p]
    cached = sorted((Path.home() / ".cache" / "spf-plugin").glob("sd-scripts-*"))
    return [p.resolve() for p in [*named, *cached] if (p / "train_network.py").is_file()]


HOSTS = find_hosts()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        missing = pytest.param(None, marks=pytest.mark.skip(reason="NO sd-scripts CHECKOUT FOUND (see README, Tests)"))
        metafunc.parametrize(
            "host", HOSTS or [missing], ids=lambda p: p.name if p else "none", indirect=True, scope="session"
        )


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
    def message(self) -> str:
        """The last error, on one line (the host's logger and accelerate wrap theirs)."""
        return re.sub(r"\s+", " ", self.log[-4000:])


class Host:
    """One checkout; `train` runs one of its scripts."""

    def __init__(self, folder: Path, models: dict[str, Path], work: Path):
        self.folder, self.models, self.work = folder, models, work
        self._count = 0
        self._server: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_new(self) -> bool:
        return "def process_batch" in (self.folder / "train_network.py").read_text(encoding="utf-8")

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
            start = command or [sys.executable]
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

    def _ask(self, job: dict[str, object]) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(LAUNCHER), "--serve", str(self.folder)],
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models, tokenizers where sd-scripts looks for them, and a data folder; built once."""
    root = tmp_path_factory.mktemp("models")
    tokenizers = root / "tokenizers"
    for name in (
        "openai_clip-vit-large-patch14",
        "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "stabilityai_stable-diffusion-2",
    ):
        tiny.tokenizer_folder(tokenizers / name)
    return {
        "sd15": tiny.sd15(root / "sd15"),
        "sdxl": tiny.sdxl(root / "sdxl"),
        "tokenizers": tokenizers,
        "images": tiny.images(root / "images"),
    }


@pytest.fixture(scope="session")
def host(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    running = Host(request.param, models, tmp_path_factory.mktemp("runs"))
    yield running
    running.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if HOSTS:
        terminalreporter.write_line("sd-scripts checkouts used: " + ", ".join(h.name for h in HOSTS))
    else:
        terminalreporter.write_line(
            "NO sd-scripts CHECKOUT FOUND: every host test was skipped. See the README, Tests.", red=True, bold=True
        )
