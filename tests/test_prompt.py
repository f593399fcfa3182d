"""Captions split into base and target, and token spans, with CLIP's real tokenizer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
from transformers import CLIPTokenizer

from spf_plugin.core.clause import Clause
from spf_plugin.core.prompt import Kind, Piece, Prompt, Spans, Target, parse_targets, split, strip_weights
from spf_plugin.core.prompt import spans as plain_spans
from spf_plugin.families.clip_tokens import spans
from spf_plugin.tools.check.reading import is_broken
from tests import captions_table, tiny
from tests.base_prompts import BASE_PROMPTS, BROKEN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny.tokenizer_folder(tmp_path_factory.mktemp("clip")))


SPLITS = [
    # caption, targets, base prompt, base phrases
    ("a woman in a coat, park, blonde hair", "blonde hair", "a woman in a coat, park", ["a woman in a coat", "park"]),
    ("blonde hair, a woman, park", "blonde hair", "a woman, park", ["a woman", "park"]),
    ("a woman, blonde hair, park", "blonde hair", "a woman, park", ["a woman", "park"]),
    ("a woman, Blonde_Hair, park", "blonde hair", "a woman, park", ["a woman", "park"]),
    ("a woman, blonde hair, park", "blonde_hair", "a woman, park", ["a woman", "park"]),
    ("a woman with blonde hair", "blonde hair", "a woman", ["a woman"]),
    ("a woman with blonde hair in a red coat", "blonde hair", "a woman in a red coat", ["a woman in a red coat"]),
    ("a woman with blonde hair and a hat", "blonde hair", "a woman with a hat", ["a woman with a hat"]),
    ("a woman with a hat and blonde hair", "hat|blonde hair", "a woman", ["a woman"]),
    ("a blonde hair woman", "blonde hair", "a woman", ["a woman"]),
    ("a woman in a dress, street", "dress->T-shirt", "a woman in a T-shirt, street", ["a woman in a", "street"]),
    ("(blonde hair:1.3), woman", "blonde hair", "woman", ["woman"]),
    ("a (woman with blonde hair:1.2), x", "blonde hair", "a (woman:1.2), x", ["a (woman:1.2)", "x"]),
    ("blonde hair", "blonde hair", "", []),
    ("", "blonde hair", "", []),
    ("chat, that hats, thatch", "hat", "chat, that hats, thatch", ["chat", "that hats", "thatch"]),
    ("金髪の女性, 公園", "金髪", "女性, 公園", ["女性", "公園"]),
    ("femme aux cheveux blonds, été", "cheveux blonds", "femme, été", ["femme", "été"]),
    ("hat, woman, hat", "hat", "woman", ["woman"]),
]


@pytest.mark.parametrize(("caption", "targets", "base", "phrases"), SPLITS)
def test_split(caption: str, targets: str, base: str, phrases: list[str]) -> None:
    prompt = split(caption, parse_targets(targets))
    assert prompt.full == caption
    assert prompt.base == base
    assert prompt.phrases == phrases
    assert prompt.has_target == (base != caption)


@pytest.mark.parametrize(("caption", "targets", "base"), [*BASE_PROMPTS, *captions_table.ROWS])
def test_captions_as_people_write_them(caption: str, targets: str, base: str) -> None:
    prompt = split(caption, parse_targets(targets))
    assert prompt.base == base
    assert prompt.full == caption
    assert prompt.has_target == (base != caption)


def test_no_phrase_is_empty() -> None:
    """Two spaces before the first connective of a long part."""
    caption = "There is snow,  on the ground and on the roofs of all the houses"
    for targets in ("snow->sand", "roofs"):
        prompt = split(caption, parse_targets(targets))
        assert all(prompt.phrases), prompt.phrases
        assert prompt.full == caption


def test_the_table_is_long_and_of_many_kinds() -> None:
    assert len(BASE_PROMPTS) >= 120
    assert len({caption for caption, *_ in BASE_PROMPTS}) >= 110


@pytest.mark.parametrize("base", BROKEN)
def test_a_base_prompt_that_reads_broken(base: str) -> None:
    """The same words are no fault of ours where nothing was taken out."""
    before, after = (Piece(text, Kind.BASE, 0) for text in base.split("~"))
    assert is_broken(Prompt((before, Piece("x", Kind.TARGET), after)))
    assert not is_broken(Prompt((before, after, Piece(", x", Kind.TARGET))))


def test_the_tables_own_base_prompts_read_well() -> None:
    """Each is what the code makes, which another test says."""
    rows = [split(caption, parse_targets(targets)) for caption, targets, _ in [*BASE_PROMPTS, *captions_table.ROWS]]
    assert {prompt.base for prompt in rows if is_broken(prompt)} == {"a woman's, snow", "a tall, woman"}


@pytest.mark.parametrize(("caption", "targets"), captions_table.BROKEN)
def test_what_no_rule_gets_right_is_said(caption: str, targets: str) -> None:
    assert is_broken(split(caption, parse_targets(targets)))


LONG = {
    "spaces": "a woman with a" + " " * 8000 + "blonde hair",
    "targets": "blonde hair " * 700,
    "tags": ", ".join(["blonde hair"] * 700),
    "no spaces": "blonde_hair," * 650,
    "no target": "a woman with a " * 550,
    "sentences": "a woman with blonde hair of that. " * 240,
    "brackets": "(" * 4000 + "blonde hair" + ")" * 4000,
    "more brackets": "(blonde hair ( " * 550,
    "adjectives": "red " * 1900 + "blonde hair",
    "who": "who is " * 1150 + "blonde hair",
    "adjectives and commas": "a long, " * 1000 + "blonde hair",
    "adjectives, commas and targets": "with a long, thick, blonde hair, " * 250,
    "lists": "wearing blonde hair, a coat, " * 280,
    "underscores": "blonde" + "_" * 8000 + "hair",
    "Chinese": "戴着金发的女人" * 1150,
}


@pytest.mark.parametrize("limit", [75, 225])
@pytest.mark.parametrize("caption", LONG.values(), ids=LONG)
def test_long_captions_are_read_a_few_times_and_not_each_prefix(caption: str, limit: int) -> None:
    read = 0

    def tokenize(text: str) -> list[str]:
        nonlocal read
        read += len(text)
        return re.findall(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]|[^\w\s]|_", text)

    prompt = split(caption, parse_targets("blonde hair|金发"))
    assert prompt.full == caption
    for full in (True, False):
        spans(prompt, tokenize, limit + 2, full=full)
    # Words without spaces between them are read again for every piece, as far as the limit.
    assert read <= 6 * len(caption) + (0 if " " in caption else limit * 40 * limit / 4)


@pytest.mark.parametrize(
    "caption",
    [
        "blonde hair " * 700,
        "a woman with blonde hair of that. " * 240,
        "blonde " * 1200,
        LONG["adjectives and commas"],
        LONG["adjectives, commas and targets"],
        "wearing a blonde hair, a coat, " * 260,
    ],
)
def test_a_target_is_looked_for_once(caption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at beside each of many targets is no more of the caption when there are more of them."""
    looked = 0
    word = Clause.word

    def counted(self: Clause, i: int) -> str:
        nonlocal looked
        looked += 1
        return word(self, i)

    monkeypatch.setattr(Clause, "word", counted)
    split(caption, parse_targets("blonde hair"))
    assert looked < 30 * len(caption)


def by_prefixes(prompt: Prompt, tokenize: Callable[[str], Sequence[int]], limit: int, *, full: bool) -> list[list[int]]:
    """The positions of every base phrase, and of the target, by tokenizing every prefix of the prompt."""
    count = 1 + max((piece.phrase for piece in prompt.pieces), default=-1)
    found: list[list[int]] = [[] for _ in range(count + 1)]
    text, begin = "", 0
    for piece in prompt.pieces:
        if piece.in_full if full else piece.in_base:
            text += piece.text
            end = min(len(tokenize(text)), limit)
            if piece.kind is Kind.TARGET or piece.phrase >= 0:
                found[piece.phrase].extend(range(begin, end))
            begin = max(begin, end)
    return [*found, [begin]]


def test_spans_are_those_of_every_prefix(tokenizer: CLIPTokenizer) -> None:
    def tokenize(text: str) -> list[int]:
        return tokenizer(strip_weights(text), add_special_tokens=False, verbose=False).input_ids

    generator = random.Random(3)
    bits = [
        "a",
        "woman",
        "with",
        "blonde hair",
        "hat",
        ",",
        ", ",
        "(",
        ":1.2)",
        "帽子",
        "赤い",
        "の",
        "e\u0301",
        " ",
        "\u3000",
    ]
    mixed = ["".join(generator.choice(bits) + generator.choice(["", " "]) for _ in range(25)) for _ in range(60)]
    captions = [(caption, targets) for caption, targets, _ in captions_table.ROWS[::3]]
    for caption, targets in [*captions, *((caption, "blonde hair|hat->cap|帽子") for caption in mixed)]:
        prompt = split(caption, parse_targets(targets))
        assert prompt.full == caption
        assert prompt.has_target or prompt.base == caption
        for limit in (6, 75):
            for full in (True, False):
                found = plain_spans(prompt, tokenize, limit, full=full)
                expected = by_prefixes(prompt, tokenize, limit, full=full)
                assert [*map(list, found.phrases), list(found.target), [found.end]] == expected, caption


def test_long_sentence_becomes_several_phrases() -> None:
    prompt = split(
        "a woman standing in front of a curtain wearing a brown jacket with blonde hair", parse_targets("blonde hair")
    )
    assert prompt.phrases == ["a woman", "standing", "in front of a curtain", "wearing a brown jacket"]


@pytest.mark.parametrize("value", ["", "|", "a|", "->b", "a->", "__"])
def test_unfinished_targets(value: str) -> None:
    with pytest.raises(ValueError, match=r"spf_target|->"):
        parse_targets(value)


def words(tokenizer: CLIPTokenizer, prompt: Prompt, found: Spans, *, full: bool) -> tuple[list[str], str]:
    """The words at the positions of every phrase, and of the target, in the real token sequence."""
    text = strip_weights(prompt.full if full else prompt.base)
    ids = tokenizer(text).input_ids  # BOS first, as the UNet sees it

    def say(positions: tuple[int, ...]) -> str:
        return tokenizer.decode([ids[p] for p in positions]).strip()

    assert found.end == len(ids) - 1
    return [say(p) for p in found.phrases], say(found.target)


@pytest.mark.parametrize(
    ("caption", "target"),
    [
        ("a woman in a coat, park, blonde hair", "blonde hair"),
        ("blonde hair, a woman in a coat, park", "blonde hair"),
        ("a woman in a coat, blonde hair, park", "blonde hair"),
        ("a woman in a (coat:1.2), (blonde hair:1.3), park", "blonde hair"),
        ("a woman in a coat, unbelievably blonde-ish hair, park", "unbelievably blonde-ish hair"),
    ],
)
def test_spans_name_the_same_words_in_both_prompts(tokenizer: CLIPTokenizer, caption: str, target: str) -> None:
    prompt = split(caption, parse_targets(target))

    def tokenize(text: str) -> list[int]:
        return tokenizer(strip_weights(text), add_special_tokens=False).input_ids

    in_full, said = words(tokenizer, prompt, spans(prompt, tokenize, 77, full=True), full=True)
    in_base, nothing = words(tokenizer, prompt, spans(prompt, tokenize, 77, full=False), full=False)
    assert in_full == in_base == ["a woman in a coat", "park"]
    assert said.replace(" ", "") == target.replace(" ", "")
    assert nothing == ""


def test_spans_of_scripts_without_spaces(tokenizer: CLIPTokenizer) -> None:
    prompt = split("金髪の女性, 公園", parse_targets("金髪"))

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    found = spans(prompt, tokenize, 77, full=True)
    everything = [*found.target, *(p for phrase in found.phrases for p in phrase)]
    assert found.target
    assert all(found.phrases)
    assert len(everything) == len(set(everything))  # no token in two groups
    assert max(everything) < found.end


@pytest.mark.parametrize("length", [77, 152, 227, 154, 231], ids=lambda n: f"T={n}")
def test_spans_over_chunks(tokenizer: CLIPTokenizer, length: int) -> None:
    """Both layouts of several chunks: joined to BOS + 75 n + EOS, and 77 each with their own BOS and EOS."""
    caption = ", ".join([f"word{i}" for i in range(40)] + ["blonde hair"] + [f"last{i}" for i in range(40)])
    prompt = split(caption, parse_targets("blonde hair"))

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    text = tokenize(prompt.full)
    sequence = [-1] * length  # built chunk by chunk, as the hosts do
    if length % 77 == 0:
        for chunk in range(length // 77):
            part = text[75 * chunk : 75 * chunk + 75]
            sequence[77 * chunk + 1 : 77 * chunk + 1 + len(part)] = part
    else:
        part = text[: length - 2]
        sequence[1 : 1 + len(part)] = part
    found = spans(prompt, tokenize, length, full=True)
    placed = [p for positions in found.phrases for p in positions] + list(found.target)
    assert len(placed) == len(set(placed))
    for phrase, positions in zip(prompt.phrases, found.phrases, strict=True):
        expected = tokenize(phrase)
        assert [sequence[p] for p in positions] == expected[: len(positions)]
    assert found.end > max(placed)
    cut = len(text) > sum(token >= 0 for token in sequence)
    assert cut or all(len(tokenize(ph)) == len(ps) for ph, ps in zip(prompt.phrases, found.phrases, strict=True))


@pytest.mark.parametrize(
    ("phrase", "caption", "found"),
    [
        ("кот", "картина, которая висит", False),
        ("кот", "чёрный кот, окно", True),
        ("col", "un homme en colère", False),
        ("café", "deux cafés", False),
        ("café", "un café, une femme", True),
        ("größe", "übergröße", False),
        ("hair", "1girl, hair_bow", False),
        ("hair bow", "1girl, hair_bow, red_hair", True),
        ("hair", "1girl, blonde_hair", False),
        ("shirt", "a man in a t-shirt", False),
        ("t-shirt", "a man in a t-shirt", True),
        ("hat", "a hat-wearing man", False),
        ("hat", "a man - hat - outdoors", True),
        ("hat", "a man (hat)", True),
        ("帽子", "一个戴着红色帽子的男人", True),
        ("hat", "戴着hat的男人", True),
        ("眼鏡", "眼鏡をかけた女性", True),
        ("모자", "빨간 모자를 쓴 남자", True),
        ("หมวก", "ผู้ชายสวมหมวกสีแดง", True),
        ("hat2", "hat23", False),
    ],
)
def test_whole_words_in_every_script(phrase: str, caption: str, found: bool) -> None:
    """An underscore or a hyphen joins words; scripts without spaces have no edges to look for."""
    assert bool(Target(phrase).pattern.search(caption)) is found
