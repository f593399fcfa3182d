#!/usr/bin/env python3
"""Install the plugin into a copy of sd-scripts or musubi-tuner, or run the demo or the tests in an environment of their
own.

    python install.py --sd-scripts DIR     in the Python environment that sd-scripts runs in
    python install.py --sd-scripts DIR --cli   the same, and what the spf command lacks there
    python install.py --musubi-tuner DIR --cli   the same for musubi-tuner, whose prompts the spf command encodes
    python install.py demo                 train on the embedded model and write a report
    python install.py test                 run the whole test suite

Needs nothing but Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SHIM = ROOT / "networks" / "spf_lora.py"
PACKAGE = "spf-plugin"
ENVIRONMENT = ROOT / ".venv"
TEST_PROCESSES = 4  # of up to 2 GB each
NEEDED = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "toml")
# From here on typer brings pydantic 2. A host may pin pydantic 1, and may bring it later than we come.
UNWANTED = {"typer": "0.29"}
BROUGHT = "spf_plugin.brought"  # beside the packages: those of them that `--cli` added


class Stop(Exception):
    """A message for the user; the installer ends with it."""


def run(command: list[str], *, dry: bool = False, quiet: bool = False) -> None:
    """Run a command, or only say it."""
    print(("would run: " if dry else "running: ") + shlex.join(command), flush=True)
    if dry:
        return
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None
        )
    except OSError as error:
        raise Stop(f"{command[0]} cannot be started: {error.strerror or error}") from None
    if result.returncode:
        if quiet:
            sys.stdout.write(result.stdout.decode(errors="replace")[-4000:])
        raise Stop(f"this command failed with exit status {result.returncode}: {shlex.join(command)}")


# -- into sd-scripts ------------------------------------------------------------------------------------------------


def check_host(folder: Path) -> str:
    """The loop family of an sd-scripts folder, by what its source offers (some installers edit it: no hashes).

    Raises:
        Stop: not sd-scripts, or a release that SPF does not support.
    """
    script = folder / "train_network.py"
    for needed in (script, folder / "sdxl_train_network.py", folder / "networks" / "lora.py", folder / "library"):
        if not (needed.is_dir() if needed.name == "library" else needed.is_file()):
            raise Stop(
                f"{folder} is not a copy of sd-scripts: {needed.relative_to(folder)} is missing. Give its top folder."
            )
    source = script.read_text(encoding="utf-8", errors="replace")
    if "def call_unet" not in source:
        raise Stop(f"{folder} is older than v0.7.0 (no call_unet in train_network.py). Update sd-scripts.")
    if "def process_batch" in source:
        return "process_batch loop (2025 branches to v0.11.x)"
    if "def get_noise_pred_and_target" in source:
        raise Stop(
            f"{folder} is a 2024 development branch of sd-scripts (no process_batch). Update it to main, or use v0.9.1."
        )
    return "monolithic loop (up to v0.9.1)"


def check_environment(folder: Path, name: str) -> None:
    """Whether this Python is the one that the host, `name`, runs in."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        own = next((p for v in ("venv", ".venv") for p in _pythons(folder / v) if p.exists()), None)
        hint = (
            f"Run it with {name}'s own Python: {quoted(own)} install.py ..."
            if own
            else f"Activate {name}'s environment first."
        )
        raise Stop(f"this Python ({sys.executable}) has no {', '.join(missing)}. {hint}")


def pip(action: str, *words: str) -> list[str]:
    """The command that installs or uninstalls here: pip's, or uv's where it made the environment without pip.

    Raises:
        Stop: neither is here.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", action, *(["-y"] if action == "uninstall" else []), *words]
    theirs = ["--reinstall" if word == "--force-reinstall" else word for word in words]
    command = ["pip", action, "--python", sys.executable, *theirs]
    if uv := shutil.which("uv"):
        return [uv, *command]
    said = " ".join(["uv", *(quoted(Path(w)) if os.sep in w else w for w in command)])
    raise Stop(f"this environment has no pip, and there is no uv to do without: {said}. Or: python -m ensurepip.")


def _pythons(environment: Path) -> tuple[Path, Path]:
    return environment / "Scripts" / "python.exe", environment / "bin" / "python"


def installed_is_current() -> bool:
    """Whether the environment already has exactly this source."""
    found = subprocess.run(
        [
            sys.executable,
            "-P" if sys.version_info >= (3, 11) else "-I",
            "-c",
            "import json, spf_plugin; print(json.dumps(spf_plugin.__path__[0]))",  # a pipe may lack letters of it
        ],
        capture_output=True,
        text=True,
        cwd=Path.home(),
    )
    if found.returncode:
        return False
    installed, source = Path(json.loads(found.stdout)), ROOT / "spf_plugin"
    if installed.resolve() == source.resolve():
        return True
    names, there = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        for folder in (source, installed)
    )
    return names == there and all(filecmp.cmp(source / n, installed / n, shallow=False) for n in names)


@contextmanager
def source_copy(*, dry: bool) -> Iterator[Path]:
    """What the package is built from, in a folder that goes away: setuptools leaves `build/` in it, from which it would
    take modules that are gone into the next installation."""
    if dry:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        copy = Path(place, PACKAGE)
        shutil.copytree(ROOT / "spf_plugin", copy / "spf_plugin", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / name, copy / name)
        yield copy


def our_shim(folder: Path) -> Path:
    """Where the shim belongs in a folder of sd-scripts.

    Raises:
        Stop: something else is there, or it cannot be read.
    """
    target = folder / "networks" / SHIM.name
    try:
        ours = not target.exists() or "spf_plugin" in target.read_text(encoding="utf-8", errors="replace")
    except OSError as error:  # a folder of that name, too
        raise Stop(f"{target} cannot be read: {error.strerror or error}. Move it away first.") from None
    if not ours:
        raise Stop(f"{target} exists and is not ours. Move it away first.")
    return target


def add_package(*, dry: bool) -> None:
    """This source into the environment, without touching any other package."""
    if installed_is_current():
        print("spf_plugin: already installed, this version")
        return
    words = ["--no-deps", "--force-reinstall"]
    if importlib.util.find_spec("setuptools") and importlib.util.find_spec("wheel"):
        words.append("--no-build-isolation")  # nothing to download
    with source_copy(dry=dry) as source:
        run(pip("install", *words, str(source)), dry=dry, quiet=True)


def install(folder: Path, *, dry: bool) -> None:
    """Package into the environment; shim into `networks/`."""
    family = check_host(folder)
    check_environment(folder, "sd-scripts")
    target = our_shim(folder)  # before anything is changed
    print(f"sd-scripts: {folder}\n  {family}")
    add_package(dry=dry)
    if target.exists() and filecmp.cmp(SHIM, target, shallow=False):
        print(f"shim: {target} is in place")
    else:
        print(f"{'would copy' if dry else 'copying'} {SHIM.name} to {target}")
        if not dry:
            partial = target.with_suffix(".partial")
            try:
                shutil.copyfile(SHIM, partial)
                os.replace(partial, target)
            except OSError as error:
                raise Stop(f"{target} was not written: {error.strerror or error}. Is the folder yours?") from None
    print(f"trainers: {', '.join(trainers(folder))}")
    preset = quoted(ROOT / "presets" / "sd15-8gb.toml")
    more = " " if os.name == "nt" else " \\\n      "  # cmd.exe and PowerShell continue lines in different ways
    print(
        "\nTrain (nothing of sd-scripts is edited):\n"
        f"  cd {quoted(folder)}\n"
        f"  accelerate launch train_network.py --config_file {preset}{more}"
        f'--network_module spf_plugin.lora --network_args "spf_target=blonde hair"{more}'
        "--train_data_dir DATA --output_dir OUT --output_name NAME\n"
        "SDXL: the same with sdxl_train_network.py and sdxl-12gb.toml. In DATA folders named by repeats: DATA/10_name"
    )


# -- into musubi-tuner ----------------------------------------------------------------------------------------------


def check_musubi(folder: Path) -> None:
    """Whether a folder is a musubi-tuner that SPF supports.

    Raises:
        Stop: it is not, or too old.
    """
    package = folder / "src" / "musubi_tuner"
    for needed in (package / "networks" / "lora.py", package / "zimage_train_network.py"):
        if not needed.is_file():
            raise Stop(
                f"{folder} is not a copy of musubi-tuner with Z-Image: {needed.relative_to(folder)} is missing. Give "
                "its top folder, or update it."
            )
    loop = package / "training" / "trainer_base.py"
    if not loop.is_file() or "def process_batch" not in loop.read_text(encoding="utf-8", errors="replace"):
        raise Stop(
            f"{folder} is older than what SPF supports (no process_batch in {loop.relative_to(folder)}). Update "
            "musubi-tuner (tested: v0.3.4)."
        )


def install_musubi(folder: Path, *, dry: bool) -> None:
    """Package into the environment. musubi-tuner imports its network modules from there: nothing is copied."""
    check_musubi(folder)
    check_environment(folder, "musubi-tuner")
    print(f"musubi-tuner: {folder}")
    add_package(dry=dry)
    print(f"trainers: {', '.join(musubi_trainers(folder))}")
    if (folder / ".venv").is_dir() and importlib.util.find_spec("pip") is None:
        print("uv sync takes SPF away again: run this again after it (uv run does not)")
    more = " " if os.name == "nt" else " \\\n      "
    print(
        "\nAfter musubi-tuner's own two caching scripts, encode the prompts for SPF, with options of the second:\n"
        f"  cd {quoted(folder)}\n"
        f'  spf cache-prompts --arch zimage --target "blonde hair"{more}'
        "--dataset_config DATA.toml --text_encoder MODEL\n"
        "and train (nothing of musubi-tuner is edited; every other option as always):\n"
        f"  accelerate launch src/musubi_tuner/zimage_train_network.py --dataset_config DATA.toml ...{more}"
        '--network_module spf_plugin.lora --network_args "spf_target=blonde hair"'
    )


def musubi_trainers(folder: Path) -> list[str]:
    """The LoRA trainers of a musubi-tuner folder that SPF knows, with what they train."""
    from spf_plugin.hosts.musubi.scripts import SCRIPTS

    there = folder / "src" / "musubi_tuner"
    return [f"{s.file} ({s.said})" for s in SCRIPTS if s.supported and (there / s.file).is_file()]


def uninstall_musubi(folder: Path, *, dry: bool) -> None:
    """Take away what `install_musubi` brought."""
    if not (folder / "src" / "musubi_tuner").is_dir():
        raise Stop(f"{folder} is not a copy of musubi-tuner: src/musubi_tuner is missing. Give its top folder.")
    run(pip("uninstall", PACKAGE), dry=dry, quiet=True)
    take_command_line(dry=dry)


# -- the command line -----------------------------------------------------------------------------------------------


def command_line() -> dict[str, str]:
    """Package -> lowest version, of what the `spf` command needs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', re.search(r"^cli = \[(.*)\]$", text, re.M)[1]))


def packages() -> dict[str, importlib.metadata.Distribution]:
    """What is installed here, by normalised name."""
    importlib.invalidate_caches()
    found: dict[str, importlib.metadata.Distribution] = {}
    for one in importlib.metadata.distributions():
        if one.metadata["Name"]:  # a half-removed one has none
            found.setdefault(_normalised(one.metadata["Name"]), one)
    return found


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]


def lacking() -> list[str]:
    """What the `spf` command needs and this environment has not.

    Raises:
        Stop: something that it has is too old. It is the host's, and stays.
    """
    here, needs = packages(), command_line()
    old = [
        f"{name} {here[name].version} ({lowest} or newer)"
        for name, lowest in needs.items()
        if name in here and _numbers(here[name].version) < _numbers(lowest)
    ]
    if old:
        raise Stop(f"too old for the spf command: {', '.join(old)}. It is the host's and stays; SPF trains without.")
    return [name for name in needs if name not in here]


def add_command_line(*, dry: bool) -> None:
    """What the `spf` command needs and is not here, in versions that fit what is here. Nothing that is here moves."""
    missing, before = lacking(), packages()
    below = {name: f",<{UNWANTED[name]}" for name in missing if name in UNWANTED}
    wanted = [f"{name}>={lowest}{below.get(name, '')}" for name, lowest in command_line().items()]
    # A version that pip cannot read would make it refuse the whole file.
    fixed = [
        f"{name}=={one.version}"
        for name, one in before.items()
        if re.fullmatch(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?", one.version)
    ]
    with tempfile.TemporaryDirectory() as place:
        constraints = Path(place, "constraints.txt")
        constraints.write_text("\n".join(fixed), encoding="utf-8")
        try:
            run(pip("install", "--constraint", str(constraints), *wanted), dry=dry, quiet=True)
        except Stop:
            raise Stop(
                "the spf command was not added: no version fits beside the packages here, or none could be fetched. "
                "They are as they were; SPF is installed, and trains without."
            ) from None
    added = {name: one for name, one in packages().items() if name not in before}
    if not added:
        print("spf command: " + ("would add what is missing" if dry and missing else "nothing is missing"))
        return
    record = Path(str(next(iter(added.values())).locate_file(BROUGHT)))
    known = record.read_text(encoding="utf-8") if record.exists() else ""
    lines = [f"{name}=={one.version}" for name, one in sorted(added.items())]
    record.write_text(known + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"spf command: added {', '.join(lines)}; nothing else moved")


def offer_command_line(folder: Path, option: str) -> None:
    """Say what would bring it, where it is not here. Nothing is asked: the installer may run where nobody answers."""
    try:
        missing = lacking()
    except Stop as stop:
        print(f"\nspf command: {stop}")
        return
    if missing:
        command = [quoted(Path(sys.executable)), quoted(ROOT / "install.py"), option, quoted(folder), "--cli"]
        does = (
            "check, doctor, lora" if option == "--sd-scripts" else "cache-prompts, without which it cannot train, check"
        )
        print(
            f"\nThe spf command ({does}) lacks {', '.join(missing)}. This adds it, and moves nothing:\n"
            f"  {' '.join(command)}"
        )


def take_command_line(*, dry: bool) -> None:
    """Take away what `add_command_line` brought, unless something came meanwhile that needs it."""
    here = packages()
    record = next((file for place in sys.path if (file := Path(place, BROUGHT)).is_file()), None)
    if record is None:
        return
    listed = [line.split("==") for line in record.read_text(encoding="utf-8").split()]
    ours = {name for name, version in listed if name in here and here[name].version == version}
    while True:
        needed = {
            _normalised(re.match(r"[\w.-]*", text)[0])
            for name, one in here.items()
            if name not in ours and name != PACKAGE
            for text in one.requires or []
            if "extra ==" not in text
        }
        if not ours & needed:
            break
        ours -= needed
    if ours:
        run(pip("uninstall", *sorted(ours)), dry=dry, quiet=True)
    if not dry:
        record.unlink()


def trainers(folder: Path) -> list[str]:
    """The LoRA trainers of an sd-scripts folder that SPF knows, with what they train."""
    from spf_plugin.hosts.kohya.scripts import SCRIPTS  # lies beside this file, and needs no package

    known = [script for script in SCRIPTS if script.supported and (folder / script.file).is_file()]
    return [f"{script.file} ({', '.join(script.models.values())})" for script in known]


def quoted(path: Path) -> str:
    """A path for this system's shell."""
    return f'"{path}"' if os.name == "nt" else shlex.quote(str(path))


def uninstall(folder: Path, *, dry: bool) -> None:
    """Take away what `install` brought, from what may have become another release of sd-scripts."""
    if not (folder / "networks").is_dir():
        raise Stop(f"{folder} is not a copy of sd-scripts: networks is missing. Give its top folder.")
    target = our_shim(folder)
    if target.exists():  # first: without pip, too
        print(f"{'would remove' if dry else 'removing'} {target}")
        if not dry:
            try:
                target.unlink()
            except OSError as error:
                raise Stop(f"{target} was not removed: {error.strerror or error}. Is the folder yours?") from None
    run(pip("uninstall", PACKAGE), dry=dry, quiet=True)
    take_command_line(dry=dry)


# -- demo and tests -------------------------------------------------------------------------------------------------


def environment(*names: str) -> Path:
    """`.venv` with the requirements of these files; set up once, and again when they change. Returns its Python."""
    files = [ROOT / "requirements" / f"{name}.txt" for name in names]
    wanted = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((ROOT / "requirements").glob("*.txt")))).hexdigest()
    stamp = ENVIRONMENT / f"spf-{names[0]}.stamp"
    python = next((p for p in _pythons(ENVIRONMENT) if p.exists()), None)
    if python and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        print(f"environment: {ENVIRONMENT} (ready)")
        return python
    print(f"environment: setting up {ENVIRONMENT} (once; a few minutes)", flush=True)
    if python is None:
        venv.create(ENVIRONMENT, with_pip=True)
        python = next(p for p in _pythons(ENVIRONMENT) if p.exists())
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    for file in files:
        if file.stem == "host-site":
            run(
                [*pip, "--quiet", "--no-deps", "--upgrade", "--target", str(ENVIRONMENT / "host-site"), "-r", str(file)]
            )
        else:
            run([*pip, *(["--no-deps"] if file.stem.endswith("no-deps") else []), "-r", str(file)], quiet=False)
    run([*pip, "--quiet", "--no-deps", "--editable", str(ROOT)])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def main(argv: list[str]) -> int:
    if sys.stdout.errors == "strict":  # on Windows a pipe lacks letters that a folder's name may have
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", metavar="DIR", type=Path, help="the folder with train_network.py")
    parser.add_argument("--musubi-tuner", metavar="DIR", type=Path, help="the folder with src/musubi_tuner")
    parser.add_argument("--uninstall", action="store_true", help="take the plugin out of DIR and its environment again")
    parser.add_argument(
        "--cli", action="store_true", help="also add what the spf command lacks there; nothing that is there moves"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("what", nargs="?", choices=["demo", "test"], help="run the demo, or the tests")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options for the demo or for pytest")
    options = parser.parse_args(argv)
    if options.what == "demo":
        python = environment("demo", "demo-no-deps")
        return subprocess.run([str(python), "-m", "portraitlab.demo", *options.rest], cwd=ROOT).returncode
    if options.what == "test":
        python = environment("test", "test-no-deps", "host-site")
        # The tests' models are too small to share: threads would only wait for each other.
        one_thread = {"OMP_NUM_THREADS": "1", **os.environ}
        # One process a core, and no more than an ordinary machine has memory for; `-n 0` turns it off.
        side_by_side = ["-n", "auto", "--maxprocesses", str(TEST_PROCESSES), "--dist", "worksteal"]
        command = [str(python), "-m", "pytest", *side_by_side, *options.rest]
        return subprocess.run(command, cwd=ROOT, env=one_thread).returncode
    given = options.sd_scripts or options.musubi_tuner
    if given is None:
        parser.print_help()
        return 2
    if options.sd_scripts and options.musubi_tuner:
        raise Stop("--sd-scripts and --musubi-tuner have environments of their own: run it once for each, in each.")
    folder = given.expanduser().resolve()
    if options.uninstall:
        (uninstall if options.sd_scripts else uninstall_musubi)(folder, dry=options.dry_run)
        return 0
    (install if options.sd_scripts else install_musubi)(folder, dry=options.dry_run)
    if options.cli:
        add_command_line(dry=options.dry_run)
    else:
        offer_command_line(folder, "--sd-scripts" if options.sd_scripts else "--musubi-tuner")
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036  the one file that an older Python may meet
        sys.exit("install.py needs Python 3.10 or newer")
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        sys.exit(f"install.py: {stop}")
    except KeyboardInterrupt:
        sys.exit("install.py: stopped")
