"""Broken and odd input, a few hundred of each kind from a fixed seed: every mistake is a sentence, none a traceback."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.hosts.kohya.loop import KohyaHost
from spf_plugin.lorafile import inspect, reader
from spf_plugin.lorafile.convert import to_diffusers
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.lorafile.sidecars import target_phrases, training_card
from spf_plugin.tools import preset
from spf_plugin.tools.check import source
from spf_plugin.tools.check.host_options import DATASET, OPTIONS, SUBSET, SWITCHES, TYPES
from spf_plugin.tools.check.run import check
from spf_plugin.tools.cli import check as cli_check
from tests.check_sets import Run, good

SEED = 20261128
COUNT = 150
SETTINGS = [*parse({}).to_metadata(), "spf_target", "spf_network", "spf_config"]
DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]
ODD: list[Any] = [
    True, 0, 1, -1, 3.5, float("inf"), float("-inf"), float("nan"), 10**400, 2**63 - 1, "", "x", "\0", "a\0b",
    "~nobody", "/", ".", "n" * 300, "n" * 5000, "/dev/zero", "1e-4", "好", "\x1b[2J", "{a|b", "((((", "(" * 3000, "..",
    "a->", "|", "->", "a{99999999999999999999}", "__main__", "__main__.x", ",", [], [[]], ["a", 1], [1, 2], [True], {},
    {"a": 1},
    {"spf_target": 3}, {"spf_target": {"a": 1}}, {"spf_target": ["hat", 1]}, {"spf_target": ["hat"]}, [{"a": 1}], DEEP,
]  # fmt: skip
#: What the toml library leaks, and what it takes although it is none.
BROKEN = [
    "a = [" * 5000, "datasets = 1\n[[datasets]]\n", "[a]\n[a]\n", "a = 1\na = 2\n", "a.b = 1\na = 2\n", "[[a]]\n[a]\n",
    "a = \n", "=", "[", "]", "[[]]", "a = {", "a = 'x", 'a = """', "a = 1979-13-45", "\ufeffa = 1", 'a = "\\ud800"',
    "[general.a.b.c]\nx=1", "general = 1\n", "datasets = [1]\n", "[[datasets]]\nsubsets = 1\n", "x" * 3000,
    "[" + "a." * 3000 + "a]", "[[datasets]]\n[datasets.subsets]\n", "a = [1, 'x']\n", "a = 0x\n", "a = 1__0\n",
    "a=1 b=2\n", "\r", "a = -\n", "datasets = 3\n", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = ['x']\n",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return good(tmp_path)


def mistakes_only(text: str, what: Any, *arguments: Any, **options: Any) -> Any:
    """The answer, or None where it is one of our sentences; whatever else is raised shows what it was raised on."""
    try:
        return what(*arguments, **options)
    except SPFError:
        return None
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{text[:2000]}") from error


def written(value: Any) -> str:
    """A value in TOML; the library's own writer fails on some of these."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {written(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


def lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {written(value)}\n" for key, value in values.items())


def mutated(rng: random.Random, text: str) -> str:
    """A few letters gone, doubled, or replaced by what a parser is most likely to stumble over."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        part = rng.choice([*"[]{}\"'=\n\\\0,.#", "", "[[", "inf", "9" * 30])
        text = text[:at] + part + text[at + rng.randint(0, 8) :]
    return text


def test_options_of_a_config(run: Run) -> None:
    rng = random.Random(SEED)
    before = toml.loads(run.config.read_text(encoding="utf-8"))
    often = ("network_args", "train_data_dir", "caption_extension", "in_json", "dataset_config", "max_train_steps")
    for _ in range(COUNT):
        options = {**before, **{rng.choice(sorted(OPTIONS)): rng.choice(ODD) for _ in range(rng.randint(1, 4))}}
        options |= {name: rng.choice(ODD) for name in often if rng.random() < 0.1}
        if rng.random() < 0.2:
            options["network_args"] = ["spf_target=blonde hair", f"{rng.choice(SETTINGS)}={rng.choice(ODD)}"]
        text = lines(options)
        run.config.write_text(text, encoding="utf-8", errors="replace")
        mistakes_only(text, check, run.config, {}, tokenizer=run.folder / "none")
        mistakes_only(text, preset.read, run.config, "sd1")


def test_every_option_says_that_a_value_is_of_the_wrong_kind(run: Run) -> None:
    for option in sorted(OPTIONS):
        for value in ([{"a": 1}], [[1]], float("inf"), 1.5, True):
            number = isinstance(value, float | bool)
            if number and (option in SWITCHES or (value == 1.5 and TYPES[option] is not int)):
                continue
            run.config.write_text(f"[section]\n{option} = {written(value)}\n", encoding="utf-8")
            args, findings = source.read(run.config, {})
            assert any(option in f.message for f in findings if f.level == "error"), (option, value)
            assert option not in args.given


def test_data_sets(run: Run) -> None:
    rng = random.Random(SEED)
    for _ in range(COUNT):
        subset: dict[str, Any] = {"image_dir": "data/10_hair", "caption_extension": ".txt"}
        levels: list[dict[str, Any]] = [{}, {"resolution": 512}, subset]
        for _ in range(rng.randint(1, 3)):
            level, names = rng.choice(list(zip(levels, (DATASET, DATASET, SUBSET), strict=True)))
            level[rng.choice([*names, "custom_attributes"])] = rng.choice(ODD)
        config: dict[str, Any] = {"general": levels[0], "datasets": [{**levels[1], "subsets": [subset]}]}
        if rng.random() < 0.2:
            config[rng.choice(["general", "datasets"])] = rng.choice(ODD)
        path = run.folder / rng.choice(["dataset.toml", "dataset.json"])
        text = json.dumps(config) if path.suffix == ".json" else lines(config)
        path.write_text(text, encoding="utf-8", errors="replace")
        words = {"network_args": ["spf_target=blonde hair"], "dataset_config": str(path)}
        mistakes_only(text, check, path if path.suffix == ".toml" else None, words, tokenizer=run.folder / "none")


def test_a_folder_of_masks_that_no_system_has(run: Run) -> None:
    subset = {"image_dir": "data/10_hair", "caption_extension": ".txt", "conditioning_data_dir": "\0"}
    path = run.folder / "dataset.json"
    path.write_text(json.dumps({"datasets": [{"resolution": 512, "subsets": [subset]}]}), encoding="utf-8")
    words = {"network_args": ["spf_target=blonde hair"], "dataset_config": str(path)}
    assert check(None, words, tokenizer=run.folder / "none").failed


def test_broken_toml_and_json(run: Run) -> None:
    rng = random.Random(SEED)
    whole = (Path(__file__).parents[1] / "presets" / "dataset.toml").read_text(encoding="utf-8")
    path, other, options = run.folder / "broken.toml", run.folder / "broken.json", {"tokenizer": run.folder / "none"}
    for text in [*BROKEN, *(mutated(rng, whole) for _ in range(COUNT))]:
        path.write_text(text, encoding="utf-8", errors="replace")
        other.write_text(mutated(rng, json.dumps({"a": {"caption": "x"}})), encoding="utf-8", errors="replace")
        mistakes_only(text, check, path, {}, **options)
        mistakes_only(text, check, None, {"dataset_config": str(path)}, **options)
        mistakes_only(text, check, None, {"train_data_dir": "data", "in_json": str(other)}, **options)
        mistakes_only(text, preset.read, path, "sd1")
        mistakes_only(text, parse, {"spf_config": str(path)})


def test_settings(run: Run) -> None:
    path = run.folder / "spf.toml"
    for name in SETTINGS:
        for value in ODD:
            mistakes_only(f"{name}={value!r}", parse, {name: str(value)})
            path.write_text(lines({name: value}), encoding="utf-8", errors="replace")
            mistakes_only(f"{name}={value!r}", parse, {"spf_config": str(path)})


@pytest.mark.parametrize("value", [3, {"a": 1}, [1, 2], [[]], True, 2.5])
def test_targets_of_a_subset_that_are_no_text(run: Run, value: Any) -> None:
    """The same sentence stops the run and `spf check`; a table's names are no targets."""
    run.dataset(
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'data/10_hair'\n"
        f"caption_extension = '.txt'\n[datasets.subsets.custom_attributes]\nspf_target = {written(value)}\n"
    )
    said = [f.message for f in check(run.config, {}, tokenizer=run.folder / "none").findings if f.code == "stops"]
    info = SimpleNamespace(caption="a man, blonde hair", is_reg=False, absolute_path="")
    subset = SimpleNamespace(custom_attributes={"spf_target": value})
    data = SimpleNamespace(image_data={"a": info}, image_to_subset={"a": subset})
    names = {"self": None, "args": SimpleNamespace(network_train_text_encoder_only=False)}
    host = KohyaHost({**names, "train_dataset_group": SimpleNamespace(datasets=[data])}, [])
    assert host.problems(parse({"spf_target": "blonde hair"})) == said
    assert "must be a text in quotes, or a list of texts" in said[0]


def captions(rng: random.Random) -> Iterator[bytes]:
    parts = ["blonde hair", *"{}|(),\n\0_好é\ufeff", "{a|b}", "\\(", "[x]", ":1.2)", "\x1b[2J"]
    for _ in range(COUNT):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 30)))
        raw = text.encode()
        yield raw[: rng.randint(0, len(raw))] if rng.random() < 0.2 else raw


def test_captions_and_images(run: Run) -> None:
    rng = random.Random(SEED)
    for number, caption in enumerate(captions(rng)):
        (run.images / f"p{number % 6}.txt").write_bytes(caption)
        image = run.images / f"p{number % 6}.png"
        content = bytearray(image.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        image.write_bytes(content)
        if number % 6 == 5:
            wildcard, shuffle = rng.random() < 0.5, rng.random() < 0.5
            run.set(enable_wildcard=wildcard, shuffle_caption=shuffle, caption_separator=rng.choice([",", ";", ""]))
            run.set(caption_tag_dropout_rate=rng.choice([0.0, 0.1]), keep_tokens_separator=rng.choice(["", "|||"]))
            report = mistakes_only(repr(caption), check, run.config, {}, tokenizer=run.folder / "none")
            assert report is not None
            result = CliRunner().invoke(cli_check.app, [str(run.config), "--tokenizer", "none"])
            assert result.exit_code in (0, 1), result.output


# -- LoRA files -------------------------------------------------------------------------------------------------------

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
SHAPES: Sequence[Sequence[int]] = (
    (), (0,), (1,), (2,), (2, 320), (320, 2), (2, 320, 1, 1), (320, 2, 1, 1), (0, 320), (2, 2, 3, 3)
)  # fmt: skip
VALUES = (0.0, 1e-38, 3e38, 1e-45, 65504.0, 1.0, -1.0, float("nan"), float("inf"))
SUFFIXES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w2_a", "oft_blocks", "diff", "diff_b", "", "lora_A.weight",
    "lora_B.weight",
)  # fmt: skip
METADATA = (
    "", "{", "{}", "[]", "null", "{a}", '{"a": {"b": -1}}', "[" * 5000, "NaN", "9" * 5000, "\x1b[2J", "1e999",
    '{"spf_target": 3}', "好", '{"a": {"b": 1e400}}',
)  # fmt: skip


ALPHA_DTYPES = (None, torch.float32, torch.float8_e4m3fn)  # None: the factors'


def a_lora(rng: random.Random) -> dict[str, torch.Tensor]:
    """Two modules that fit, with a few tensors that do not."""
    out: dict[str, torch.Tensor] = {}
    for name, width in ((MODULE, 320), (TEXT, 768)):
        dtype = rng.choice([torch.float16, torch.float32, torch.bfloat16])
        out[f"{name}.lora_down.weight"] = torch.randn(2, width).to(dtype)
        out[f"{name}.lora_up.weight"] = torch.randn(width, 2).to(dtype)
        if rng.random() < 0.8:
            out[f"{name}.alpha"] = torch.tensor(rng.choice(VALUES[:6])).to(rng.choice(ALPHA_DTYPES) or dtype)
    for _ in range(rng.randint(0, 3)):
        name = rng.choice([MODULE, TEXT, MODULE.replace("attn1", "attn2"), "emb_params", "unet.a", "x", ""])
        key = f"{name}.{rng.choice(SUFFIXES)}"
        kind = rng.choice([torch.float16, torch.float32, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn])
        out[key] = torch.full(tuple(rng.choice(SHAPES)), rng.choice(VALUES[4:7])).to(kind)
        if rng.random() < 0.3 and out[key].dtype == torch.float32:
            out[key].fill_(rng.choice(VALUES))
    if rng.random() < 0.3:
        out.pop(rng.choice(list(out)))
    return out


KEYS = (
    "ss_network_args", "ss_tag_frequency", "ss_output_name", "ss_base_model_version", "ss_v2", "lora_adapter_metadata",
    "modelspec.trigger_phrase", "modelspec.architecture", "ss_steps", "format",
)  # fmt: skip


def everything_about(path: Path) -> None:
    """All that `spf lora` asks of a file."""
    contents = inspect.from_file(path)
    description = inspect.describe(contents)
    verdicts(contents, description)
    inspect.settings(contents.metadata)
    target_phrases(contents.metadata)
    training_card(contents)
    tensors, metadata = reader.load(path)
    fixed, _, _ = normalise(tensors, metadata, dtype=torch.float16)
    for peft in (True, False):
        try:
            to_diffusers(fixed, peft=peft)
        except SPFError:
            continue


def test_lora_files(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    path = tmp_path / "lora.safetensors"
    for _ in range(COUNT // 2):
        tensors = a_lora(rng)
        metadata = {key: rng.choice(METADATA) for key in rng.sample(KEYS, 3)}
        save_file(tensors, path, metadata)
        said = f"{ {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} } {metadata}"
        mistakes_only(said, everything_about, path)
        mistakes_only(said, normalise, tensors, metadata, one_rank=True)


def test_damaged_lora_files(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    path = tmp_path / "lora.safetensors"
    save_file(a_lora(random.Random(1)), path, {"ss_network_args": '{"spf_target": "hat"}'})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(COUNT):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(end)] = rng.choice(b'{}[]",:0129ax\x00\xff ')
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        mistakes_only(repr(bytes(damaged[:end])), everything_about, path)


# -- what is no file, or far too long ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="no devices and pipes in a folder there")
def test_devices_and_pipes_are_refused(run: Run) -> None:
    os.mkfifo(run.folder / "pipe.toml")
    for name in ("/dev/zero", str(run.folder / "pipe.toml")):
        for words in ({"in_json": name}, {"dataset_config": name}, {"network_args": [f"spf_config={name}"]}):
            report = mistakes_only(str(words), check, run.config, words, tokenizer=run.folder / "none")
            assert report is None or any(name in f.message for f in report.findings if f.level == "error"), words
        with pytest.raises(SPFError):
            check(Path(name), {})
    (run.images / "p0.txt").unlink()
    (run.images / "p0.txt").symlink_to("/dev/zero")
    (run.images / "p1.png").unlink()
    (run.images / "p1.png").symlink_to(run.folder / "pipe.toml")
    codes = {f.code for f in check(run.config, {}, tokenizer=run.folder / "none").findings}
    assert {"class-caption", "unreadable"} <= codes


def test_what_is_too_long_is_not_read(run: Run) -> None:
    for path, words in ((run.folder / "m.json", {"in_json": "m.json"}), (run.images / "p0.txt", {})):
        with open(path, "wb") as file:
            file.truncate(300 * 2**20)
        report = check(run.config, words, tokenizer=run.folder / "none")
        assert any(f.code in ("metadata", "not-utf8") for f in report.findings)
    with open(run.config, "ab") as file:
        file.truncate(2 * 2**20)
    with pytest.raises(SPFError, match="longer than 1 MiB"):
        check(run.config, {})
