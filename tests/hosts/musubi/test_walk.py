"""The commands of docs/musubi.md, in their order, by a user who has tiny models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.documents import commands
from tests.hosts.conftest import REPOSITORY
from tests.hosts.musubi.conftest import EVERY_STEP, Musubi, words

PAGE = "docs/musubi.md"
#: What the preset says and tiny models or a CPU do not want.
TINY = ["--max_train_steps", "4", "--lr_warmup_steps", "0", "--optimizer_type", "AdamW"]


def spoken() -> list[tuple[str, list[str]]]:
    """The page's whole lines: program or script, and the words behind it."""
    found = []
    for command in commands():
        if command.page == PAGE and command.whole:
            first, *rest = command.words
            skipped = 2 if first == "accelerate" else 1 if first == "python" else 0
            found.append((command.words[skipped], rest[skipped:]))
    return found


@pytest.mark.kinds("zimage")
def test_the_commands_of_the_page(musubi: Musubi, tmp_path: Path) -> None:
    data = musubi.data_set(tmp_path / "data")
    for latents in (tmp_path / "data" / "cache").iterdir():  # the page has a command for them
        latents.unlink()
    options = {**musubi.kind.options(musubi.models), **musubi.kind.text_options(musubi.models)}
    places = {
        "dataset.toml": str(data),
        "models/ae.safetensors": str(options["vae"]),
        "models/qwen_3_4b.safetensors": str(options["text_encoder"]),
        "out": str(tmp_path / "out"),
    }

    def filled(line: Sequence[str]) -> list[str]:
        named = [places.get(word, word.replace("path/to/presets", f"{REPOSITORY}/presets")) for word in line]
        return [re.sub(r"^out/", f"{tmp_path}/out/", word) for word in named]

    ran = []
    for script, line in spoken():
        if script == "install.py":
            continue
        more = words({"dit": options["dit"]}) + TINY if script.endswith("zimage_train_network.py") else []
        done = musubi.run(script, filled(line) + more)
        ran.append(" ".join([Path(script).stem, *line[: script == "spf"]]))
        # That some program does not load it is said by its status, too.
        assert done.returncode == 0 or ran[-1] == "spf lora", (script, done.log[-4000:])
    caching = ["zimage_cache_latents", "zimage_cache_text_encoder_outputs", "spf cache-prompts"]
    assert ran == ["spf check", *caching, "spf check", "zimage_train_network", "spf lora", "spf lora"]
    theirs = load_file(tmp_path / "out" / "hair-comfyui.safetensors")
    assert all(name.startswith("diffusion_model.layers.") for name in theirs)


@pytest.mark.kinds("zimage")
@pytest.mark.parametrize(
    "flags",
    [{"gradient_checkpointing": True, "gradient_checkpointing_cpu_offload": True}, {"num_timestep_buckets": 4}],
    ids=["offload", "buckets"],
)
def test_options_that_need_nothing_of_spf(musubi: Musubi, flags: dict[str, object], tmp_path: Path) -> None:
    done = musubi.train(*EVERY_STEP, out=tmp_path / "out", **flags)
    assert done.returncode == 0, done.log[-4000:]
    assert "attention layers compared" in done.log
