"""Every preset is read by the real host's own argument parser, and says nothing that the host does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import toml

from tests.hosts.conftest import LAUNCHER, REPOSITORY, Host

PRESETS = sorted(p for p in (REPOSITORY / "presets").glob("*.toml") if p.stem != "dataset")

SCRIPTS = {
    "sd15": "train_network",
    "sd21": "train_network",
    "sdxl": "sdxl_train_network",
    "anima": "anima_train_network",
    "sd35m": "sd3_train_network",
    "flux": "flux_train_network",
    "chroma": "flux_train_network",
    "lumina": "lumina_train_network",
    "hunyuan": "hunyuan_image_train_network",
}  # by the first word of a preset's name

READ = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import launcher
launcher.prepare(Path({host!r}))
import importlib
import train_network
from library import train_util
answer = {{}}
for preset in {presets!r}:
    script = {scripts!r}[Path(preset).stem.split("-")[0]]
    if not Path({host!r}, script + ".py").is_file():
        continue
    module = importlib.import_module(script)
    parser = module.setup_parser()
    known = sorted(action.dest for action in parser._actions)
    sys.argv = ["train_network.py", "--config_file", preset]
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    answer[preset] = {{"known": known, "args": {{k: v for k, v in vars(args).items() if k in known}}}}
from library import config_util
dataset = config_util.load_user_config({dataset!r})
args = train_network.setup_parser().parse_args([])
sanitizer = config_util.ConfigSanitizer(True, True, False, True)
config_util.BlueprintGenerator(sanitizer).generate(dataset, args, tokenizer=None)
print("ANSWER" + json.dumps(answer, default=str))
"""


@pytest.fixture(scope="module")
def parsed(host: Host) -> dict[str, dict]:
    return json.loads(host.made_once(f"presets-{host.name}", partial(parse, host)).read_text(encoding="utf-8"))


def parse(host: Host, answer: Path) -> None:
    code = READ.format(
        tests=str(LAUNCHER.parent),
        host=str(host.folder),
        scripts=SCRIPTS,
        presets=[str(p) for p in PRESETS],
        dataset=str(REPOSITORY / "presets" / "dataset.toml"),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=host.environment())
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    answer.write_text(done.stdout.split("ANSWER")[1], encoding="utf-8")


def test_only_the_older_release_lacks_trainers(parsed: dict[str, dict], host: Host) -> None:
    read = {Path(preset).stem for preset in parsed}
    everywhere = {p.stem for p in PRESETS if SCRIPTS[p.stem.split("-")[0]] in ("train_network", "sdxl_train_network")}
    assert read == ({p.stem for p in PRESETS} if host.is_new else everywhere)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_preset(parsed: dict[str, dict], preset: Path) -> None:
    if str(preset) not in parsed:
        pytest.skip("this release has no trainer for it")
    answer = parsed[str(preset)]
    settings = toml.load(preset)
    unknown = set(settings) - set(answer["known"])
    assert not unknown
    for name, value in settings.items():
        assert answer["args"][name] == value, name
        assert type(answer["args"][name]) is type(value), name


def test_every_line_has_its_reason() -> None:
    for preset in PRESETS:
        for line in preset.read_text(encoding="utf-8").splitlines():
            assert not line or line.startswith("#") or " # " in line, f"{preset.name}: {line}"
