"""The documentation's commands: each is parsed by its own program, and each is run by a test or says why it is not."""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import toml
import typer
from packaging.requirements import Requirement
from typer.core import TyperGroup

import install
from spf_plugin import config
from spf_plugin.families.base import Family
from spf_plugin.hosts.base import Host
from spf_plugin.hosts.musubi import scripts as musubi_scripts
from spf_plugin.tools import cli
from spf_plugin.tools.check.host_options import OPTIONS
from spf_plugin.tools.check.musubi import options as musubi
from tests.documents import PAGES, ROOT, Command, blocks, commands, is_command
from tests.hosts.conftest import HOSTS
from tests.hosts.dits.kinds import KINDS, kind
from tests.hosts.musubi.classes import checkouts

COMMANDS = commands()
GPU, NETWORK, HOURS, GUI = "needs a GPU", "needs a network", "takes hours", "needs the GUI's own environment"
#: How a command begins -> the test that runs it (its options differ), or the reason why none does.
RUN_BY = {
    "python install.py demo": "tests/portraitlab/test_demo.py::test_the_demo_writes_files_a_page_and_a_table",
    "python install.py test": "this very run, in .ci/run",
    "spf cache-prompts": "tests/hosts/musubi/test_prompts.py::test_what_is_current_is_left_alone",
    "python install.py --musubi-tuner": "tests/test_install.py::test_into_musubi_tuner_and_out_again",
    "python install.py --sd-scripts": "tests/test_install.py::test_install_twice_and_uninstall",
    "python PATH/TO/spf-plugin/install.py": f"{GUI}; tests/test_install.py::test_install_twice_and_uninstall",
    "python -m tests.lorafile.musubi_real": "needs checkouts; tests/lorafile/test_lora_musubi.py runs what it records",
    "python -m tests.lorafile.real": "needs checkouts; tests/lorafile/test_lora_real.py runs what it records",
    "python -m tests.compare_revisions": "half an hour on two revisions; it says itself what is the same",
    "python -m tests.support": "tests/hosts/test_support.py::test_the_page_is_what_the_code_says",
    "spf lab run": "tests/portraitlab/test_lab.py::test_a_second_run_computes_only_what_is_missing",
    "spf lab sequence": "tests/portraitlab/test_lab.py::test_targets_are_taught_one_after_the_other",
    "spf lab document": "tests/portraitlab/test_lab.py::test_the_documentations_tables_are_what_its_commands_print",
    "spf lab plot": "tests/portraitlab/test_lab.py::test_tables_and_plot",
    "spf lab pictures": "tests/portraitlab/test_lab.py::test_pictures_of_measured_loras",
    "spf lab maps": "tests/portraitlab/test_lab.py::test_map_quality_knows_a_perfect_map_from_an_empty_one",
    "spf lab": "tests/portraitlab/test_lab.py::test_a_second_run_computes_only_what_is_missing",
    "spf lab publish": "tests/portraitlab/test_lab.py::test_results_are_read_back_and_published_in_a_stable_order",
    "python -m portraitlab.train_base": f"{HOURS}; tests/portraitlab/test_model.py::test_a_resumed_run_is_the_same_run",
    "python -m portraitlab.tune_decoder": f"{HOURS}: it made the shipped decoder",
    "python -m portraitlab.export_base": "needs the training state, which is not shipped; "
    "tests/portraitlab/test_model.py::test_export_without_a_checkpoint_says_what_to_do",
    "python -m portraitlab.train_judge": f"{HOURS}: it made the shipped judge",
    "python -m portraitlab.evaluate_base": "tests/portraitlab/test_commands.py::test_scores_of_the_base_model",
    "python -m portraitlab.model_card": "tests/portraitlab/test_commands.py::"
    "test_the_shipped_card_is_what_its_command_writes",
    "python -m benchmarks.step_cost --time": GPU,
    "python -m benchmarks.step_cost": "takes an hour; tests/test_cost.py::test_flops_of_a_pair_and_of_the_default_run",
    "python -m benchmarks.base_error": "tests/test_quantised.py::test_distance_from_the_unquantised_model",
    "python -m benchmarks.plain_step": "takes minutes; it stops where a step that should be a plain one is none",
    "python -m benchmarks.reencoding": "tests/test_cached_text.py::test_bf16_is_far_from_another_caption",
    "python -m benchmarks.response_cost": "takes minutes and counts what tests/test_cost.py counts",
    "python -m benchmarks.musubi_cost": "tests/test_plan_musubi.py::test_activations_are_those_that_are_tracked",
    "python -m benchmarks.dit_cost": "tests/test_plan_dits.py::test_activations_are_those_that_are_tracked",
    "python networks/": "sd-scripts' own tools, on real LoRAs; their options are compared with its source below",
    "python -m venv": "Python's own",
    "python src/musubi_tuner/": "tests/hosts/musubi/test_walk.py::test_the_commands_of_the_page",
    "accelerate launch src/musubi_tuner/": "tests/hosts/musubi/test_walk.py::test_the_commands_of_the_page",
    "accelerate launch": "tests/hosts/test_training.py::test_sd15_writes_an_ordinary_lora",
    "spf check": "tests/check/test_mistakes.py::test_planted_mistake",
    "spf plan": "tests/test_plan.py::test_it_fits",
    "spf doctor": "tests/test_doctor.py::test_real_checkouts",
    "spf report": "tests/test_report_command.py::test_the_page_and_its_files",
    "spf train": "tests/test_reference_trainer.py::test_ctrl_c_saves_what_there_is",
    "spf decoder": "tests/test_decoder_command.py::test_a_matrix_for_the_embedded_model",
    "spf lora check": "tests/lorafile/test_lora_cli.py::test_check_good",
    "spf lora fix": "tests/lorafile/test_lora_cli.py::test_fix",
    "spf lora convert": "tests/lorafile/test_lora_cli.py::test_convert_there_and_back",
    "spf lora sidecar": "tests/lorafile/test_lora_cli.py::test_sidecar",
    "spf lora": "tests/lorafile/test_lora_cli.py::test_help",
    "pip install": f"{NETWORK} and an environment of its own; tests/test_install.py::test_install_twice_and_uninstall",
    "git clone": NETWORK,
    "git -C": f"{NETWORK}: goes with git clone",
    "export": "for a program of the second environment, below",
    "pytest": "a part of this suite; two of them only where their second environment is",
}
#: Blocks that are no commands: page and first line -> what they are.
SHOWN = {
    ("README.md", "SPF: 2 problems"): "a message; tests/test_troubleshooting.py looks for every message in the source",
    ("docs/troubleshooting.md", "SPF: 400 batches"): "a line of a log; tests/lorafile/test_record.py makes the same",
    ("docs/method.md", "L_1 = "): "formulas",
    ("docs/method.md", "L_2 = "): "formulas",
    ("docs/guis/README.md", "# hair.toml"): "settings",
    ("docs/guis/README.md", "spf_config=hair.toml"): "settings",
    ("docs/guis/colab.md", 'network_module = "spf_plugin.lora"'): "settings",
    ("docs/guis/lora-scripts.md", 'network_module = "spf_plugin.lora"'): "settings",
    ("docs/guis/kohya_ss.md", "--network_train_unet_only"): "settings",
}
NO_COMMANDS = {("spf", "card")}  # a key in a file


def begins(command: Command) -> str:
    """How `RUN_BY` calls a command; the longest beginning counts."""
    words = "pip install" if command.program == "pip" else " ".join([command.program, *command.words[1:]])
    return max((start for start in RUN_BY if f"{words} ".startswith(start)), key=len, default="")


def parse(program: Any, words: list[str], *, whole: bool) -> None:
    """Parse a command line as its program would, and run nothing.

    Args:
        program: typer's command or group.
        words: behind its name.
        whole: nothing may be missing.
    """
    if isinstance(program, TyperGroup):
        if not words:
            assert not whole, "a sub-command is missing"
            return
        _, sub, rest = program.resolve_command(typer.Context(program), words)
        assert sub is not None
        parse(sub, rest, whole=whole)
    elif words or whole:
        try:
            program.make_context(program.name, list(words))
        except Exception as error:  # typer's own copy of click's classes, or click's
            if whole or type(error).__name__ != "MissingParameter":
                raise


def program_of(module: str) -> Any:
    """The command line of a module that is started with `python -m`."""
    found = import_module(module)
    if not isinstance(getattr(found, "app", None), typer.Typer):
        made = typer.Typer()
        made.command()(found.main)
        return typer.main.get_command(made)
    return typer.main.get_command(found.app)


def existing(words: list[str]) -> None:
    """Files of this repository that a command names are there."""
    for word in words:
        inside = re.sub(r"^(?:path/to/(?:this/repository/)?)", "", word)
        if re.match(r"(?:presets|portraitlab|tests|benchmarks|docs)/.*\.\w+$", inside):
            assert (ROOT / inside).exists(), word


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "spf" and c.words not in NO_COMMANDS], ids=str)
def test_spf(command: Command) -> None:
    name, *words = command.words[1:]
    existing(words)
    later = ROOT / "spf_plugin" / "cli" / f"{name}.py"
    if name in ("lora", "check", "report", "doctor"):  # mounted when they run
        parse(program_of(f"spf_plugin.tools.cli.{later.stem}"), words, whole=command.whole)
    elif name == "lab":
        parse(program_of("portraitlab.lab.app"), words, whole=command.whole)
    else:
        parse(typer.main.get_command(cli.app), [name, *words], whole=command.whole)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "python"], ids=str)
def test_python(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(command.words[1:])
    existing(words)
    if words[0].split("/")[-1] == "install.py":
        run: list[Any] = []
        monkeypatch.setattr(install, "environment", lambda *names: Path("python"))
        monkeypatch.setattr(install.subprocess, "run", lambda command, **_: run.append(command) or _Done())
        for name in ("install", "uninstall", "install_musubi", "uninstall_musubi"):
            monkeypatch.setattr(install, name, lambda folder, dry, name=name: run.append([name, folder]))
        monkeypatch.setattr(install, "add_command_line", lambda dry: None)
        assert install.main(words[1:]) == 0
        (started,) = run
        if words[1] == "demo":
            parse(program_of(started[2]), started[3:], whole=True)
        elif words[1] == "test":
            assert started[1:3] == ["-m", "pytest"]
        else:
            wanted = "uninstall" if "--uninstall" in words else "install"
            assert started[0] == (f"{wanted}_musubi" if "--musubi-tuner" in words else wanted)
    elif words[0] == "-m" and words[1].split(".")[0] in ("portraitlab", "benchmarks", "spf_plugin"):
        parse(program_of(words[1]), words[2:], whole=command.whole)
    elif words[0] == "-m":
        assert find_spec(words[1]) is not None
    else:
        theirs = words[0].startswith("src/musubi_tuner/")
        hosts = checkouts() if theirs else HOSTS
        if not hosts:
            name = "musubi-tuner" if theirs else "sd-scripts"
            pytest.skip(f"NO {name} CHECKOUT FOUND (see README, Tests): its tools' options are not compared")
        for host in hosts:
            source = (host / words[0]).read_text(encoding="utf-8")
            if "_cache_" in words[0]:  # what the scripts of all models have is in another file
                source += "".join(
                    (host / "src" / "musubi_tuner" / f"cache_{what}.py").read_text(encoding="utf-8")
                    for what in ("latents", "text_encoder_outputs")
                )
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, (host.name, option)


class _Done:
    returncode = 0


TRAINERS = {"train_network.py", "sdxl_train_network.py", *(kind(name).SCRIPT for name in KINDS)}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "accelerate"], ids=str)
def test_launch_lines(command: Command) -> None:
    assert command.words[1] == "launch"
    existing(list(command.words))
    if command.words[2].startswith("src/musubi_tuner/"):
        script = musubi_scripts.named(command.words[2])
        assert script is not None
        host_words(list(command.words[3:]), musubi.known(script))
    else:
        assert command.words[2] in TRAINERS
        host_words(list(command.words[3:]))


def host_words(words: list[str], known: Container[str] = OPTIONS) -> None:
    """Options that the trainer knows (`known`), and settings that SPF knows."""
    ours: list[str] = []
    for i, word in enumerate(words):
        if word.startswith("--"):
            assert word[2:] in known, word
        if word == "--network_args":
            ours = words[i + 1 :]
    assert ours or "--network_args" not in words
    settings = dict(word.split("=", 1) for word in ours if word.startswith("spf_") and "=" in word)
    settings.pop("spf_config", None)  # a file that the reader writes
    config.parse(settings)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "pip"], ids=str)
def test_pip(command: Command) -> None:
    if "install" not in command.words:  # "and so on"
        assert not command.whole
        return
    words = command.words[command.words.index("install") + 1 :]
    extras = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    takes_value = {"--target"}
    for word in (w for before, w in zip(("", *words), words, strict=False) if before not in takes_value):
        if word.startswith("--"):
            continue
        extra = re.search(r"\[(.+)\]$", word)
        if "/" in word or word.startswith("spf-plugin"):
            assert not extra or set(extra[1].split(",")) <= set(extras), word
        else:
            Requirement(word)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "pytest"], ids=str)
def test_pytest(command: Command) -> None:
    existing(list(command.words))


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    used = set()
    for command in COMMANDS:
        if command.words in NO_COMMANDS:
            continue
        start = begins(command)
        assert start, f"{command}: add it to RUN_BY, with the test that runs it or the reason why none does"
        used.add(start)
    assert used == set(RUN_BY)  # nothing that no page says any more
    for said in RUN_BY.values():
        for file, name in re.findall(r"(tests/\S+\.py)::(\w+)", said):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), said


def test_every_other_block_is_known() -> None:
    """A new block of a page is a command, code, or one of these."""
    seen = set()
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for _, language, lines in blocks(page):
            if language == "python" or any(is_command(line) for line in lines):
                continue
            known = [key for key in SHOWN if key[0] == name and lines[0].startswith(key[1])]
            assert known, (name, lines[:2])
            seen.add(known[0])
            if SHOWN[known[0]] == "settings":
                shown_settings(lines)
    assert seen == set(SHOWN)


def shown_settings(lines: list[str]) -> None:
    if lines[0].startswith("--"):
        host_words(" ".join(lines).split())
    elif " = " in lines[-1]:
        found = toml.loads("\n".join(lines))
        if "network_args" in found:
            assert set(found) <= set(OPTIONS)
            found = dict(word.split("=", 1) for word in found["network_args"])
        config.parse(found)


def test_python_code_compiles_and_its_imports_exist() -> None:
    count = 0
    for page in PAGES:
        for _, language, lines in blocks(page):
            if language != "python":
                continue
            count += 1
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.ImportFrom):
                    module = import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name
    assert count >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_line_of_a_table_has_the_cells_of_its_head(page: Path) -> None:
    """A bare `|`, in code too, ends a cell, and what follows is not shown."""
    wanted = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (wanted and cells) or cells == wanted, f"{page.name}:{number}: {line}"
        wanted = cells


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_into_a_page_lead_to_a_heading() -> None:
    def anchors(page: Path) -> set[str]:
        """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
        heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}

    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


def test_no_placeholder_was_left() -> None:
    for page in PAGES:
        found = re.findall(r"^[A-Z]{6,}$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{page.name}: {found}"


# -- docs/hosts.md ----------------------------------------------------------------------------------------------------

FAMILY_PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
HOST_PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")


def members(protocol: Any) -> set[str]:
    """What a class must have to be one, as Python's own `Protocol` counts it."""
    return {
        name
        for base in protocol.__mro__
        if base.__module__.startswith("spf_plugin")
        for name in (*vars(base), *vars(base).get("__annotations__", {}))
        if not name.startswith("_")
    }


def offered(path: str, ending: str) -> set[str]:
    """What the one class of this ending in a file has: methods, class attributes, and what it sets on itself."""
    source = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    (cls,) = [n for n in source.body if isinstance(n, ast.ClassDef) and n.name.endswith(ending)]
    own = {n.name for n in cls.body if isinstance(n, ast.FunctionDef)}
    own |= {n.id for n in ast.walk(cls) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return own | {n.attr for n in ast.walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def named(page: str, first: str, after: str) -> set[str]:
    """The code words in the first column of the table between these words."""
    table = page[page.index(first) : page.index(after)]
    return {word for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)}


def test_the_pages_on_hosts_and_families_name_every_member() -> None:
    assert named(HOST_PAGE, "| member |", "`tests/toy/host.py`") == members(Host)
    for file in ("spf_plugin/hosts/kohya/loop.py", "spf_plugin/hosts/reference.py", "tests/toy/host.py"):
        assert members(Host) <= offered(file, "Host"), file
    assert named(FAMILY_PAGE, "| member |", "## What holds") == members(Family) - {"denoiser"}
    for file, ending in (
        ("spf_plugin/families/unet.py", "UNet"),
        ("spf_plugin/families/anima.py", "Anima"),
        ("spf_plugin/families/flux.py", "Flux"),
        ("spf_plugin/families/sd3.py", "SD3"),
        ("spf_plugin/families/hunyuan_image.py", "HunyuanImage"),
        ("spf_plugin/families/lumina.py", "Lumina"),
        ("tests/toy/family.py", "Toy"),
    ):
        assert members(Family) <= offered(file, ending), file


def test_the_tests_that_these_pages_name_exist() -> None:
    for page in (HOST_PAGE, FAMILY_PAGE):
        rows = re.findall(r"`(tests/[\w/]+\.py)`(?:, `(\w+)`)?", page)
        assert len(rows) > 5
        for file, name in rows:
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text or f"class {name}" in text, (file, name)


def test_sizes_that_these_pages_state() -> None:
    for page in (HOST_PAGE, FAMILY_PAGE):
        found = re.findall(r"`([\w/]+\.py)`(?:,| is one in)? ?\(?(\d+) lines", page)
        assert found
        for file, lines in found:
            assert abs(len((ROOT / file).read_text(encoding="utf-8").splitlines()) - int(lines)) <= 5, file


def test_there_is_a_program_for_every_word() -> None:
    """A command of a new program is seen: the list of programs is what the pages use."""
    assert {command.program for command in COMMANDS} == {
        "spf",
        "python",
        "pip",
        "pytest",
        "accelerate",
        "git",
        "export",
    }
    assert len(COMMANDS) > 80
