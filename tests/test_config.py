"""Settings: defaults, sources, and messages that name every mistake at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from spf_plugin.config import REMOVED, SPFConfig, parse, settings_table
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.network_args import check_words, read_words, split_network_args


def test_defaults_are_valid_and_need_only_a_target() -> None:
    config = parse({"spf_target": "blonde hair"})
    assert config == dataclasses.replace(SPFConfig(), target=(Target("blonde hair"),))
    assert config.active


def test_metadata_reproduces_the_run() -> None:
    config = parse({"spf_target": "dress->T-shirt|hat", "spf_map": "paper", "spf_stage2_start": "100"})
    assert parse(config.to_metadata()) == config


def test_only_ours_are_taken() -> None:
    ours, theirs = split_network_args({"spf_target": "hat", "conv_dim": "4", "algo": "lokr", "dropout": None})
    assert ours == {"spf_target": "hat"}
    assert theirs == {"conv_dim": "4", "algo": "lokr", "dropout": None}


def test_every_mistake_in_one_message() -> None:
    with pytest.raises(SPFError) as caught:
        parse(
            {
                "spf_taget": "x",
                "spf_map": "soffft",
                "spf_log_every": "1.5",
                "spf_map_gain": "200",
                "spf_every": "2",
                "spf_layers": "(",
                "spf_response": "ankor",
                "spf_output_multiplier": "much",
                "spf_target": "hat->",
            }
        )
    message = str(caught.value)
    assert len(caught.value.problems) == 9
    assert "did you mean spf_target?" in message
    assert "did you mean soft" in message
    assert "spf_log_every='1.5': must be a whole number" in message
    assert "spf_map_gain='200': must be from 0.1 to 100" in message
    assert "spf_every is no longer a setting: alignment now takes every step" in message
    assert "regular expression" in message
    assert "spf_output_multiplier='much': must be a number" in message
    assert "nothing after '->'" in message


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hat, coat", "name the parts: hat|coat"),
        ("帽子，眼镜", "name the parts: 帽子|眼镜"),
        ("red hat->Red_Hat", "replaces 'red hat' by itself"),
        ("coat|hat->hat", "replaces 'hat' by itself"),
    ],
)
def test_targets_of_which_nothing_could_be_learned(target: str, said: str) -> None:
    """The one stands in no caption's part, the other leaves the base prompt as it is: the run would be wrong."""
    with pytest.raises(SPFError, match=r"has a comma|by itself") as caught:
        parse({"spf_target": target})
    assert said in str(caught.value)


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_word_that_is_quoted_as_a_whole(quote: str) -> None:
    """kohya_ss does that to words with special characters, and sd-scripts splits at the first equals sign."""
    ours, theirs = split_network_args({f"{quote}spf_layers": f".*up.*{quote}", f"{quote}block": f"4{quote}"})
    assert ours == {"spf_layers": ".*up.*"}
    assert theirs == {f"{quote}block": f"4{quote}"}


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-inf"])
def test_numbers_must_be_finite_and_in_range(value: str) -> None:
    with pytest.raises(SPFError):
        parse({"spf_output_multiplier": value})


@pytest.mark.parametrize("value", ["'blonde hair'", '"blonde hair"', "blonde_hair"])
def test_what_guis_do_to_values(value: str) -> None:
    (target,) = parse({"spf_target": value}).target
    assert target.pattern.search("a woman, blonde hair")


def test_config_file(tmp_path: Path) -> None:
    (tmp_path / "spf.toml").write_text(
        'spf_target = ["hat", "scarf"]\nspf_map_gain = 2.5\nspf_log_every = 2\n', encoding="utf-8"
    )
    config = parse({"spf_config": "spf.toml", "spf_log_every": "4"}, [Path("elsewhere"), tmp_path])
    assert [str(t) for t in config.target] == ["hat", "scarf"]
    assert config.map_gain == 2.5
    assert config.log_every == 4  # the command line wins
    with pytest.raises(SPFError, match="no such file"):
        parse({"spf_config": "other.toml"}, [tmp_path])
    (tmp_path / "bad.toml").write_text("spf_target = ", encoding="utf-8")
    with pytest.raises(SPFError, match="not valid TOML"):
        parse({"spf_config": "bad.toml"}, [tmp_path])
    (tmp_path / "typo.toml").write_text("spf_targt = 'hat'", encoding="utf-8")
    with pytest.raises(SPFError, match="did you mean spf_target"):
        parse({"spf_config": "typo.toml"}, [tmp_path])


def test_stray_words() -> None:
    assert check_words(["spf_target=blonde hair", "conv_dim=4"]) == []
    (problem,) = check_words(["spf_target=blonde", "hair"])
    assert "stray word 'hair'" in problem
    assert "follows 'spf_target=blonde'" in problem
    assert check_words("spf_target=a") == [
        'network_args is a text, and must be a list: network_args = ["spf_target=a"]'
    ]
    (problem,) = check_words(["spf_target=a=b"])
    assert "more than one '='" in problem


@pytest.mark.parametrize(
    "word", ["SPF_map=paper", "spf-map=paper", " spf_map=paper", "Spf_Map =paper", "spf map=paper"]
)
def test_what_looks_like_a_setting_is_one_or_a_mistake(word: str) -> None:
    """networks.lora takes any argument and uses none that it does not know."""
    (problem,) = check_words(["spf_target=hat", word])
    assert "the name is written 'spf_map'" in problem


def test_a_setting_that_is_given_twice() -> None:
    (problem,) = check_words(["spf_map=paper", "conv_dim=4", "conv_dim=8", "spf_map=soft"])
    assert problem == "--network_args has spf_map twice: 'spf_map=paper' and 'spf_map=soft'. Leave one of them out."
    assert check_words(["'spf_layers=.*up.*'", "spf_map=soft"]) == []


def test_stage2() -> None:
    assert parse({"spf_stage2_start": "0.25"}).stage2_step(1000) == 250
    assert parse({"spf_stage2_start": "0.25"}).stage2_step(3) == 1
    assert parse({"spf_stage2_start": "40"}).stage2_step(1000) == 40
    assert parse({"spf_stage2_start": "0"}).stage2_step(1000) == 0


def test_a_reader_sees_every_setting_with_its_whole_help() -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(settings_table())
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    shown = ["".join(part.content for part in cell) for cell in cells]
    settings = dict(zip(shown[::3], shown[2::3], strict=True))
    for field in dataclasses.fields(SPFConfig):
        assert settings[f"spf_{field.name}"] == field.metadata["help"].replace("`", "")
        assert len(field.metadata["help"]) > 20


def test_the_page_has_the_table_of_this_version() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert settings_table() in page, "run: python -c 'from spf_plugin.config import *; print(settings_table())'"


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_says_what_replaced_it(name: str) -> None:
    """In one line, from the command line and from a file; and it is no setting any more."""
    assert name not in {f.name for f in dataclasses.fields(SPFConfig)}
    with pytest.raises(SPFError) as caught:
        parse({"spf_target": "hat", f"spf_{name}": "1"})
    (problem,) = caught.value.problems
    assert problem.startswith(f"spf_{name} is no longer a setting: ")
    assert "Remove it" in problem


def test_whatever_weight_is_left_spf_acts_and_without_any_it_does_not() -> None:
    weights = [f"spf_{f.name}" for f in dataclasses.fields(SPFConfig) if f.name.endswith("_multiplier")]
    assert not parse(dict.fromkeys(weights, "0")).active
    for weight in weights:
        assert parse({**dict.fromkeys(weights, "0"), weight: "1"}).active
    assert parse({**dict.fromkeys(weights, "0"), "spf_response": "anchor"}).active


@pytest.mark.parametrize("name", ["n" * 5000, "\0", "a\0b", "~nobody/x", "/dev/null", ""])
def test_a_config_that_no_file_can_be_called(name: str) -> None:
    with pytest.raises(SPFError, match="no such file") as caught:
        parse({"spf_target": "hat", "spf_config": name})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("spf_target = 3", "must be a text in quotes, or a list of texts"),
        ("spf_target = { a = 1 }", "must be a text in quotes, or a list of texts"),
        ("spf_target = [1]", "must be a text in quotes, or a list of texts"),
        ("spf_network = 3", "must be a text in quotes"),
        ("spf_layers = ['a']", "must be a text in quotes"),
        ("spf_map_gain = true", "must be a number"),
        ("spf_map_gain = [1]", "must be a number"),
        ("spf_log_every = inf", "must be a finite number"),
        ("spf_layers = 'a{99999999999999999999}'", "is not valid"),
        (f"spf_log_every = {10**400}", "more than 64 bits"),
    ],
)
def test_values_of_the_wrong_kind_in_a_file(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "spf.toml").write_text(line, encoding="utf-8")
    with pytest.raises(SPFError) as caught:
        parse({"spf_config": "spf.toml"}, (tmp_path,))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["spf_targte=hat"],
        ["SPF_target=hat"],
        ["spf_config=nowhere.toml"],
        ["spf_target=blonde", "hair"],
        ["spf_target="],
    ],
)
def test_what_is_wrong_is_not_taken_for_missing(words: list[str]) -> None:
    """Of a target that is misspelled, cut off or in a file that is not there, the rules say nothing more."""
    found = read_words([*words, "spf_map=sofft"], [Path()])
    assert len(found.problems) == 2
    assert {"target", "map"} <= found.wrong
    assert read_words(["spf_foo=1", "spf_map=soft"], [Path()]).wrong == frozenset()
