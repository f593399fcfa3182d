"""What differs on Windows, as far as another system can tell: docs/windows.md lists it."""

from __future__ import annotations

import ast
import ntpath
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from spf_plugin import files
from spf_plugin.errors import SPFError
from spf_plugin.files import impossible, name_length, replace
from spf_plugin.hosts.kohya import scripts
from spf_plugin.hosts.looking import name_problems
from spf_plugin.lorafile import writer
from spf_plugin.trainer.data import read_folder
from spf_plugin.trainer.output import check_output

ROOT = Path(__file__).parents[1]
FOLDERS = ("spf_plugin", "networks", "portraitlab", "benchmarks")
SOURCES = [*(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))), ROOT / "install.py"]
#: Modules that Python has on POSIX only.
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
#: Members that Windows lacks (Python's documentation, "Availability: Unix").
POSIX_SIGNALS = {
    name for name in dir(signal) if name.startswith("SIG") and name.isupper() and not name.startswith("SIG_")
} - {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIGBREAK"}
POSIX_OS = {
    "chown", "fchmod", "fork", "forkpty", "getgid", "getloadavg", "getpgid", "geteuid", "getuid", "killpg", "mkfifo",
    "nice", "pread", "pwrite", "sched_getaffinity", "setsid", "statvfs", "sync", "sysconf", "uname", "wait",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC",
}  # fmt: skip
CHINESE = "a woman, 微笑, blonde hair"


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_nothing_is_used_that_windows_lacks() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in POSIX_MODULES]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                lacking = {"os": POSIX_OS, "signal": POSIX_SIGNALS}.get(node.value.id, set())
                found += [f"{path.name}:{node.lineno}: {node.attr}"] if node.attr in lacking else []
    assert not found


def test_every_text_says_its_encoding() -> None:
    """Windows' own is cp1252 or another of its kind; Python takes it where nothing is said."""
    found = []
    for path in SOURCES:
        for call, name in calls(path):
            given = {keyword.arg for keyword in call.keywords}
            method = name.rsplit(".", 1)[-1]
            mode = next((a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "")
            opens = name == "open" or (method == "open" and "Image" not in name and mode in ("r", "w", "a", "rb", "wb"))
            second = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else mode
            text = opens and "b" not in str(second) and name != "os.open"
            said = "encoding" in given or (method == "read_text" and call.args)
            if (text or (method in ("read_text", "write_text") and "." in name)) and not said:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {name}")
            if name == "subprocess.run" and "text" in given and "errors" not in given and path.name != "install.py":
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}: what a program prints need not be decodable")
    assert not found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hair.safetensors", None),
        ("NUL.safetensors", "device"),
        ("nul .safetensors", "device"),
        ("Aux", "device"),
        ("com\u00b2.v1.safetensors", "device"),
        ("com0.safetensors", None),
        ("null.safetensors", None),
        ("a\\b", "no file can have"),
        ("hair.", "takes away"),
        ("hair ", "takes away"),
    ],
)
def test_names_that_windows_keeps_for_itself(name: str, reason: str | None) -> None:
    assert (reason or "") in (impossible(name, windows=True) or "")
    assert bool(impossible(name, windows=True)) == bool(reason)
    assert impossible(name, windows=False) is None
    if reason == "device" and hasattr(ntpath, "isreserved"):  # Python 3.13 knows them, too
        assert ntpath.isreserved(name)


def test_a_lora_is_not_written_into_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`spf train`, `spf lora fix`, `convert` and what training saves: one writer."""
    for module in ("spf_plugin.lorafile.writer", "spf_plugin.trainer.output"):
        monkeypatch.setattr(f"{module}.impossible", lambda name: impossible(name, windows=True))
    with pytest.raises(SPFError, match="NUL is a device on Windows"):
        writer.save(tmp_path / "nul.safetensors", {}, {})
    with pytest.raises(SPFError, match="NUL is a device on Windows"):
        check_output(tmp_path / "nul.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_are_counted_in_letters_there() -> None:
    assert name_length("髪" * 100, windows=True) == 100
    assert name_length("髪" * 100, windows=False) == 300
    assert name_length("\U0001f600", windows=True) == 2  # a pair


@pytest.mark.parametrize(("folder", "letters"), [("/out", 242), ("/" + "f" * 150, 61)])
def test_a_path_of_more_than_260_letters(folder: str, letters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file, or of what is written beside it; `\\\\?\\` is never put before one."""
    monkeypatch.setattr("spf_plugin.hosts.looking.long_paths", lambda: False)
    args = SimpleNamespace(output_dir=folder, output_name="n" * letters)
    final = Path(folder, f"{args.output_name}.safetensors")
    beside = writer.aside(final, ".partial.safetensors")
    assert max(len(str(final)), len(str(beside))) == files.PATH_LETTERS
    assert name_problems(args, "sd-scripts", windows=True) == []
    args.output_name += "n"
    (problem,) = name_problems(args, "sd-scripts", windows=True)
    assert "more than 259 letters" in problem
    assert name_problems(args, "sd-scripts", windows=False) == []
    monkeypatch.setattr("spf_plugin.hosts.looking.long_paths", lambda: True)
    assert name_problems(args, "sd-scripts", windows=True) == []


def test_a_file_that_is_open_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, slept = [], []
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    really = os.replace

    def held(source: Path, target: Path) -> None:
        tried.append(1)
        if len(tried) < 4:
            raise PermissionError(13, "The process cannot access the file")
        really(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(PermissionError):
        replace(new, old, windows=False)
    assert (len(tried), slept, old.read_bytes()) == (1, [], b"old")
    replace(new, old, windows=True)
    assert (len(tried), old.read_bytes()) == (4, b"new")
    tried[:] = [1] * -100
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "held")))
    with pytest.raises(PermissionError):  # a program that keeps it open: not for ever
        replace(new, old, windows=True)
    assert len(slept) == 2 + files._TRIES - 1


def test_all_files_of_a_run_are_replaced_so() -> None:
    """But for the pictures of a run: a viewer may have one open for hours, and there will be others."""
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "spf_plugin")]
    direct = {path.name for path in package for _, name in calls(path) if name == "os.replace"}
    assert direct == {"files.py", "watch.py"}


def test_scripts_are_known_by_either_slash() -> None:
    for name in (r"C:\sd-scripts\sdxl_train_network.py", "sd-scripts/sdxl_train_network.py", "sdxl_train_network"):
        script = scripts.named(name)
        assert script is not None
        assert script.name == "sdxl_train_network"


def test_captions_and_settings_with_windows_line_ends(tmp_path: Path) -> None:
    for i, ends in enumerate((b"\r\n", b"\n")):
        folder = tmp_path / str(i)
        folder.mkdir()
        Image.new("RGB", (64, 64)).save(folder / "a.png")
        (folder / "a.txt").write_bytes("\ufeff".encode() * (1 - i) + CHINESE.encode() + ends)
        (folder / "hair.toml").write_bytes(b'spf_target = "blonde hair"' + ends + b"spf_map_gain = 2" + ends)
    first, second = (read_folder(tmp_path / str(i))[0].caption for i in (0, 1))
    assert first == second == CHINESE
    one, two = (files.read_toml(tmp_path / str(i) / "hair.toml") for i in (0, 1))
    assert one == two == {"spf_target": "blonde hair", "spf_map_gain": 2}


def test_a_console_that_lacks_the_letters(tmp_path: Path) -> None:
    """As a pipe has on a Western Windows: what it lacks is a question mark, and the command ends as it would."""
    folder = tmp_path / "写真"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (512, 512), (80 * i, 20, 20)).save(folder / f"髪{i}.png")
        (folder / f"髪{i}.txt").write_text(f"{CHINESE}, {i} trees\n", encoding="utf-8")
    program = "import sys; sys.argv[0] = 'spf'; from spf_plugin.tools.cli import main; main()"
    arguments = ["check", str(folder), "--target", "微笑"]

    def run(encoding: str) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, env=environment)

    here, there = run("utf-8"), run("cp1252")
    assert there.returncode == here.returncode, there.stderr.decode("cp1252")
    assert b"Traceback" not in there.stderr + there.stdout
    assert "blonde hair" in there.stdout.decode("cp1252")
    assert "?" in there.stdout.decode("cp1252")
    assert "微笑" in here.stdout.decode()


def test_installing_says_what_it_does_on_such_a_console(tmp_path: Path) -> None:
    folder = tmp_path / "写真"
    folder.mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, str(ROOT / "install.py"), "--sd-scripts", str(folder), "--dry-run"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 1
    assert b"is not a copy of sd-scripts" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_page_names_files_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "windows.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:spf_plugin|portraitlab|tests|networks)/[\w/]+\.py|install\.py)`(?:, `(\w+)`)?", page)
    assert len(named) > 15
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, (file, name)
    own = {node.name for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body if hasattr(node, "name")}
    for name in re.findall(r"`(test_\w+)`", page):
        assert name in own or any(name == said for _, said in named), name
