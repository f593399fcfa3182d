"""What musubi-tuner's prompts' files hold, without a checkout: played back, they answer as the encoder did."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.families.krea2 import Krea2
from spf_plugin.families.zimage import ZImage
from spf_plugin.hosts.musubi import caching, loop, prompts, replay
from spf_plugin.hosts.musubi.architectures import ARCHITECTURES, named, of_trainer
from spf_plugin.hosts.musubi.encoders import Encoder
from spf_plugin.hosts.musubi.items import ITEMS, NamedBatches
from spf_plugin.hosts.musubi.replay import Fault, Replay
from spf_plugin.text import TextSide

TARGETS = (Target("blonde hair"),)
CAPTIONS = (
    "a woman with blonde hair, brown jacket",
    "blonde hair, smiling, a man in a red hat, night",
    "an old sailor, blue shirt",
    "blonde hair",
    "",
)
BEGIN, END = "<user>", " <end> <assistant>"
WIDTH = 8


def tokenize(text: str) -> list[int]:
    """Words, and `,` apart; one id for each."""
    return [sum(word.encode()) for word in text.replace(",", " ,").replace(BEGIN, f" {BEGIN} ").split()]


def encode(prompt: str) -> dict[str, Tensor]:
    ids = tokenize(BEGIN + prompt + END)
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(i * 1000 + n)) for n, i in enumerate(ids)]
    return {"llm_embed": torch.stack(rows).bfloat16()}


def live() -> caching.Live:
    return caching.Live(named("zimage"), Encoder(tokenize, encode, BEGIN))


def side(host: caching.Live | Replay, targets: Sequence[Target] = TARGETS) -> TextSide:
    return TextSide(host, ZImage(nn.Module()), targets, nullcontext)


def recorded(folder: Path, captions: Sequence[str] = CAPTIONS) -> list[str]:
    """The files with the host's cached text, each with its record beside it."""
    files = []
    for i, caption in enumerate(captions):
        text = str(folder / f"{i}_zi_te.safetensors")
        save_file({"varlen_llm_embed_bfloat16": encode(caption)["llm_embed"]}, text, {"caption1": caption})
        caching.write(text, caption, TARGETS, ZImage(nn.Module()), live(), side(live()))
        files.append(text)
    return files


def played(files: Sequence[str]) -> Replay:
    found = Replay(named("zimage"))
    for text in files:
        record = replay.fault(text, (), TARGETS, ZImage(nn.Module()))
        assert not isinstance(record, Fault), (text, record)
        found.add(text, record)
    return found


def test_a_record_answers_as_the_encoder_did(tmp_path: Path) -> None:
    ours, theirs = side(played(recorded(tmp_path))), side(live())
    longest = max(len(tokenize(BEGIN + caption + END)) for caption in CAPTIONS)
    rows = [encode(caption)["llm_embed"].float() for caption in CAPTIONS]
    text = {
        "hidden": torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]),
        "hidden_mask": torch.arange(longest) < torch.tensor([[len(row)] for row in rows]),
    }
    a, b = ours.for_batch(CAPTIONS, text), theirs.for_batch(CAPTIONS, text)
    for name in ("base_groups", "full_groups", "present", "has_target", "empty"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.base == b.base
    assert a.with_target == 3
    bases = [each.base_text(batch, text, text_encoder_trained=False) for each, batch in ((ours, a), (theirs, b))]
    assert bases[0].keys() == bases[1].keys() == {"hidden", "hidden_mask"}
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
    distances = ours.distances(a)
    assert torch.equal(distances, theirs.distances(b))
    assert bool((distances > 0).any())


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    host = played(recorded(tmp_path))
    with pytest.raises(SPFError, match="was not tokenized when the prompts were cached"):
        host.tokenize("green hat")
    for prompt, beside in (
        ("green hat", ()),
        ("green hat", ("green hat, blonde hair",)),
        ("brown jacket", ("brown jacket, blonde hair",)),  # which is known as a phrase alone
        ("a woman, brown jacket", ()),  # and this as a base prompt
    ):
        with pytest.raises(SPFError, match="was not encoded when the prompts were cached"):
            host.encode([prompt], beside=beside)


def test_a_caption_that_is_the_base_prompt_and_a_phrase_of_another(tmp_path: Path) -> None:
    captions = ("red hat", "red hat, blonde hair")
    host = played(recorded(tmp_path, captions))
    rows = [encode(caption)["llm_embed"].float() for caption in captions]
    text = {"hidden": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "hidden_mask": torch.arange(len(rows[1])) < torch.tensor([[len(row)] for row in rows])}  # fmt: skip
    ours, theirs = side(host), side(live())
    a, b = ours.for_batch(captions, text), theirs.for_batch(captions, text)
    bases = [each.base_text(batch, text, text_encoder_trained=False) for each, batch in ((ours, a), (theirs, b))]
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
    assert torch.equal(ours.distances(a), theirs.distances(b))


def test_the_vector_that_an_encoder_has_of_the_words_is_the_phrases(tmp_path: Path) -> None:
    """And not the mean of all states, in which a template drowns them. The host's own file has no such tensor."""

    def pooled(prompt: str) -> Tensor:
        return torch.tensor([float(sum(tokenize(prompt))), 1.0])

    host = caching.Live(named("krea2"), Encoder(tokenize, lambda text: {
        "krea2_vl_embed": encode(text)["llm_embed"][:, None], "pooled": pooled(text)}))  # fmt: skip
    text = str(tmp_path / "0_kr2_te.safetensors")
    save_file({"varlen_krea2_vl_embed_bfloat16": host.tensors(CAPTIONS[0])["krea2_vl_embed"]}, text)
    family = Krea2(nn.Module())
    caching.write(text, CAPTIONS[0], TARGETS, family, host, TextSide(host, family, TARGETS, nullcontext))
    record, found = prompts.read(prompts.beside(text)), prompts.phrase_vectors(prompts.beside(text))
    assert {"a woman", "brown jacket", "blonde hair"} <= set(record.phrases)
    assert torch.equal(found, torch.stack([pooled(phrase) for phrase in record.phrases]))


def test_faults(tmp_path: Path) -> None:
    text = recorded(tmp_path, CAPTIONS[:1])[0]
    path, family = Path(prompts.beside(text)), ZImage(nn.Module())

    def found(captions: Sequence[str] = CAPTIONS[:1], targets: Sequence[Target] = TARGETS) -> object:
        told = replay.fault(text, captions, targets, family)
        return told if isinstance(told, Fault) else None

    assert found() is None
    assert found(captions=()) is None  # the data set has no such item any more
    assert found(captions=["another"]) is Fault.CAPTION
    assert found(targets=(Target("hair", "hat"),)) is Fault.TARGET
    assert found(targets=(Target("blonde hair", "hat"),)) is Fault.TARGET
    assert found(targets=(*TARGETS, Target("hat"))) is Fault.TARGET
    assert found(targets=(Target("Blonde_hair"), *TARGETS)) is None  # the same in captions
    content = Path(text).read_bytes()
    Path(text).write_bytes(content)  # another time
    assert found() is None
    for other in (content[:-1] + bytes([content[-1] ^ 1]), content + b"0"):
        Path(text).write_bytes(other)
        assert found() is Fault.TEXT
    Path(text).unlink()
    assert found() is Fault.TEXT
    path.write_bytes(b"nothing")
    assert found() is Fault.DAMAGED
    save_file({"vectors": torch.zeros(1)}, path)
    assert found() is Fault.DAMAGED
    save_file({"vectors": torch.zeros(1)}, path, {"spf_prompts": '{"format": 0}'})  # of another version
    assert found() is Fault.DAMAGED
    path.unlink()
    assert found() is Fault.MISSING


def test_files_that_cannot_be_written_or_read_any_more(tmp_path: Path) -> None:
    text = recorded(tmp_path, CAPTIONS[:1])[0]
    path = prompts.beside(text)
    record = prompts.read(path)
    with pytest.raises(SPFError, match="was not written"):
        prompts.write(str(tmp_path / "nowhere" / "a_spf.safetensors"), record, {}, torch.zeros(1, 1))
    Path(path).unlink()
    for read in (prompts.base_tensors, prompts.phrase_vectors):
        with pytest.raises(SPFError, match=r"cannot be read: .* Delete it"):
            read(path)


def test_records_of_two_tokenizers_do_not_go_together(tmp_path: Path) -> None:
    """Each is current by itself; together one of them would be counted in the other's tokens."""
    first, second = recorded(tmp_path, CAPTIONS[:2])
    path = prompts.beside(second)
    record = prompts.read(path)
    other = {text: [*ids, 7] if text == "blonde hair" else ids for text, ids in record.tokens.items()}
    for changed in (
        replace(record, tokens=other),
        replace(record, prefix="<other>", tokens={**record.tokens, "<other>": [1]}),
    ):
        prompts.write(path, changed, prompts.base_tensors(path), prompts.phrase_vectors(path))
        errors, _ = replay.problems(
            Replay(named("zimage")), [first, second], {}, TARGETS, ZImage(nn.Module()), "COMMAND"
        )
        assert len(errors) == 1
        assert "1 of 2 trained items are " in errors[0]
        assert "another" in errors[0]


@pytest.mark.parametrize("record", ["current", "missing", "damaged", "of another target"])
@pytest.mark.parametrize("text", ["current", "changed", "cached again", "damaged"])
def test_the_hosts_text_script_is_named_where_its_text_is_stale_and_only_there(
    tmp_path: Path, record: str, text: str
) -> None:
    files = recorded(tmp_path, CAPTIONS[:2])
    now = {file: [caption] for file, caption in zip(files, CAPTIONS, strict=False)}
    path = Path(prompts.beside(files[0]))
    if record == "missing":
        path.unlink()
    elif record == "damaged":
        path.write_bytes(b"half")
    targets = (Target("red hat"),) if record == "of another target" else TARGETS
    if text != "current":
        now[files[0]] = ["a woman, blonde hair, red hat"]
    if text == "cached again":
        tensors = {"varlen_llm_embed_bfloat16": encode(now[files[0]][0])["llm_embed"]}
        save_file(tensors, files[0], {"caption1": now[files[0]][0]})
    elif text == "damaged":
        Path(files[0]).write_bytes(b"half")
    family = ZImage(nn.Module())
    errors, _ = replay.problems(Replay(named("zimage")), files, now, targets, family, "COMMAND")
    assert bool(errors) == (record != "current" or text != "current")
    assert all("Run: COMMAND" in error for error in errors)
    named_ = ["zimage_cache_text_encoder_outputs.py first" in error for error in errors]
    assert any(named_) == (text in ("changed", "damaged"))
    # What the command itself says of the item is the same: what it names is what must be done.
    unfit = caching._Unfit(named("zimage"))
    assert unfit.takes(files[0], now[files[0]]) != any(named_)


def test_encodings_of_another_caption_are_not_near() -> None:
    same, other = encode("a red hat, blonde hair"), encode("a blue hat, blonde hair")
    names = ("llm_embed",)
    assert prompts.near(same, {"llm_embed": same["llm_embed"].half()}, names, 1)
    assert prompts.near(same, {"llm_embed": same["llm_embed"] * 1.02}, names, 1)
    assert not prompts.near(same, other, names, 1)
    assert not prompts.near(same, encode("a red hat"), names, 1)
    assert not prompts.near(same, {}, names, 1)
    assert not prompts.near(same, {"llm_embed": same["llm_embed"] * float("nan")}, names, 1)
    # What stands before the words is the same in all prompts, and may be larger than all of them.
    loud = [
        {"llm_embed": torch.cat([torch.full((1, WIDTH), 1e3), each["llm_embed"].float()])} for each in (same, other)
    ]
    assert prompts.near(loud[0], loud[0], names, 2)
    assert not prompts.near(*loud, names, 2)
    ids = {"ids": torch.tensor([1, 2])}
    assert prompts.near(ids, {"ids": torch.tensor([1, 2])}, ("ids",), 0)
    assert not prompts.near(ids, {"ids": torch.tensor([1, 3])}, ("ids",), 0)


def test_the_hosts_names_are_read(tmp_path: Path) -> None:
    path = str(tmp_path / "a_te.safetensors")
    written = ("varlen_llm_embed_float8_e4m3fn", "ctx_vec_bfloat16", "llm_mask")
    save_file({name: torch.zeros(2) for name in written}, path, {"caption1": "a, b"})
    assert prompts.host_caption(path) == "a, b"
    assert set(prompts.host_text(path)) == {"llm_embed", "ctx_vec", "llm_mask"}
    with pytest.raises(ValueError, match="nothing"):
        prompts.host_text(str(tmp_path / "nothing"))
    assert prompts.host_caption(str(tmp_path / "nothing")) is None


def test_batches_name_their_items() -> None:
    class Item:
        def __init__(self, name: str):
            self.text_encoder_output_cache_path = name

    class Batches:
        batch_size, bucket_batch_indices = 2, [((64, 64), 1), ((64, 64), 0)]
        buckets = {(64, 64): [Item("a"), Item("b"), Item("c")]}  # noqa: RUF012

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"latents": index}

    named_ = NamedBatches(Batches())
    assert len(named_) == 2
    assert named_.batch_size == 2
    assert [named_[i][ITEMS] for i in range(2)] == [["c"], ["a", "b"]]
    assert named_[1]["latents"] == 1
    again = copy.copy(named_)  # as a loader's worker makes one, which has nothing yet
    assert (len(again), again.batch_size, again[1]) == (2, 2, named_[1])


def test_the_architectures() -> None:
    assert len({each.name for each in ARCHITECTURES}) == len(ARCHITECTURES)
    zimage = named("zimage")
    for code, found in (("zi", zimage), ("other", None)):
        trainer = type(zimage.script.trainer, (), {"architecture": code})
        assert of_trainer(type("Mine", (trainer,), {})()) is found
    assert of_trainer(object()) is None


def test_the_command_without_musubi_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spf_plugin.tools.cli.prompts import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "musubi_tuner", None)  # a checkout that another test has put there
    for target, said in (("blonde hair", "musubi-tuner cannot be imported here"), ("a->a", "replaces 'a' by itself")):
        result = CliRunner().invoke(app, ["--arch", "zimage", "--target", target, "--dataset_config", "x.toml"])
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


# -- the command, on an encoder that is not the host's ----------------------------------------------------------------


class Counted:
    """The encoder, and how many prompts it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, tokens: int = 0):
        self.prompts: list[str] = []
        self.architecture = replace(named("zimage"), load=lambda args, device: self.encoder)
        self.encoder = Encoder(lambda text: [tokens + each for each in tokenize(text)], self.encode, BEGIN)
        sets = [SimpleNamespace(cache_directory=str(folder), architecture="zi")]
        monkeypatch.setattr(caching, "data_sets", lambda args, code: sets)
        self._patch = monkeypatch

    def encode(self, prompt: str) -> dict[str, Tensor]:
        self.prompts.append(prompt)
        return encode(prompt)

    def run(self, captions: Mapping[str, Sequence[str]]) -> caching.Done:
        self._patch.setattr(caching.items, "captions", lambda sets: captions)
        args = SimpleNamespace(device="cpu", dataset_config="sets.toml", keep_cache=False)
        return caching.run(self.architecture, ZImage(nn.Module()), TARGETS, args)


def test_what_is_current_is_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, command = recorded(tmp_path), Counted(monkeypatch, tmp_path)
    captions = {text: [caption] for text, caption in zip(files, CAPTIONS, strict=True)}
    assert command.run(captions) == caching.Done(0, len(CAPTIONS), ())
    assert command.prompts == []
    Path(prompts.beside(files[0])).unlink()
    Path(files[-1]).unlink()
    gone = captions.popitem()[0]
    assert command.run(captions) == caching.Done(1, len(CAPTIONS) - 2, (prompts.beside(gone),))


def test_what_another_tokenizer_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: whose is the right one nobody knows."""
    files, command = recorded(tmp_path), Counted(monkeypatch, tmp_path, tokens=7)
    captions = {text: [caption] for text, caption in zip(files, CAPTIONS, strict=True)}
    Path(prompts.beside(files[0])).unlink()
    assert command.run({files[0]: captions[files[0]]}).encoded == 1
    assert command.run(captions) == caching.Done(len(CAPTIONS), 0, ())
    assert played(files).tokenize("blonde hair") == command.encoder.tokenize("blonde hair")


def test_another_encoder_is_seen_before_all_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = {}
    for i in range(9):
        text = str(tmp_path / f"{i}_zi_te.safetensors")
        save_file({"varlen_llm_embed_bfloat16": encode(f"a {i}")["llm_embed"]}, text, {"caption1": f"b {i}"})
        captions[text] = [f"b {i}"]
    command = Counted(monkeypatch, tmp_path)
    with pytest.raises(SPFError, match="4 cached encodings are not what this text encoder makes of their captions"):
        command.run(captions)
    assert command.prompts == ["b 0", "b 1", "b 2", "b 3"]


def test_all_that_cannot_be_encoded_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, several, damaged = recorded(tmp_path, ("a man, blonde hair", "a woman", "a cat"))
    for text in (good, several, damaged):
        Path(prompts.beside(text)).unlink()
    Path(damaged).write_bytes(b"half of a file")
    missing = str(tmp_path / "missing_zi_te.safetensors")
    captions = {good: ["a man, blonde hair"], several: ["a woman", "a dog"], damaged: ["a cat"], missing: ["a tree"]}
    with pytest.raises(SPFError) as caught:
        Counted(monkeypatch, tmp_path).run(captions)
    assert [problem.partition(",")[0] for problem in caught.value.problems] == [
        "1 cached encodings are of several items with different captions",
        "1 captions are not cached",
        "1 cached encodings are of another caption than the data set has now",
    ]
    assert prompts.read(prompts.beside(good)).caption == "a man, blonde hair"  # the rest is done


def test_data_sets_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SPFError, match=r"--dataset_config sets\.toml: there are no captions in its data sets"):
        Counted(monkeypatch, tmp_path).run({})

    def unreadable(sets: object) -> dict[str, list[str]]:
        raise OSError("a.txt is gone")

    command = Counted(monkeypatch, tmp_path)
    monkeypatch.setattr(caching.items, "captions", unreadable)
    args = SimpleNamespace(device="cpu", dataset_config="sets.toml", keep_cache=False)
    with pytest.raises(SPFError, match=r"a caption of the data set cannot be read: a\.txt is gone"):
        caching.run(command.architecture, ZImage(nn.Module()), TARGETS, args)


def test_no_trainer_is_calling() -> None:
    assert loop.default_network() == "networks.lora"
    for mark, network in (("hada_w1_a", "networks.loha"), ("lokr_w1", "networks.lokr"), ("lora_up", "networks.lora")):
        assert loop.network_for([f"lora_unet_x.{mark}"]) == network
    with pytest.raises(SPFError, match="no trainer of musubi-tuner is calling"):
        loop.MusubiHost.find(nn.Module(), ZImage)
