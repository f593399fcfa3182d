"""The commands of docs/musubi.md, in their order, by a user who has tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import toml
from PIL import Image
from safetensors.torch import load_file

from tests.documents import commands
from tests.hosts.conftest import REPOSITORY
from tests.hosts.musubi.conftest import EVERY_STEP, Musubi, words
from tests.hosts.musubi.test_runs import SPY

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
    assert ran == ["spf check", *caching, "spf check", "spf plan", "zimage_train_network"] + ["spf lora"] * 2
    theirs = load_file(tmp_path / "out" / "hair-comfyui.safetensors")
    assert all(name.startswith("diffusion_model.layers.") for name in theirs)


FRAMES, SIDES = 17, (64, 48)


def clip(place: Path, tint: int, *, film: bool) -> Path:
    """A bar that wanders, as a film or as a folder of pictures: both are videos to musubi-tuner."""
    pictures = []
    for i in range(FRAMES):
        picture = Image.new("RGB", SIDES, (tint, 90, 120))
        picture.paste((230, 200, 40), (3 * i, 0, 3 * i + 8, SIDES[1]))
        pictures.append(picture)
    if not film:
        place.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(place / f"{i:03d}.png")
        return place
    av = pytest.importorskip("av", reason="NO av IN THIS PYTHON: films are not read")
    path = place.with_suffix(".mp4")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = *SIDES, "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return path


@pytest.mark.kinds("wan")
@pytest.mark.parametrize("film", [False, True], ids=["pictures", "film"])
def test_clips_from_the_file_to_the_lora(musubi: Musubi, tmp_path: Path, film: bool) -> None:
    """Latents by the host's own script, of one frame and of nine; text, prompts, training, ComfyUI's names."""
    (tmp_path / "clips").mkdir()
    rows = []
    for i, caption in enumerate(("a woman walks, blonde hair, street", "a man with blonde hair, red hat", "a harbour")):
        path = clip(tmp_path / "clips" / str(i), 60 * i, film=film)
        rows.append(json.dumps({"video_path": str(path), "caption": caption}))
    (tmp_path / "clips.jsonl").write_text("\n".join(rows), encoding="utf-8")
    said = {"video_jsonl_file": str(tmp_path / "clips.jsonl"), "cache_directory": str(tmp_path / "cache"),
            "resolution": list(SIDES), "target_frames": [1, 9], "frame_extraction": "head"}  # fmt: skip
    config = tmp_path / "clips.toml"
    config.write_text(toml.dumps({"datasets": [said]}), encoding="utf-8")
    options = musubi.kind.options(musubi.models)
    latents = musubi.kind.TEXT_SCRIPT.replace("text_encoder_outputs", "latents")
    musubi.done(latents, *words({"dataset_config": config, "vae": options["vae"], "num_workers": 1}))
    assert len(list((tmp_path / "cache").glob("*_wan.safetensors"))) == 2 * len(rows)
    for done in (musubi.cache_text(config), musubi.cache_prompts(config)):
        assert done.returncode == 0, done.log[-4000:]
    trained = musubi.train(*EVERY_STEP, module=SPY, dataset_config=config, max_train_steps=11)
    assert trained.returncode == 0, trained.log[-4000:]
    seen = json.loads((trained.folder / "spy.json").read_text(encoding="utf-8"))
    assert all(pair["equal"] and pair.get("repeats", True) for pair in seen)
    assert all(pair["response"] > 0 for pair in seen if pair["target"] and "response" in pair)
    assert {pair["shape"][2] for pair in seen if "shape" in pair} == {SIDES[1] // 8, 3 * SIDES[1] // 8}
    theirs = tmp_path / "comfyui.safetensors"
    musubi.done("spf", "lora", "convert", trained.file, theirs, "--to", "comfyui")
    assert all(name.startswith("diffusion_model.blocks.") for name in load_file(theirs))


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
