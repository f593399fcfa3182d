"""Text from files is shown on the terminal, and never obeyed by it."""

from __future__ import annotations

import io
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console as RichConsole
from rich.logging import RichHandler
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin import terminal
from spf_plugin.errors import SPFError
from spf_plugin.terminal import escaped
from spf_plugin.tools.cli import check as cli_check
from spf_plugin.tools.cli import lora as cli_lora
from spf_plugin.tools.cli.console import Console, say
from tests.check_sets import good

PACKAGE = Path(__file__).parents[1] / "spf_plugin"
# A title, a cleared screen, a link that says something else, a C1 control, a word written backwards, a line break that
# only some programs know, half of a character, and a return over what was written before.
EVIL = "\x1b]0;title\x07\x1b[2J\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x9b31m \u202egnp.exe \u2028 \rover"


def obeyed(text: str) -> list[str]:
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_what_is_escaped_and_what_is_not() -> None:
    assert escaped("\x1b[2J \x9b \u202e \ud800") == "\\u001b[2J \\u009b \\u202e \\ud800"
    for text in ("two\nlines\tand a tab", "好 é 👩‍💻 ñ", "a\u200db", ""):
        assert escaped(text) == text
    said = json.dumps({"a": EVIL}, ensure_ascii=False)
    assert not obeyed(escaped(said))
    assert json.loads(escaped(said)) == {"a": EVIL}


def test_errors_logs_and_lines(caplog: pytest.LogCaptureFixture) -> None:
    assert not obeyed(str(SPFError([EVIL, "a"])) + str(SPFError(EVIL)))
    log = terminal.logger("spf_plugin.test")
    assert terminal.logger("spf_plugin.test").filters == log.filters == [log.filters[0]]
    with caplog.at_level(logging.INFO):
        log.warning("caption %s", EVIL)
    assert "link" in caplog.text
    assert not obeyed(caplog.text)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say(f"好 {EVIL}", file=stream)
    stream.seek(0)
    assert stream.read().startswith("? \\u001b]0;title")
    written = io.StringIO()
    Console(file=written, force_terminal=True, width=60).print(EVIL, style="red", markup=False)
    assert obeyed(re.sub(r"\x1b\[[\d;]*m", "", written.getvalue())) == []
    assert "\x1b[31m" in written.getvalue()  # our own colours are obeyed


def test_a_line_leaves_pythons_random_state_as_it_is() -> None:
    """rich draws from it for every style, and the host's next captions are shuffled and dropped with it."""
    log = terminal.logger("spf_plugin.test_random")
    handler = RichHandler(console=RichConsole(file=io.StringIO(), force_terminal=True))
    log.addHandler(handler)
    random.seed(5)
    drawn = [random.random() for _ in range(3)]
    random.seed(5)
    try:
        for i in range(3):
            log.warning("SPF: step %s of /a/path with 'quotes' and 12.5 %%", i)
            assert random.random() == drawn[i]
    finally:
        log.removeHandler(handler)
    assert logging.getLoggerClass() is logging.Logger


def test_nothing_writes_past_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        if name not in ("terminal.py", "tools/cli/console.py"):
            assert "getLogger(__name__)" not in text, name
            assert not re.search(r"typer\.echo|^\s*print\(", re.sub(r'""".*?"""', "", text, flags=re.S), re.M), name
        if name != "tools/cli/progress.py":  # only a type there
            assert not re.search(r"from rich\.console import .*Console\b(?!Options)", text), name


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "evil.safetensors"
    name = f"lora_unet_{EVIL[:-5].encode(errors='ignore').decode()}"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    metadata = {"ss_sd_model_name": EVIL, "ss_network_args": json.dumps({EVIL: EVIL, "spf_target": EVIL})}
    save_file(tensors, path, {key: value.replace("\ud800", "") for key, value in metadata.items()})
    return path


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_metadata_and_names_of_a_lora(lora: Path, tmp_path: Path, words: list[str]) -> None:
    result = CliRunner().invoke(cli_lora.app, ["check", str(lora), *words])
    assert "link" in result.output
    assert not obeyed(result.output)
    if words:
        assert EVIL in json.loads(result.stdout)[0]["settings"].values()
    for command in (["fix"], ["convert", "--to", "peft"]):
        result = CliRunner().invoke(cli_lora.app, [*command, str(lora), str(tmp_path / "out.safetensors"), "--force"])
        assert not obeyed(result.output)
    result = CliRunner().invoke(cli_lora.app, ["sidecar", str(lora)])
    assert not obeyed(result.output)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_captions_and_file_names_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = good(tmp_path)
    evil = EVIL.replace("/", "_").replace("\\", "")
    for i in range(4):
        run.caption(i, f"a man {evil[:-5]} with {i}, {evil[:-5]}, Blonde Hair (x:1.2)")
    Image.new("RGB", (9, 9)).save(run.images / f"{evil}.png")
    run.set(metadata_title=evil, **{f"k{evil}": evil})
    result = CliRunner().invoke(cli_check.app, [str(run.config), "--tokenizer", "none", *words])
    assert "link" in result.output
    assert not obeyed(result.output)
    if words:
        assert any(evil[:-5] in row["caption"] for row in json.loads(result.stdout)["captions"])


def test_a_warning_of_the_run_quotes_captions_escaped(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from spf_plugin.config import parse
    from spf_plugin.hosts.kohya.loop import KohyaHost

    def info(caption: str) -> Any:
        return SimpleNamespace(caption=caption, is_reg=False, absolute_path="")

    data = SimpleNamespace(
        image_data={"a": info("a man in the street, hat"), "b": info(f"a man, {EVIL}")}, image_to_subset={}
    )
    args = SimpleNamespace(network_train_text_encoder_only=False)
    names = {"self": None, "args": args, "train_dataset_group": SimpleNamespace(datasets=[data])}
    with caplog.at_level(logging.WARNING):
        assert KohyaHost(names, []).problems(parse({"spf_target": "hat"})) == []
    assert "link" in caplog.text
    assert not obeyed(caplog.text)
