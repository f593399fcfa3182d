"""GUIs: our ready files, taken through what each GUI does to them, bring the very same settings to the plugin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml

from spf_plugin.config import SPFConfig, parse
from spf_plugin.network_args import check_words, split_network_args
from spf_plugin.tools.check.host_options import OPTIONS
from tests import guis

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "presets" / "guis").iterdir())
RULES: dict[str, Callable[[dict[str, Any]], guis.Arrived]] = {
    "kohya_ss": guis.kohya_ss,
    "lora-easy": guis.lora_easy,
    "lora-scripts": guis.lora_scripts,
}
#: How each GUI is told these words, and what it makes of them.
WAYS: dict[str, Callable[[list[str]], guis.Arrived]] = {
    "kohya_ss": lambda words: guis.kohya_ss(guis.kohya_ss_preset(words)),
    "lora-easy": lambda words: guis.lora_easy(guis.lora_easy_preset(words)),
    "lora-scripts": lambda words: guis.lora_scripts(guis.lora_scripts_preset(words)),
    "colab": lambda words: guis.colab(guis.colab_lines(words)),
}


def received(arrived: guis.Arrived, folder: Path = ROOT) -> SPFConfig:
    """What the plugin gets: the host of v0.9.1 cuts at every "=", newer ones at the first."""
    module, words = arrived
    assert module == "spf_plugin.lora"
    assert check_words(words) == []
    for count in (-1, 1):
        assert all(len(word.split("=", count)) == 2 for word in words), words
    ours, _ = split_network_args(dict(word.split("=", 1) for word in words))
    return parse(ours, [folder])


def same(a: SPFConfig, b: SPFConfig) -> bool:
    """Equal settings; a target with `_` finds what the one with a space finds."""
    patterns = [[(t.pattern.pattern, t.replacement) for t in config.target] for config in (a, b)]
    return patterns[0] == patterns[1] and dataclasses.replace(a, target=b.target) == b


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_ready_file(path: Path) -> None:
    preset = guis.load(path)
    gui = next(name for name in RULES if path.name.startswith(name))
    assert same(received(RULES[gui](preset)), parse({"spf_target": "blonde hair"}))
    ours = toml.load(ROOT / "presets" / ("sdxl-12gb.toml" if "sdxl" in path.stem else "sd15-8gb.toml"))
    values: dict[str, Any] = dict(preset)
    for section in preset.values():
        if isinstance(section, dict):
            values |= section if "ui_custom_params" in section else section.get("args", {})
            values |= {f"train_{key}" if key == "batch_size" else key: value
                       for key, value in section.get("dataset_args", {}).items() if key != "resolution"}  # fmt: skip
    for name in set(values) & set(ours) - {"network_args", "network_module"}:
        number = isinstance(ours[name], (int, float))
        assert float(values[name]) == ours[name] if number else values[name] == ours[name], name
    assert {"network_dim", "network_alpha", "learning_rate", "min_snr_gamma", "train_batch_size"} <= set(values)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_panels_that_were_never_opened_and_windows_that_were_reset(model: str) -> None:
    side = 1024 if model == "sdxl" else 512
    arrived = guis.kohya_ss(guis.load(ROOT / "presets" / "guis" / f"kohya_ss-{model}.json"), opened=False)
    assert received(arrived).target
    window = guis.lora_easy_window(guis.load(ROOT / "presets" / "guis" / f"lora-easy-{model}.toml"))
    assert window["sdxl"] == (model == "sdxl")
    assert window["resolution"] == side
    assert window["train_on"] == "Unet Only"
    assert window["max_train"] == ("epochs", 10)
    assert all(window[name] for name in ("buckets", "gradient_checkpointing", "sdpa"))
    assert window["no_half_vae"] == (model == "sdxl")
    data = guis.load(ROOT / "presets" / "guis" / f"lora-scripts-{model}.toml")["data"]
    assert (data["resolution"], data["gradient_checkpointing"]) == (f"{side},{side}", True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_saves_memory_on_the_command_line_saves_it_in_every_gui(path: Path) -> None:
    ours = toml.load(ROOT / "presets" / ("sdxl-12gb.toml" if "sdxl" in path.stem else "sd15-8gb.toml"))
    gui = next(name for name in RULES if path.name.startswith(name))
    sent = guis.memory_savers(gui, guis.load(path))
    assert sent == {name: ours.get(name, False) for name in guis.MEMORY_SAVERS}


def test_lora_easy_forgets_cached_text_that_stands_with_the_network() -> None:
    preset = {"network_args": {"args": {"cache_text_encoder_outputs": True}}}
    assert not guis.memory_savers("lora-easy", preset)["cache_text_encoder_outputs"]


def test_lora_scripts_loads_no_learning_rate_that_is_a_text() -> None:
    preset = guis.load(ROOT / "presets" / "guis" / "lora-scripts-sd15.toml")
    preset["data"]["unet_lr"] = "2e-4"
    with pytest.raises(TypeError, match="toExponential"):
        guis.lora_scripts(preset)


@pytest.mark.parametrize("gui", RULES)
def test_each_page_says_what_was_clicked_and_what_not(gui: str) -> None:
    text = (ROOT / "docs" / "guis" / f"{gui}.md").read_text(encoding="utf-8")
    (line,) = [part for part in text.split("\n\n") if part.startswith("Checked by clicking: ")]
    assert re.search(r"20\d\d-\d\d-\d\d: ", line)
    assert "Not clicked: " in line


def test_there_is_a_file_and_a_page_for_each() -> None:
    for gui in RULES:
        assert {p.stem for p in FILES if p.name.startswith(gui)} == {f"{gui}-sd15", f"{gui}-sdxl"}
    pages = {p.stem for p in (ROOT / "docs" / "guis").glob("*.md")}
    assert pages == {"README", "colab", *RULES}


def test_kohya_ss_names() -> None:
    """Keys of kohya_ss that are the host's own are spelled as the host spells them; the others are the GUI's."""
    own = {"LoRA_type", "sdxl", "additional_parameters", "max_resolution", "lr_warmup", "optimizer", "sdxl_no_half_vae"}
    own |= {"sdxl_cache_text_encoder_outputs"}
    for path in FILES:
        if path.suffix == ".json":
            assert set(guis.load(path)) - own <= OPTIONS


PLAIN = {
    "spf_target": "blonde_hair",
    "spf_map": "paper",
    "spf_map_gain": "2.5",
    "spf_stage2_start": "0.4",
    "spf_log_every": "2",
    "spf_preview_every": "10",
    "spf_layers": "all",
    "spf_network": "lycoris.kohya",
    "spf_output_multiplier": "1e-2",
}


@pytest.mark.parametrize("gui", WAYS)
def test_every_kind_of_setting_arrives(gui: str) -> None:
    words = [f"{key}={value}" for key, value in PLAIN.items()] + ["conv_dim=8"]
    assert received(WAYS[gui](words)) == parse(PLAIN)


@pytest.mark.parametrize("gui", ["lora-easy", "lora-scripts", "colab"])
@pytest.mark.parametrize("target", ["blonde hair", "hat|dress->red T-shirt", "金髪", "été's", "(a:1.2)"])
def test_spaces_and_signs(gui: str, target: str) -> None:
    assert received(WAYS[gui]([f"spf_target={target}", "spf_layers=up.*attn2"])) == parse(
        {"spf_target": target, "spf_layers": "up.*attn2"}
    )


@pytest.mark.parametrize("gui", WAYS)
def test_a_settings_file_passes_every_gui(gui: str, tmp_path: Path) -> None:
    """Also where words cannot: signs, several targets, regular expressions."""
    text = 'spf_target = ["blonde hair", "dress->red T-shirt", "金髪"]\nspf_layers = "up.*attn2"\nspf_map = "paper"\n'
    (tmp_path / "hair.toml").write_text(text, encoding="utf-8")
    config = received(WAYS[gui](["spf_config=hair.toml"]), tmp_path)
    assert config == parse(toml.loads(text))


def test_kohya_ss_cuts_at_spaces_and_the_plugin_says_so() -> None:
    _, words = WAYS["kohya_ss"](['"spf_target=blonde hair"'])
    assert words == ["spf_target=blonde", "hair"]
    (problem,) = check_words(words)
    assert "stray word 'hair'" in problem
    assert "use _ for the space" in problem


def test_kohya_ss_quotes_signs_and_the_targets_arrive_all_the_same() -> None:
    _, words = WAYS["kohya_ss"](["spf_target=hat|scarf"])
    assert words == ["'spf_target=hat|scarf'"]
    ours, others = split_network_args(dict(word.split("=", 1) for word in words))
    assert [target.phrase for target in parse(ours).target] == ["hat", "scarf"]
    assert others == {}


def test_lora_easy_breaks_at_what_the_page_warns_of() -> None:
    with pytest.raises(toml.TomlDecodeError):
        guis.lora_easy({"extra_args": {"args": {"network_module": "spf_plugin.lora", "output_dir": "C:\\photos\\x"}}})


def code(page: str) -> list[str]:
    """The indented blocks of a page."""
    text = (ROOT / "docs" / "guis" / page).read_text(encoding="utf-8")
    return re.findall(r"(?:^ {4,}.*\n)+", text, re.MULTILINE)


def test_the_lines_of_the_pages() -> None:
    expected = parse({"spf_target": "blonde hair"})
    (lines,) = [block for block in code("colab.md") if "network_args" in block]
    assert same(received(guis.colab("\n".join(line.strip() for line in lines.splitlines()))), expected)
    (lines,) = [block for block in code("lora-scripts.md") if "network_args" in block]
    assert same(received(guis.lora_scripts({"data": {"ui_custom_params": lines.replace("       ", "")}})), expected)
    (line,) = [block.strip() for block in code("kohya_ss.md") if "spf_target" in block]
    assert line == guis.load(ROOT / "presets" / "guis" / "kohya_ss-sd15.json")["additional_parameters"]
    text = (ROOT / "docs" / "guis" / "kohya_ss.md").read_text(encoding="utf-8")
    for words in re.findall(r"`--network_args ([^`]*)`", text):
        assert received(WAYS["kohya_ss"](words.split())).target


def test_links_of_the_pages() -> None:
    for page in (ROOT / "docs" / "guis").glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
