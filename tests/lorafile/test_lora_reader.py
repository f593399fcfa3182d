"""The reader against damaged and hostile files: one clear message, no crash, no allocation beyond the file."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from spf_plugin.lorafile import inspect, loaders, reader

UnreadableFile = reader.UnreadableFile


def packed(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HEALTHY = packed(f'{{"__metadata__":{{"a":"b"}},"t":{entry()}}}', b"\0\0\x80?")

# (id, bytes, part of the message)
BROKEN = [
    ("empty", b"", "too short"),
    ("seven-bytes", b"\1" * 7, "too short"),
    ("zip-pickle", b"PK\x03\x04" + b"\0" * 40, "pickle"),
    ("pickle", pickle.dumps({"a": 1}), "pickle"),
    ("web-page", b"<!DOCTYPE html><html>", "web page"),
    ("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ("gguf", b"GGUF\3\0\0\0\0\0\0\0", "GGUF"),
    ("header-2gb", (2**31).to_bytes(8, "little") + b"{}", "2,147,483,648 bytes"),
    ("header-max", b"\xff" * 8 + b"{}", "more than the"),
    ("header-beyond-file", (1000).to_bytes(8, "little") + b'{"a"', "cut short inside its header"),
    ("no-header", (0).to_bytes(8, "little"), "does not start with"),
    ("array", packed("[]"), "does not start with"),
    ("not-json", packed("{nonsense}"), "not valid safetensors JSON"),
    ("not-utf8", packed(b'{"\xff":1}'), "UTF-8"),
    ("surrogate", packed('{"\\ud800":' + entry() + "}", b"\0" * 4), "bad string"),
    ("control-character", packed('{"a\n":' + entry() + "}", b"\0" * 4), "bad string"),
    ("text-after", packed("{} {}"), "text after the end"),
    ("deep", packed("{" + '"a":{' * 50_000), "bad tensor entry"),
    ("deep-lists", packed('{"a":{"dtype":"F32","shape":' + "[" * 2000 + "]" * 2000 + "}}"), "bad tensor entry"),
    ("twice", packed(f'{{"t":{entry()},"t":{entry(offsets="[4,8]")}}}', b"\0" * 8), "'t' twice"),
    ("metadata-twice", packed('{"__metadata__":{},"__metadata__":{}}'), "two metadata"),
    ("metadata-key-twice", packed('{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    ("metadata-number", packed('{"__metadata__":{"a":1}}'), "not valid safetensors JSON"),
    ("overlap", packed(f'{{"a":{entry()},"b":{entry(offsets="[0,4]")}}}', b"\0" * 8), "overlaps"),
    ("partial-overlap", packed(f'{{"a":{entry()},"b":{entry(offsets="[2,6]")}}}', b"\0" * 6), "overlaps"),
    ("hole", packed(f'{{"a":{entry()},"b":{entry(offsets="[8,12]")}}}', b"\0" * 12), "4 unused bytes"),
    ("truncated", HEALTHY[:-1], "1 bytes are missing"),
    ("appended", HEALTHY + b"x", "1 bytes after"),
    ("unknown-dtype", packed(f'{{"t":{entry(dtype="F12")}}}', b"\0" * 4), "unknown dtype 'F12'"),
    ("dtype-list", packed('{"t":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "unknown dtype"),
    ("wrong-size", packed(f'{{"t":{entry(shape="[2]")}}}', b"\0" * 4), "4 bytes for shape"),
    ("huge-shape", packed(f'{{"t":{entry(shape="[4294967296,4294967296]")}}}', b"\0" * 4), "for shape"),
    ("negative", packed(f'{{"t":{entry(shape="[-1]")}}}', b"\0" * 4), "impossible shape"),
    ("float-shape", packed(f'{{"t":{entry(shape="[1.0]")}}}', b"\0" * 4), "impossible shape"),
    ("true-shape", packed(f'{{"t":{entry(shape="[true]")}}}', b"\0" * 4), "impossible shape"),
    ("backwards", packed(f'{{"t":{entry(offsets="[4,0]")}}}', b"\0" * 4), "bytes for shape"),
    ("three-offsets", packed(f'{{"t":{entry(offsets="[0,2,4]")}}}', b"\0" * 4), "impossible shape"),
    ("extra-field", packed('{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', b"\0" * 4), "lacks dtype"),
    ("entry-is-number", packed('{"t":7}'), "bad tensor entry"),
    ("long-number", packed(f'{{"t":{entry(shape="[" + "9" * 5000 + "]")}}}'), "bad tensor entry"),
]


@pytest.mark.parametrize(("content", "message"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_broken(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        reader.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_healthy(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEALTHY)
    state_dict, metadata = reader.load(path)
    assert state_dict["t"].tolist() == [1.0]
    assert metadata == {"a": "b"}


@pytest.mark.parametrize("second", [2, 3, 4, 5])
def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path: Path, second: int) -> None:
    """A safetensors file begins with the length of its header, which may be any: also the bytes 80 04 of a pickle."""
    path, tensor = tmp_path / "x.safetensors", torch.tensor([1.0])
    empty = len(save({"t": tensor}, {"a": ""})) - 8 - 4
    path.write_bytes(save({"t": tensor}, {"a": "x" * (256 * second + 0x80 - empty)}))
    assert path.read_bytes()[:2] == bytes([0x80, second])
    assert reader.load(path)[0]["t"].tolist() == [1.0]


def test_against_the_library(tmp_path: Path) -> None:
    """Everything the library writes is read the same, whatever the strings."""
    odd = {'quote"\\/\b\f\n\r\t': "\x01\x7f é € \U0001f600", "": "", "j": json.dumps({"a": [1, {"b": "}"}]})}
    tensors = {'ü.{}[]"': torch.randn(3, 2), "0d": torch.tensor(1.5, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    raw = save(tensors, odd)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    state_dict, metadata = reader.load(path)
    assert metadata == odd
    assert state_dict.keys() == tensors.keys()
    assert all(torch.equal(state_dict[k], t) for k, t in tensors.items())


def test_paths(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent.safetensors", "no such file"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "not a regular file"),
        (Path("bad\0name"), "not a file name"),
    ):
        if os.name == "nt" and path == Path("/dev/null"):
            continue
        with pytest.raises(UnreadableFile, match=message):
            reader.read_header(path)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX links and pipes")
def test_links_and_pipes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(UnreadableFile, match="cannot be opened"):
        reader.read_header(one)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(UnreadableFile, match="not a regular file"):  # and does not wait for a writer
        reader.read_header(pipe)
    good, link = tmp_path / "good.safetensors", tmp_path / "link.safetensors"
    good.write_bytes(HEALTHY)
    link.symlink_to(good)
    assert reader.read_header(link).metadata == {"a": "b"}


def test_no_allocation_bomb(tmp_path: Path) -> None:
    """A 1 MiB header made of what costs a JSON parser most stays within a small multiple of its size."""
    path = tmp_path / "x.safetensors"
    for filler in ("[],", "{},", "0,", '"a":{},'):
        body = '{"t":{"dtype":"F32","shape":[' + filler * (2**20 // len(filler)) + "0]}}"
        path.write_bytes(packed(body))
        tracemalloc.start()
        with pytest.raises(UnreadableFile):
            reader.read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * len(body)
    # a sparse file that claims the largest header allowed is refused by its first byte
    with open(path, "wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(UnreadableFile):
        reader.read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_too_many_tensors(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reader, "MAX_TENSORS", 10)
    body = ",".join(f'"{i}":{entry(offsets=f"[{4 * i},{4 * i + 4}]")}' for i in range(11))
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed("{" + body + "}", b"\0" * 44))
    with pytest.raises(UnreadableFile, match="more than 10 tensors"):
        reader.read_header(path)


def test_fuzz(tmp_path: Path) -> None:
    """Random damage to a real file: either our message, or a file that the library reads the same. Never a crash."""
    rng = random.Random(0)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.lora_down.weight": torch.ones(2, 8, 1, 1),
        f"{name}.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    healthy = save(tensors, {"ss_v2": "False", "ss_network_args": '{"a": "b"}'})
    length = int.from_bytes(healthy[:8], "little")
    path = tmp_path / "x.safetensors"
    read, messages = 0, [0]
    for _ in range(1500):
        raw = bytearray(healthy)
        for _ in range(rng.randint(1, 4)):
            kind = rng.randrange(6)
            at = rng.randrange(8 + length) if rng.random() < 0.9 else rng.randrange(len(raw))
            if kind == 0:
                raw[at % len(raw)] = rng.randrange(256)
            elif kind == 1:
                raw[at % len(raw)] = ord(rng.choice('{}[],:"0123456789- \\'))
            elif kind == 2:
                del raw[at : at + rng.randint(1, 20)]
            elif kind == 3:
                raw[at:at] = bytes(raw[at : at + rng.randint(1, 40)])
            elif kind == 4:
                del raw[rng.randrange(len(raw)) :]
            else:
                raw[:8] = rng.choice([0, 1, 2, length - 8, length + 8, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
            if len(raw) < 2:
                break
        path.write_bytes(raw)
        try:
            contents = inspect.from_file(path)
            loaders.verdicts(contents, inspect.describe(contents))
        except UnreadableFile as error:
            messages.append(len(str(error)))
            continue
        read += 1
        try:
            library = load(bytes(raw))
        except SafetensorError:
            pytest.fail(f"read what the library refuses: {bytes(raw)!r}")
        assert library.keys() == contents.tensors.keys()
    assert 0 < read < 1500
    assert max(messages) < 2000


def test_importing_needs_no_heavy_package() -> None:
    """The core and its reader import torch and safetensors, nothing that a trainer's environment may lack."""
    script = (
        "import sys; import spf_plugin.lorafile.normalise, spf_plugin.lorafile.writer, spf_plugin.lorafile.sidecars;"
        "print([m for m in ('diffusers', 'peft', 'lycoris', 'transformers', 'rich', 'typer', 'torchvision')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
