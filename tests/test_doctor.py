"""`spf doctor`: it also works where torch is missing or a package is broken, and knows sd-scripts by its source."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spf_plugin.hosts.kohya.scripts import SCRIPTS
from spf_plugin.hosts.kohya.trainers import DITS
from spf_plugin.hosts.musubi import scripts as musubi
from spf_plugin.tools import doctor
from spf_plugin.tools.cli import doctor as command
from spf_plugin.tools.doctor import Doctor, Package
from tests.hosts.conftest import HOSTS
from tests.hosts.musubi.classes import NO_CHECKOUT, checkouts

ROOT = Path(__file__).parents[1]

CUDA = {
    "version": "2.5.1+cu124",
    "cuda_build": "12.4",
    "hip_build": None,
    "cuda": True,
    "devices": [["NVIDIA GeForce RTX 3060", 10 * 1024**3, 12 * 1024**3, "8.6"]],
    "bf16": True,
    "attention": ["flash", "memory-efficient", "math"],
    "sdpa": True,
}


def packages(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Packages of our own making, for this process and those it starts."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()


def test_broken_and_crashing_packages_are_lines_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(
        tmp_path,
        monkeypatch,
        fine="__version__ = '1.2'",
        noisy="print('a banner'); __version__ = '3'",
        broken="raise RuntimeError('CUDA Setup failed\\nno libcudart.so')",
        crash="import os; os.abort()",
        after="__version__ = '4'",
    )
    found = doctor.import_elsewhere(["fine", "broken", "crash", "noisy", "after"])
    assert found["fine"] == {"version": "1.2"}
    assert found["broken"] == {"error": "RuntimeError: no libcudart.so"}
    assert found["crash"]["error"].startswith("the import ended Python with status")
    assert found["noisy"] == {"version": "3"}
    assert found["after"] == {"version": "4"}


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((7, 5), None, False), ((8, 6), None, True), ((7, 5), "6.0", True)]
)
def test_a_card_that_emulates_bf16_has_none(
    capability: tuple[int, int], hip: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for PyTorch: a real one sees no such card here."""
    source = f"""
from types import SimpleNamespace as Space
__version__ = "2.5.1"
version = Space(cuda="12.4", hip={hip!r})
cuda = Space(
    is_available=lambda: True, device_count=lambda: 1, mem_get_info=lambda i: (1, 2),
    get_device_name=lambda i: "a card", get_device_capability=lambda i=0: {capability},
)
backends = Space(cuda=Space(flash_sdp_enabled=lambda: True))
nn = Space(functional=Space(scaled_dot_product_attention=None))
"""
    packages(tmp_path, monkeypatch, torch=source)
    found = doctor.import_elsewhere(["torch"])["torch"]
    assert found["devices"] == [["a card", 1, 2, ".".join(map(str, capability))]]
    assert found["bf16"] is expected


def test_an_import_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(tmp_path, monkeypatch, first="__version__ = '1'", hangs="import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "_SECONDS", 3.0)
    found = doctor.import_elsewhere(["first", "hangs"])
    assert found["first"] == {"version": "1"}
    assert found["hangs"] == {"error": "the import was not done after 3 seconds"}


def test_without_torch(tmp_path: Path) -> None:
    """In an environment that has typer, rich and toml, and nothing else that is heavy."""
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "hidden = {'torch', 'diffusers', 'transformers', 'accelerate', 'lycoris', 'open_clip', 'safetensors'}\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in hidden:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "real, find = importlib.metadata.version, importlib.util.find_spec\n"
        "def version(name):\n"
        "    if name.split('-')[0].replace('open_clip_torch', 'open_clip') in hidden:\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "importlib.metadata.version = version\n"
        "importlib.util.find_spec = lambda name, *a: None if name in hidden else find(name, *a)\n"
        "from spf_plugin.tools.cli.doctor import app\n"
        f"app(['--json', '--sd-scripts', {str(tmp_path)!r}])\n"
    )
    (tmp_path / "train_network.py").write_text(
        "class NetworkTrainer:\n    def call_unet(self): ...\n", encoding="utf-8"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    state = {package["name"]: package for package in answer["packages"]}
    assert state["torch"] == {"name": "torch", "version": "", "error": ""}
    assert state["typer"]["version"]
    assert "torch is needed: not installed" in answer["problems"]
    assert answer["host"]["train_network.py"] == "SPF fits (SD 1.x, SD 2.x)"


def page(found: Doctor, monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> str:
    monkeypatch.setattr(command, "examine", lambda *_, **__: found)
    result = CliRunner().invoke(command.app, [], env={"COLUMNS": str(columns)})
    assert result.exit_code == int(bool(found.problems)), result.output
    assert max(map(len, result.output.splitlines())) <= columns
    assert len(result.output.splitlines()) < 60  # one page
    return result.output


def test_the_page_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: True)
    answers = {"torch": dict(CUDA), "xformers": {"version": "0.0.28"}, "bitsandbytes": {"error": "OSError: no library"}}
    listed, facts = doctor.look_at_packages(lambda names: {name: answers.get(name, {"version": "1"}) for name in names})
    found = Doctor(system={"os": "Windows 11"}, packages=listed, torch=facts, disks=[("working folder", "D:/x", 2**31)])
    text = page(found, monkeypatch)
    assert "NVIDIA GeForce RTX 3060, 10.0 of 12.0 GiB free, capability 8.6" in text
    assert "CUDA 12.4" in text
    assert "--sdpa (flash, memory-efficient, math); --xformers (0.0.28)" in text
    assert "cannot be imported: OSError: no library" in " ".join(text.split())
    assert "2.0 GiB (D:/x)" in text


def test_broken_packages_are_problems_where_a_run_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [
        Package("torch", "2.5", "OSError: x"),
        Package("bitsandbytes", "0.43", "y"),
        Package("open_clip", "", "z"),
    ]
    monkeypatch.setattr(doctor, "look_at_packages", lambda: (broken, {}))
    found = doctor.examine()
    assert "torch is needed: 2.5, cannot be imported: OSError: x" in found.problems
    assert any("bitsandbytes is broken, and the 8-bit optimizers" in problem for problem in found.problems)
    assert not any("open_clip" in problem for problem in found.problems)
    found.packages += [Package("xformers")]
    assert "unknown: torch cannot be asked" in page(found, monkeypatch)


def test_a_folder_that_is_not_sd_scripts(tmp_path: Path) -> None:
    _, said, problems = doctor.look_at_host(tmp_path)
    assert not said
    assert "is not a copy of sd-scripts" in problems[0]


@pytest.mark.parametrize(
    ("methods", "refused", "says"),
    [
        (("call_unet",), 0, ""),
        (("call_unet", "get_noise_pred_and_target", "process_batch"), 0, ""),
        (("call_unet", "get_noise_pred_and_target"), 2, "2024 development branch"),
        (("train",), 1, "train_network.py: NetworkTrainer has no call_unet"),  # SDXL's has one of its own
    ],
)
def test_the_seam_is_read_from_the_source(tmp_path: Path, methods: tuple[str, ...], refused: int, says: str) -> None:
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "lora.py").write_text("", encoding="utf-8")
    body = "".join(f"    def {name}(self): raise SystemExit\n" for name in ("__init__", *methods))
    source = f"import nothing_that_exists\nclass NetworkTrainer:\n{body}"
    (tmp_path / "train_network.py").write_text(source, encoding="utf-8")
    sdxl = (
        "import train_network\nclass SdxlNetworkTrainer(train_network.NetworkTrainer):\n    def call_unet(self): ...\n"
    )
    (tmp_path / "sdxl_train_network.py").write_text(sdxl, encoding="utf-8")
    _, said, problems = doctor.look_at_host(tmp_path)
    assert ("SPF fits" in said["train_network.py"]) == (not refused)
    assert len(problems) == refused
    assert all(says in problem for problem in problems)


@pytest.mark.skipif(not HOSTS, reason="NO sd-scripts CHECKOUT FOUND (see README, Tests)")
@pytest.mark.parametrize("host", HOSTS, ids=lambda p: p.name)
def test_real_checkouts(host: Path) -> None:
    release, said, problems = doctor.look_at_host(host)
    assert release
    assert not problems
    assert "SPF fits" in said["train_network.py"]
    assert "SPF fits" in said["sdxl_train_network.py"]
    for script in SCRIPTS:
        if script.is_dit and (host / script.file).is_file():
            fits = script.trainer in DITS
            assert (script.name.removesuffix("_train_network") in said.get("refused", "")) != fits
            assert not fits or next(iter(script.models.values())) in said[script.file]
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    assert spec is not None
    assert spec.loader is not None
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    assert install.check_host(host)  # the installer takes it too
    supported = [script.file for script in SCRIPTS if script.supported and (host / script.file).is_file()]
    assert [line.split()[0] for line in install.trainers(host)] == supported


def test_a_transformers_network_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "lora.py").write_text("", encoding="utf-8")
    methods = "".join(f"    def {name}(self): ...\n" for name in ("call_unet", "process_batch"))
    (tmp_path / "train_network.py").write_text(f"class NetworkTrainer:\n{methods}", encoding="utf-8")
    anima = "import train_network\nclass AnimaNetworkTrainer(train_network.NetworkTrainer):\n    def x(self): ...\n"
    (tmp_path / "anima_train_network.py").write_text(anima, encoding="utf-8")
    (problem,) = doctor.look_at_host(tmp_path)[2]
    assert problem == "anima_train_network.py: networks/lora_anima.py, which makes its LoRA, is missing"


@pytest.mark.skipif(not checkouts(), reason=NO_CHECKOUT)
def test_a_real_musubi_tuner() -> None:
    release, said, problems = doctor.look_at_musubi(checkouts()[0])
    assert release
    assert not problems
    supported = {script.file: f"SPF fits ({script.said})" for script in musubi.SCRIPTS if script.supported}
    assert supported.items() <= said.items()
    assert "HunyuanVideo 1.5" in said["refused"]


def test_a_musubi_tuner_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "src/musubi_tuner is missing" in doctor.look_at_musubi(tmp_path)[2][0]
    package = tmp_path / "src" / "musubi_tuner"
    package.mkdir(parents=True)
    (package / "zimage_train_network.py").write_text("", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('version = "0.1.2"\n', encoding="utf-8")
    release, said, (old, incomplete) = doctor.look_at_musubi(tmp_path)
    assert (release, said) == ("0.1.2", {})
    assert "older than what SPF supports" in old
    assert "is not complete" in incomplete
    monkeypatch.setattr(doctor, "look_at_packages", lambda: ([Package("torch", "2.5.1"), Package("xformers")], {}))
    done = CliRunner().invoke(command.app, ["--musubi-tuner", str(tmp_path)])
    assert done.exit_code == 1
    assert "musubi-tuner" in done.output
    both = CliRunner().invoke(command.app, ["--musubi-tuner", str(tmp_path), "--sd-scripts", str(tmp_path)])
    assert both.exit_code == 2
