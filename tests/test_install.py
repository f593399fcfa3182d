"""The installer: into an environment of its own, beside a folder shaped like sd-scripts or musubi-tuner. No pinned
package moves."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that sees this one's packages, as a user's sd-scripts environment has torch and the rest."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return python


@pytest.fixture
def host(tmp_path: Path) -> Path:
    folder = tmp_path / "sd scripts"
    (folder / "networks").mkdir(parents=True)
    (folder / "library").mkdir()
    (folder / "networks" / "lora.py").write_text("")
    (folder / "sdxl_train_network.py").write_text("")
    source = "class NetworkTrainer:\n    def call_unet(self): ...\n    def process_batch(self): ...\n"
    (folder / "train_network.py").write_text(source)
    return folder


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(ROOT / "install.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def freeze(python: Path) -> set[str]:
    code = (
        "from importlib.metadata import distributions as d; print(*(f'{p.name}=={p.version}' for p in d()), sep='\\n')"
    )
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True)
    found = {line for line in done.stdout.splitlines() if not line.startswith("spf-plugin")}
    assert any(line.startswith("torch==") for line in found)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_install_twice_and_uninstall(python: Path, host: Path) -> None:
    packages, files = freeze(python), tree(host)
    sources, around = tree(ROOT / "spf_plugin"), {p.name for p in ROOT.iterdir()}

    dry = run(python, "--sd-scripts", host, "--dry-run")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert "would copy spf_lora.py" in dry.stdout
    assert tree(host) == files

    first = run(python, "--sd-scripts", host)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "process_batch loop" in first.stdout
    assert "accelerate launch train_network.py" in first.stdout
    assert "SDXL: the same with sdxl_train_network.py and sdxl-12gb.toml" in first.stdout
    assert freeze(python) == packages
    installed = tree(host)
    assert set(installed) - set(files) == {str(Path("networks") / "spf_lora.py")}

    again = run(python, "--sd-scripts", host)
    assert again.returncode == 0
    assert tree(host) == installed
    assert "copying" not in again.stdout
    assert "already installed, this version" in again.stdout

    code = "import spf_plugin; print(spf_plugin.__path__[0])"
    place = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=host)
    figures = Path(place.stdout.strip()) / "tools" / "plan.json"
    assert figures.parent.parent != ROOT
    now = figures.read_bytes()
    figures.write_bytes(b"{}")  # an earlier version's
    assert run(python, "--sd-scripts", host).returncode == 0
    assert figures.read_bytes() == now

    # From these a module that is gone would be installed again, and "already installed" would never come.
    assert not (ROOT / "build").exists()
    gone = figures.parent / "gone.py"
    gone.write_text("", encoding="utf-8")
    with open(next(figures.parents[2].glob("spf_plugin-*.dist-info")) / "RECORD", "a", encoding="utf-8") as record:
        record.write("spf_plugin/tools/gone.py,,\n")  # an earlier version had it
    assert "running:" in run(python, "--sd-scripts", host).stdout
    assert not gone.exists()
    assert "already installed, this version" in run(python, "--sd-scripts", host).stdout
    assert tree(ROOT / "spf_plugin") == sources
    assert {p.name for p in ROOT.iterdir()} == around

    away = run(python, "--sd-scripts", host, "--uninstall")
    assert away.returncode == 0, away.stdout + away.stderr
    assert tree(host) == files
    assert freeze(python) == packages


def test_a_shim_that_is_not_ours_stays(python: Path, host: Path) -> None:
    (host / "networks" / "spf_lora.py").write_text("mine = 1\n")
    done = run(python, "--sd-scripts", host)
    assert done.returncode != 0
    assert "is not ours" in done.stderr
    assert (host / "networks" / "spf_lora.py").read_text() == "mine = 1\n"


def test_what_stands_in_the_shims_place_is_said_before_anything_changes(host: Path) -> None:
    (host / "networks" / "spf_lora.py").mkdir()
    for option in ((), ("--uninstall",)):
        done = run(Path(sys.executable), "--sd-scripts", host, *option)
        assert done.returncode != 0
        assert "Move it away first" in done.stderr
        assert "Traceback" not in done.stderr
        assert "pip" not in done.stdout


def test_uninstalling_from_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run(Path(sys.executable), "--sd-scripts", tmp_path / "nowhere", "--uninstall")
    assert done.returncode != 0
    assert "is not a copy of sd-scripts" in done.stderr
    assert "pip" not in done.stdout


def test_the_shim_goes_without_pip_too(host: Path) -> None:
    shim = host / "networks" / "spf_lora.py"
    shim.write_text("from spf_plugin.lora import *\n")
    words = ["install.py", "--sd-scripts", str(host), "--uninstall"]
    code = f"import runpy, sys; sys.executable, sys.argv = 'no-such-python', {words!r}; "
    code += f"runpy.run_path({str(ROOT / 'install.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not shim.exists()


def test_a_networks_folder_that_cannot_be_written(python: Path, host: Path) -> None:
    (host / "networks" / "spf_lora.partial").mkdir()  # where the copy is made: a read-only folder, for whoever is root
    done = run(python, "--sd-scripts", host)
    assert done.returncode != 0
    assert "was not written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (host / "networks" / "spf_lora.py").exists()


@pytest.mark.parametrize("name", ["train_network.py", "networks/lora.py", "library"])
def test_something_else_in_place_of_a_file_of_sd_scripts(host: Path, name: str) -> None:
    target = host / name
    if target.is_dir():
        target.rmdir()
        target.write_text("")
    else:
        target.unlink()
        target.mkdir()
    done = run(Path(sys.executable), "--sd-scripts", host)
    assert done.returncode != 0
    assert "is not a copy of sd-scripts" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class NetworkTrainer: ...", "older than v0.7.0"),
        ("def call_unet(): ...\ndef get_noise_pred_and_target(): ...", "2024 development branch"),
    ],
)
def test_unsupported_releases(host: Path, source: str, message: str) -> None:
    (host / "train_network.py").write_text(source)
    done = run(Path(sys.executable), "--sd-scripts", host)
    assert done.returncode != 0
    assert message in done.stderr


def test_not_sd_scripts(tmp_path: Path) -> None:
    done = run(Path(sys.executable), "--sd-scripts", tmp_path)
    assert done.returncode != 0
    assert "train_network.py is missing" in done.stderr
    assert "Traceback" not in done.stderr


# -- the command line -------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A package that holds one empty module, and asks for others as the real one of this version does."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": "",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {text}\n" for text in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path, text)


#: As their own metadata say.
WHEELS = [
    ("click", "8.1.7"), ("click", "8.5.1"), ("rich", "12.6.0"), ("rich", "13.7.0"), ("rich", "15.0.0"),
    ("shellingham", "1.5.4"), ("pydantic", "1.10.27"), ("pydantic", "2.14.4"),
    ("typer", "0.12.5", "click>=8.0.0", "shellingham", "rich>=10.11.0"),
    ("typer", "0.15.4", "click<8.2,>=8.0.0", "shellingham", "rich>=10.11.0"),
    ("typer", "0.24.2", "click>=8.2.1", "shellingham", "rich>=12.3.0"),
    ("typer", "0.28.0", "shellingham", "rich>=13.8.0"),
    ("typer", "0.29.2", "pydantic>=2.5.3", "shellingham", "rich>=13.8.0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Python and packages' folder of an environment with pip, what the installer asks for by name, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import site; print(site.getsitepackages()[0])"
    place = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for name in ("torch", "accelerate", "diffusers", "transformers", "safetensors", "toml"):
        (place / f"{name}.py").touch()
    (place / "source.pth").write_text(str(ROOT), encoding="utf-8")  # SPF itself is there already
    return python, place


@pytest.mark.parametrize(
    ("here", "typer"),
    [
        (["click-8.1.7", "rich-13.7.0", "pydantic-1.10.27"], "0.15.4"),  # lora-scripts
        (["rich-13.7.0", "typer-0.12.5"], None),  # too old
    ],
    ids=["lacks", "old"],
)
def test_the_command_line_moves_nothing(
    bare: tuple[Path, Path],
    host: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: list[str],
    typer: str | None,
) -> None:
    (python, place), wheels = bare, tmp_path / "wheels"
    wheels.mkdir()
    for words in [*WHEELS, ("later", "1.0", "shellingham")]:
        wheel(wheels, *words)

    def put(name: str) -> None:
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl") as file:
            file.extractall(place)

    def installed() -> set[str]:
        return {path.name for path in place.glob("*.dist-info")}

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    for name in here:
        put(name)
    before = installed()
    offered = run(python, "--sd-scripts", host)
    assert offered.returncode == 0, offered.stderr
    assert ("--cli" in offered.stdout) == bool(typer)
    assert ("would run" in run(python, "--sd-scripts", host, "--cli", "--dry-run").stdout) == bool(typer)
    assert installed() == before
    done = run(python, "--sd-scripts", host, "--cli")
    assert (done.returncode == 0) == bool(typer), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if typer is None:
        assert "too old for the spf command: typer 0.12.5 (0.15.4 or newer)" in done.stderr
        assert installed() == before
        return
    assert installed() == before | {f"typer-{typer}.dist-info", "shellingham-1.5.4.dist-info"}
    put("later-1.0")  # what comes meanwhile keeps what it needs
    assert run(python, "--sd-scripts", host, "--uninstall").returncode == 0
    assert installed() == before | {"later-1.0.dist-info", "shellingham-1.5.4.dist-info"}
    for path in place.iterdir():
        if path.name.startswith(("click", "rich", "pydantic", "later", "shellingham")):
            shutil.rmtree(path)


# -- musubi-tuner -----------------------------------------------------------------------------------------------------

#: As its pyproject.toml pins them (v0.3.4).
PINS = [
    "accelerate-1.6.0", "av-14.0.1", "diffusers-0.32.1", "easydict-1.13", "einops-0.7.0", "ftfy-6.3.1",
    "huggingface_hub-0.34.3", "opencv_python-4.10.0.84", "safetensors-0.4.5", "sentencepiece-0.2.1", "toml-0.10.2",
    "tqdm-4.67.1", "transformers-4.57.6", "voluptuous-0.15.2",
]  # fmt: skip
#: What its trainer does with `--network_module`, from the folder of its package.
LAUNCHED = """
import importlib, os, sys
sys.path.append(os.path.dirname(os.path.dirname(__file__)))
module = importlib.import_module("spf_plugin.lora")
print(module.__file__, callable(module.create_arch_network), callable(module.create_arch_network_from_weights))
"""


@pytest.fixture
def musubi(tmp_path: Path) -> Path:
    folder = tmp_path / "musubi tuner"
    package = folder / "src" / "musubi_tuner"
    for name, text in {
        "networks/lora.py": "",
        "zimage_train_network.py": "",
        "wan_train_network.py": "",
        "training/trainer_base.py": f"class NetworkTrainer:\n    def process_batch(self): ...\n{LAUNCHED}",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    return folder


def test_into_musubi_tuner_and_out_again(python: Path, musubi: Path) -> None:
    packages, files = freeze(python), tree(musubi)
    dry = run(python, "--musubi-tuner", musubi, "--dry-run")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert tree(musubi) == files
    first = run(python, "--musubi-tuner", musubi)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "zimage_train_network.py (Z-Image), wan_train_network.py (Wan)" in first.stdout
    assert "spf cache-prompts --arch zimage" in first.stdout
    assert "accelerate launch src/musubi_tuner/zimage_train_network.py" in first.stdout
    assert "already installed, this version" in run(python, "--musubi-tuner", musubi).stdout
    assert freeze(python) == packages
    assert tree(musubi) == files  # nothing is copied there
    script = musubi / "src" / "musubi_tuner" / "training" / "trainer_base.py"
    launched = subprocess.run([python, script], capture_output=True, text=True, cwd=musubi)
    assert launched.returncode == 0, launched.stderr
    assert "site-packages" in launched.stdout
    assert launched.stdout.strip().endswith("True True")
    away = run(python, "--musubi-tuner", musubi, "--uninstall")
    assert away.returncode == 0, away.stdout + away.stderr
    assert freeze(python) == packages
    assert subprocess.run([python, script], capture_output=True, cwd=musubi).returncode != 0


def test_musubi_tuners_pins_stay(
    tmp_path: Path, musubi: Path, bare: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command line lacks comes in, beside what `pyproject.toml` pins."""
    (python, place), wheels = bare, tmp_path / "wheels"
    wheels.mkdir()
    for left in place.glob("*.dist-info"):  # of the tests before, whose folder this is, too
        if left.name.split("-")[0] in ("typer", "rich", "shellingham", "click"):
            shutil.rmtree(left)
    for words in WHEELS:
        wheel(wheels, *words)
    for pin in PINS:
        name, version = pin.split("-")
        wheel(wheels, name, version)
        wheel(wheels, name, "99.0")  # which must not be taken
        with zipfile.ZipFile(wheels / f"{pin}-py3-none-any.whl") as file:
            file.extractall(place)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def installed() -> set[str]:
        return {path.name for path in place.glob("*.dist-info")}

    before = installed()
    assert {f"{pin}.dist-info" for pin in PINS} <= before
    offered = run(python, "--musubi-tuner", musubi)
    assert "cache-prompts, without which it cannot train" in offered.stdout, offered.stderr
    assert "--musubi-tuner" in offered.stdout
    assert installed() == before
    done = run(python, "--musubi-tuner", musubi, "--cli")
    assert done.returncode == 0, done.stdout + done.stderr
    assert installed() > before
    assert {name.split("-")[0] for name in installed() - before} == {"typer", "rich", "shellingham"}
    assert run(python, "--musubi-tuner", musubi, "--uninstall").returncode == 0
    assert installed() == before
    for pin in PINS:
        shutil.rmtree(place / f"{pin}.dist-info")
        shutil.rmtree(place / pin.split("-")[0])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for uv is a shell script")
def test_an_environment_that_uv_made(musubi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no pip: uv is asked, or its command said."""
    environment = musubi / ".venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    code = "import site; print(site.getsitepackages()[0])"
    place = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for name in ("torch", "accelerate", "diffusers", "transformers", "safetensors", "toml"):
        (place / f"{name}.py").touch()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    said = run(python, "--musubi-tuner", musubi)
    assert said.returncode != 0
    assert f"uv pip install --python {python.parent.parent.parent}" in said.stderr.replace("'", "")
    assert "--no-deps --reinstall" in said.stderr
    assert "ensurepip" in said.stderr
    assert "Traceback" not in said.stderr
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(f'#!/bin/sh\necho "$@" >> {tools / "said"}\n', encoding="utf-8")
    (tools / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    done = run(python, "--musubi-tuner", musubi, "--cli")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uv sync takes SPF away again" in done.stdout
    assert run(python, "--musubi-tuner", musubi, "--uninstall").returncode == 0
    package, command_line, away = (tools / "said").read_text("utf-8").splitlines()
    start = f"--python {python} "
    assert package.startswith(f"pip install {start}--no-deps --reinstall ")
    assert command_line.startswith(f"pip install {start}--constraint ")
    assert command_line.endswith("rich>=13.7")
    assert away == f"pip uninstall {start}spf-plugin"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("networks/lora.py", "is not a copy of musubi-tuner with Z-Image: src"),
        ("zimage_train_network.py", "zimage_train_network.py is missing"),
        ("training/trainer_base.py", "older than what SPF supports (no process_batch in"),
    ],
)
def test_not_musubi_tuner(musubi: Path, gone: str, message: str) -> None:
    (musubi / "src" / "musubi_tuner" / gone).unlink()
    done = run(Path(sys.executable), "--musubi-tuner", musubi)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "pip" not in done.stdout


def test_of_two_hosts_each_has_its_own_environment(musubi: Path, host: Path) -> None:
    done = run(Path(sys.executable), "--musubi-tuner", musubi, "--sd-scripts", host)
    assert done.returncode != 0
    assert "run it once for each" in done.stderr
    nowhere = run(Path(sys.executable), "--musubi-tuner", host, "--uninstall")
    assert nowhere.returncode != 0
    assert "src/musubi_tuner is missing" in nowhere.stderr
    assert "pip" not in nowhere.stdout
