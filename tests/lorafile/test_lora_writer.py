"""M2: hashes, identical bytes, and that the previous file survives every way a save can fail."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import reader, writer
from tests.lorafile import helpers as h

METADATA = {"ss_output_name": 'é\n"\\', "ss_v2": "False", "other": "x", "aaa": "1"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.lora_up.weight": torch.randn(7, 3, generator=generator).half(),
        "a.alpha": torch.tensor(2.0).half(),
        "a.bf16": torch.randn(5, generator=generator).bfloat16(),
        "wide": torch.randn(3, 3, generator=generator),
        "counts": torch.arange(3),
        "flag": torch.tensor([True]),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "empty": torch.zeros(0, 2),
    }


def test_header_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer.save(path, tensors(), METADATA)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert raw[8:10] == b'{"'
    assert length % 8 == 0
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert list(metadata) == sorted(metadata)
    assert {k: metadata[k] for k in METADATA} == METADATA
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[8 + length :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == "e3b0c442"  # below 1 MiB there is nothing to hash
    loaded = load_file(path)
    assert all(torch.equal(loaded[key], t) and loaded[key].dtype == t.dtype for key, t in tensors().items())


@pytest.mark.parametrize("size", [0x100000, 0x110000, 0x10FF00, 300_000, 5_000_000])
def test_legacy_hash_is_the_windows(size: int) -> None:
    """64 KiB from 1 MiB on of the file with ss_ metadata only, as the host computes it, at every file size."""
    state_dict = {
        "a": torch.arange(size // 2, dtype=torch.int16).view(torch.float16),
        "b": torch.arange(size // 8, dtype=torch.int16).view(torch.bfloat16),
        "c": torch.ones(size // 16),
    }
    raw = save(state_dict, {k: v for k, v in METADATA.items() if k.startswith("ss_")})
    length = int.from_bytes(raw[:8], "little")
    want = hashlib.sha256(raw[8 + length :]).hexdigest(), hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert writer.hashes(state_dict, METADATA) == want


def test_saved_again_is_identical(tmp_path: Path) -> None:
    """In any process, any dict order, and from the file's own contents."""
    first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
    writer.save(first, tensors(), METADATA)
    writer.save(second, *reader.load(first))
    assert first.read_bytes() == second.read_bytes()
    script = (
        "import sys; from tests.lorafile.test_lora_writer import *;"
        "writer.save(sys.argv[1], dict(reversed(tensors().items())), dict(reversed(METADATA.items())))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(third)], check=True, env=environment)
    assert first.read_bytes() == third.read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch, error: BaseException, moment: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"the good old file")
    if moment == "write":
        real, calls = writer._raw, []

        def failing(tensor: torch.Tensor) -> memoryview:
            calls.append(1)
            if len(calls) > len(tensors()) + 3:  # past the hash pass, in the middle of the data
                raise error
            return real(tensor)

        monkeypatch.setattr(writer, "_raw", failing)
    else:

        def refuse(*_) -> None:
            raise error

        monkeypatch.setattr(writer.os, moment, refuse)
    wanted = SPFError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as caught:
        writer.save(path, tensors(), METADATA)
    if wanted is SPFError:
        assert "the disk is full" in str(caught.value)
    assert path.read_bytes() == b"the good old file"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """The operating system itself stops the write half-way (a file size limit acts as the full disk)."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"the good old file")
    script = (
        "import resource, signal, sys, torch; from spf_plugin.lorafile import writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        "try: writer.save(sys.argv[1], {'a': torch.ones(1000000)}, {})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("SPFError")
    assert "Nothing was changed" in done.stdout
    assert path.read_bytes() == b"the good old file"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
def test_mode_and_links(tmp_path: Path) -> None:
    """A new file gets the umask's mode; a linked LoRA is replaced where it really lies."""
    folder, link = tmp_path / "real", tmp_path / "x.safetensors"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(b"old")
    link.symlink_to(folder / "x.safetensors")
    old = os.umask(0o027)
    try:
        writer.save(link, tensors(), {})
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert reader.read_header(folder / "x.safetensors").tensors.keys() == tensors().keys()
    assert stat.S_IMODE((folder / "x.safetensors").stat().st_mode) == 0o640


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match="Metadata must be strings"):
        writer.save(tmp_path / "x.safetensors", tensors(), {"a": 1})  # type: ignore[dict-item]
    with pytest.raises(SPFError, match="cannot store"):
        writer.save(tmp_path / "x.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(SPFError, match="plain data"):
        writer.save(tmp_path / "x.safetensors", {"a": torch.zeros(1, device="meta")}, {})
    with pytest.raises(SPFError, match="was not written"):
        writer.save(tmp_path / "absent" / "x.safetensors", tensors(), {})
    assert list(tmp_path.iterdir()) == []


def test_gradients_and_parameters(tmp_path: Path) -> None:
    """Live parameters are saved as they are."""
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    writer.save(tmp_path / "x.safetensors", {"p": parameter}, {})
    assert torch.equal(reader.load(tmp_path / "x.safetensors")[0]["p"], parameter.data)


def test_real_size_is_aligned(tmp_path: Path) -> None:
    """Every tensor starts at a multiple of its item size, for readers that map the file."""
    mixed = {k: t.float() if "attn1" in k else t for k, t in h.full_lora("sd1", text=False).items()}
    writer.save(tmp_path / "x.safetensors", mixed, {})
    header = reader.read_header(tmp_path / "x.safetensors")
    for info in header.tensors.values():
        assert (header.data_offset + info.start) % reader.DTYPE_BYTES[info.dtype] == 0
