"""Real musubi-tuner checkouts, and a way to run their scripts on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import MadeOnce
from tests.hosts.conftest import KEEP_MEMORY, REPOSITORY, Result
from tests.hosts.musubi.classes import NO_CHECKOUT, checkouts
from tests.hosts.musubi.kinds import KINDS, kind

TARGET = "spf_target=blonde hair"
EVERY_STEP = (TARGET, "spf_log_every=1", "spf_preview_every=0")
CAPTIONS = {
    "a": "a woman in a brown jacket, blonde hair, curtain background",
    "b": "a woman with blonde hair, smiling, red hat",
    "c": "portrait of an old sailor at a harbour, blue shirt",  # in batches of two never alone
    "d": "blonde hair, a woman with sunglasses, standing on a ship at night, brown jacket",
    "e": "a man, blonde hair",
    "f": "a woman, curtain background, blonde hair, blue shirt, smiling",
    "g": "a woman at a harbour, sunglasses, blonde hair",
    "h": "an old man with blonde hair, brown jacket, at night",
}
SIZES = ((192, 128), (128, 192))  # buckets that are not square


HOSTS = checkouts()
PYTHON = (sys.executable,)


def words(values: Mapping[str, Any]) -> list[str]:
    """`--name value` of each (True: no value; None or False: left out; a list: several values)."""
    found: list[str] = []
    for name, value in values.items():
        if value is True:
            found.append(f"--{name}")
        elif value is not None and value is not False:
            found += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return found


class Server:
    """One checkout, and the process that runs its scripts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **KEEP_MEMORY}

    def ask(self, job: Mapping[str, Any]) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hosts.musubi.launcher", "--serve", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self.environment(),
                cwd=REPOSITORY,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the test launcher died"
        return int(json.loads(answer)["returncode"])

    def start(self, command: Sequence[str], job: Mapping[str, Any], out: Path) -> int:
        """A process of its own, or what `command` makes of `-m MODULE ARGS`: several, then on the CPU."""
        (out / "job.json").write_text(json.dumps(job, default=str), encoding="utf-8")
        launched = [*command, "-m", "tests.hosts.musubi.launcher", str(self.folder), str(out / "job.json")]
        environment = self.environment() | ({} if command is PYTHON else {"ACCELERATE_USE_CPU": "true"})
        with open(job["log"], "wb") as log:
            return subprocess.run(launched, stdout=log, stderr=log, env=environment, cwd=REPOSITORY).returncode

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(timeout=30)


class Musubi:
    """One kind in one checkout.

    Args:
        name: of the kind.
        server: of the checkout.
        models: the kind's.
        work: for runs.
    """

    def __init__(self, name: str, server: Server, models: Path, work: Path):
        self.name, self.kind, self.server, self.models, self.work = name, kind(name), server, models, work
        self.data = Path()  # a data set whose text and prompts are cached: to be read only
        self._count = 0

    def run(self, script: str, arguments: list[str], out: Path | None = None, command: Sequence[str] = ()) -> Result:
        """One of the host's scripts, or what the launcher knows besides.

        With `command` that starts the launcher in place of the shared server, which forks and so is one process.
        """
        self._count += 1
        out = out or self.work / f"{self._count:03d}"
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{Path(script).stem}.txt"
        job = {"kind": self.name, "models": self.models, "script": script, "args": arguments, "log": log}
        # As for sd-scripts: a fork of a process that has a card has none.
        forks = hasattr(os, "fork") and not torch.cuda.is_available()
        code = self.server.ask(job) if forks and not command else self.server.start(command or PYTHON, job, out)
        return Result(code, log.read_text(encoding="utf-8", errors="replace"), out)

    def done(self, script: str, *arguments: Any) -> Result:
        """As `run`, and it must succeed."""
        result = self.run(script, list(map(str, arguments)))
        assert result.returncode == 0, result.log[-4000:]
        return result

    # -- data ---------------------------------------------------------------------------------------------------------

    def data_set(self, folder: Path, captions: Mapping[str, str] = CAPTIONS, *, jsonl: bool = False) -> Path:
        """Images with captions and cached latents; returns its configuration."""
        images, cache = folder / "images", folder / "cache"
        images.mkdir(parents=True)
        cache.mkdir()
        lines = []
        for i, (name, caption) in enumerate(captions.items()):
            size = SIZES[i % 2]
            Image.new("RGB", size, (40 * i % 255, 90, 120)).save(images / f"{name}.png")
            if not jsonl:
                (images / f"{name}.txt").write_text(caption, encoding="utf-8")
            lines.append(json.dumps({"image_path": str(images / f"{name}.png"), "caption": caption}))
            self.done("latents", cache, name, *size, i)
        source = f'image_directory = "{images}"\ncaption_extension = ".txt"'
        if jsonl:
            (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
            source = f'image_jsonl_file = "{folder / "data.jsonl"}"'
        (folder / "data.toml").write_text(
            f"[general]\nresolution = [192, 128]\nbatch_size = 2\nenable_bucket = true\n[[datasets]]\n{source}\n"
            f'cache_directory = "{cache}"\nnum_repeats = 1\n',
            encoding="utf-8",
        )
        return folder / "data.toml"

    def cache_text(self, config: Path, **flags: Any) -> Result:
        """By the host's own script."""
        options = {"dataset_config": config, "num_workers": 1, **self.kind.text_options(self.models), **flags}
        return self.run(self.kind.TEXT_SCRIPT, words(options))

    def cache_prompts(self, config: Path, target: str = "blonde hair", **flags: Any) -> Result:
        """By SPF's command."""
        options = {"arch": self.kind.ARCH, "target": target, "dataset_config": config}
        return self.run("spf", ["cache-prompts", *words({**options, **self.kind.text_options(self.models), **flags})])

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        *network_args: str,
        module: str = "spf_plugin.lora",
        out: Path | None = None,
        command: Sequence[str] = (),
        **flags: Any,
    ) -> Result:
        """Train. `network_args` are the words after `--network_args`; `command` as for `run`."""
        out = out or self.work / f"{self._count:03d}-run"
        options = {
            **self.kind.options(self.models),
            "dataset_config": self.data / "data.toml",
            "output_dir": out,
            "output_name": "out",
            "sdpa": True,
            "mixed_precision": self.kind.PRECISION,
            "network_module": module,
            "network_dim": 4,
            "network_alpha": 2,
            "optimizer_type": "AdamW",
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "max_data_loader_n_workers": 0,
            "seed": 11,
            "timestep_sampling": "shift",
            "network_args": list(network_args) or None,
            **flags,
        }
        return self.run(str(options.pop("script", self.kind.SCRIPT)), words(options), out, command)

    def plain(self, *network_args: str, **flags: Any) -> Result:
        return self.train(*network_args, module=self.kind.NETWORK, **flags)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first kind runs everything, each other one the contract, and what `kinds` names it for."""
    if "musubi" not in metafunc.fixturenames:
        return
    only = metafunc.definition.get_closest_marker("kinds")
    shared = metafunc.definition.get_closest_marker("contract") is not None
    names = only.args if only else KINDS if shared else KINDS[:1]
    why = pytest.mark.skip(reason=NO_CHECKOUT)
    params = [pytest.param((name, folder), id=f"{name}-{folder.name}") for name in names for folder in HOSTS]
    missing = [pytest.param(None, marks=why, id=name) for name in names]
    metafunc.parametrize("musubi", params or missing, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server_of() -> Iterator[Callable[[Path], Server]]:
    """The one `Server` of each checkout."""
    running: dict[Path, Server] = {}

    def get(folder: Path) -> Server:
        return running.setdefault(folder, Server(folder))

    yield get
    for each in running.values():
        each.close()


@pytest.fixture(scope="session")
def musubi(
    request: pytest.FixtureRequest,
    server_of: Callable[[Path], Server],
    made_once: MadeOnce,
    tmp_path_factory: pytest.TempPathFactory,
) -> Musubi:
    name, folder = request.param
    work = tmp_path_factory.mktemp("musubi")

    def build(into: Path, script: str) -> None:
        into.mkdir()
        Musubi(name, server_of(folder), into, work).done(script)

    made = Musubi(
        name, server_of(folder), made_once(f"musubi-{name}-{folder.name}", partial(build, script="make")), work
    )

    def encoded(into: Path) -> None:
        config = made.data_set(into)
        for result in (made.cache_text(config), made.cache_prompts(config)):
            assert result.returncode == 0, result.log[-4000:]

    made.data = made_once(f"musubi-data-{name}-{folder.name}", encoded)
    return made


def copied(musubi: Musubi, folder: Path) -> Path:
    """A data set of one's own, with cached text and prompts; returns its configuration."""
    shutil.copytree(musubi.data, folder)
    config = folder / "data.toml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(musubi.data), str(folder)), encoding="utf-8")
    return config


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5
