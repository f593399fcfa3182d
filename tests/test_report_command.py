"""`spf report` on the embedded model and on a tiny SDXL: the page, its numbers against slow ones, and mistakes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.tools import cli
from spf_plugin.tools.report import maps, metrics, models, page, prompts
from spf_plugin.tools.report.measures import pixel_change
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.settings import Settings
from tests import onnx_files, single_file, tiny
from tests.portraitlab.test_report import Elements

MODEL = Path(__file__).parents[1] / "portraitlab" / "model"
HAIR = (Target("blonde hair"),)
#: What is said of a folder that holds no segmentation model; transformers 5 first wants its torchvision.
SEGMENTATION = "not a semantic segmentation model" if tiny.can_segment() else "requires the Torchvision library"
PROMPTS = ("a woman, green shirt, street", "a man with blonde hair, forest")


def spf(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["report", *map(str, words)])


def check(out: Path) -> str:
    """The page stands alone: pictures inside, alt texts, no scripts, nothing fetched. Returns its text."""
    text = (out / "report.html").read_text(encoding="utf-8")
    elements = Elements(text)
    assert elements.open == []
    images = [attributes for tag, attributes in elements.found if tag == "img"]
    assert images
    for attributes in images:
        assert attributes["alt"]
        match = re.match(r"data:image/(?:png|jpeg);base64,(.*)", attributes["src"] or "")
        assert match
        Image.open(io.BytesIO(base64.b64decode(match[1]))).verify()
    assert not {tag for tag, _ in elements.found} & {"script", "link", "iframe", "object", "base"}
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    without = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|url\(|@import|src=", without)
    assert not list(out.rglob("*.part"))
    return without


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded model, a step long, with a target and kohya's tag counts in its metadata."""
    from safetensors import safe_open

    root = tmp_path_factory.mktemp("lora")
    images = tiny.images(root / "images")
    settings = Settings(str(MODEL), images, root / "plain.safetensors", None, steps=2, rank=2, learning_rate=2e-2)
    path = train(settings).path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["ss_network_args"] = json.dumps({"spf_target": "blonde hair", "spf_map": "difference"})
    metadata["ss_tag_frequency"] = json.dumps({"1_x": {"a woman": 3, "street": 1, "blonde hair": 3}})
    save_file(load_file(path), root / "hair.safetensors", metadata)
    return root / "hair.safetensors"


def subject(folder: Path) -> Path:
    """Two photos that were kept back, of different shapes, one on its side by its EXIF alone."""
    folder.mkdir()
    random = np.random.default_rng(7)
    pixels = random.integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(folder / "b.png", exif=turned)
    for name, caption in (("a", "a woman, blonde hair"), ("b", "a man with blonde hair")):
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small report on two LoRAs."""
    out = tmp_path_factory.mktemp("report") / "out"
    faces = onnx_files.detector(out.parent / "faces" / "face_detection_yunet_test.onnx").parent
    onnx_files.recognizer(faces / "face_recognition_sface_test.onnx")
    done = spf(
        "--model", MODEL, "--lora", lora, "--lora2", lora.with_name("plain.safetensors"), "--out", out, "--steps", 1,
        "--seeds", "5", "--batch-size", 2, "--device", "cpu", "--clip", tiny.clip(out.parent / "clip"),
        "--held-out", 4, "--dino", tiny.dino(out.parent / "dino"), "--subject", subject(out.parent / "kept"),
        "--faces", faces, "--segmentation",
        tiny.segmenter(out.parent / "parser", {0: "background", 1: "hair"}),
    )  # fmt: skip
    assert done.exit_code == 0, done.output + repr(done.exception)
    return out


def test_the_page_and_its_files(made: Path, lora: Path) -> None:
    text = check(made)
    assert "What else changed with blonde hair?" in text
    assert "hair.safetensors" in text
    assert "plain.safetensors" in text
    assert "ss_tag_frequency" in text
    for part in ("Map “difference”", "Not measured", "LPIPS", "FID", "face identity", "sha256 of unet/", "diffusers "):
        assert part in text, part
    for name in ("samples.png", "maps.png", "phrases.png", "drift.png"):
        assert (made / name).stat().st_size > 500, name
    numbers = json.loads((made / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["prompts"] == [
        {"base": "a woman", "full": "a woman, blonde hair"},
        {"base": "a woman, street", "full": "a woman, street, blonde hair"},
    ]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert numbers["hashes"][str(lora)] == digest
    assert digest in text  # whole at the end
    assert f"hair {digest[:12]}" in text  # short over its column
    assert "n = 2 images" in text
    assert all(row["n"] and row["by"] for row in numbers["rows"].values())
    for key in ("clip_i_without", "face_without", "segmentation_without"):
        row = numbers["rows"][key]
        assert re.search(r" [0-9a-f]{12}, licence ", row["by"]), key
        assert row["n"] in text
        assert any(digest[:12] in row["by"] for digest in numbers["hashes"].values())
    assert numbers["not_measured"].keys() == {"KID, FID", "LPIPS"}
    assert "What nobody trained" in text
    assert "the report&#39;s own prompts, target not asked for (2)" in text
    groups = [one["group"] for one in numbers["held_out"]["prompts"]]
    assert groups == ["one person", "several people", "animals", "places"]
    assert "The subject" in text
    assert len(list((made / "images").glob("photo*-seed5-*.png"))) == 6
    assert numbers["rows"]["dino_subject"]["n"] == "2 images of 2 photos' captions"
    assert None not in numbers["rows"]["dino_subject"]["values"]
    for key in (
        "pixels_held_out",
        "drift_held_out",
        "dino_held_out",
        "clip_t_change_held_out",
        "segmentation_held_out",
    ):
        row = numbers["rows"][key]
        assert list(row["groups"]) == groups
        assert row["values"][1] == pytest.approx(np.mean([values[1] for values in row["groups"].values()]), abs=1e-6)
    command = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert command
    for option in (
        "--faces",
        "--segmentation",
        "--clip",
        "--batch-size 2",
        "--seeds 5",
        "--held-out 4",
        "--dino",
        "--subject",
    ):
        assert option in command[1], option


def test_the_pixel_change_is_that_of_the_files(made: Path) -> None:
    def read(name: str, number: int = 2, kind: str = "prompt") -> Any:
        files = sorted((made / "images").glob(f"{kind}*-{name}.png"))
        assert len(files) == number
        return np.stack([np.asarray(Image.open(file), np.float64) for file in files])

    rows = json.loads((made / "numbers.json").read_text(encoding="utf-8"))["rows"]
    base = read("base-without")
    for row, kind in (("pixels_without", "without"), ("pixels_with", "with")):
        for column, name in enumerate(("base", "lora", "lora2")):
            value = rows[row]["values"][column]
            if value is not None:
                assert value == pytest.approx(np.abs(read(f"{name}-{kind}") - base).mean() / 255, rel=1e-5)
    assert rows["pixels_without"]["values"][0] is None
    changed = np.abs(read("lora", 4, "held-out") - read("base", 4, "held-out")).mean() / 255
    assert rows["pixels_held_out"]["values"][1] == pytest.approx(changed, rel=1e-5)
    # Both LoRAs hold the same weights.
    for row in rows.values():
        assert row["values"][1] == row["values"][2]


def test_drift_is_that_of_separate_predictions(lora: Path) -> None:
    """Against the pipeline called by hand; and without the LoRA the model is as it was."""
    pipeline, parts = models.load(str(MODEL), torch.device("cpu"), torch.float32)
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    full, base = "a woman, street, blonde hair", "a woman, street"

    def predict(prompt: str, latents: torch.Tensor, noise: torch.Tensor) -> Any:
        with torch.no_grad():
            noisy = pipeline.scheduler.add_noise(latents, noise, torch.tensor([400]))
            states = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
            return pipeline.unet(noisy, 400, encoder_hidden_states=states).sample.double().numpy()

    random = torch.Generator().manual_seed(0)
    pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    latents = parts.to_latents(pixels, random)[None]
    noise = torch.randn(latents.shape, generator=random)
    before, words = predict(base, latents, noise), predict(full, latents, noise)
    with models.applied(pipeline, lora, 1.0):
        seen = maps.explain(pipeline, image, full, HAIR[0], timesteps=(400,), kinds=("soft",), draws=1)
        unasked = maps.unasked(pipeline, image, base, timesteps=(400, 400), draws=1)
        base_with, full_with = predict(base, latents, noise), predict(full, latents, noise)
    assert np.array_equal(predict(base, latents, noise), before)

    def drift(eps: Any, region: Any = 1.0) -> float:
        return float((region * (eps - before) ** 2).sum() / (region * before**2).sum())

    found, control = seen.drift[400], seen.control["soft"][400].astype(np.float64)
    assert found.base_prompt == pytest.approx(drift(base_with), rel=1e-3)
    assert unasked == pytest.approx(drift(base_with), rel=1e-3)
    assert found.full_prompt == pytest.approx(drift(full_with), rel=1e-3)
    assert found.words == pytest.approx(drift(words), rel=1e-3)
    assert found.inside == pytest.approx(drift(full_with, control), rel=1e-3)
    assert found.outside == pytest.approx(drift(full_with, 1 - control), rel=1e-3)
    assert found.map_mean == pytest.approx(control.mean(), rel=1e-4)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny SDXL and a LoRA of it."""
    root = tmp_path_factory.mktemp("xl")
    model, images = tiny.sdxl(root / "sdxl"), tiny.images(root / "images")
    run = Settings(str(model), images, root / "xl.safetensors", None, steps=1, rank=2, learning_rate=1e-2)
    return model, train(run).path


def test_sdxl_with_given_prompts(xl: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = xl
    monkeypatch.setitem(sys.modules, "lpips", None)
    listed = tmp_path / "prompts.txt"
    listed.write_text(f"# two\n{PROMPTS[1]}\n", encoding="utf-8")
    held = tmp_path / "held.txt"
    held.write_text("a haired beast\n# none\na chair\n", encoding="utf-8")
    done = spf(
        "--model", model, "--lora", lora, "--target", "blonde hair", "--prompt", PROMPTS[0], "--prompts", listed,
        "--out", tmp_path / "out", "--steps", 1, "--seeds", 0, "--size", 64, "--lpips", "alex",
        "--held-out", held,
    )  # fmt: skip
    assert done.exit_code == 0, done.output + repr(done.exception)
    text = check(tmp_path / "out")
    assert "SDXL" in text
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["prompts"] == [
        {"base": PROMPTS[0], "full": f"{PROMPTS[0]}, blonde hair"},
        {"base": "a man, forest", "full": PROMPTS[1]},
    ]
    assert {"CLIP-I, CLIP-T, KID, FID", "face identity", "segmentation consistency"} <= numbers["not_measured"].keys()
    # Its library is not here: said aloud, with the remedy.
    assert "pip install" in numbers["not_measured"]["LPIPS"]
    assert "LPIPS is not measured" in " ".join(done.output.split())
    assert len(list((tmp_path / "out" / "images").glob("prompt*.png"))) == 8
    # A user's own prompts are all asked, and the page says which of them say a word of the target.
    assert [one["prompt"] for one in numbers["held_out"]["prompts"]] == ["a haired beast", "a chair"]
    assert "Not quite unrelated, and counted: “a haired beast” says “haired”." in text
    assert f"--held-out {held}" in text


def test_sd2_in_half_precision(tmp_path: Path) -> None:
    """v-prediction, linear projections and bfloat16."""
    model, images = tiny.sd21(tmp_path / "sd21"), tiny.images(tmp_path / "images")
    run = Settings(str(model), images, tmp_path / "two.safetensors", None, steps=1, rank=2, learning_rate=1e-2)
    lora, numbers = train(run).path, {}
    for precision in ("bf16", "fp32"):
        out = tmp_path / precision
        done = spf(
            "--model", model, "--lora", lora, "--target", "blonde hair", "--prompt", PROMPTS[0],
            "--out", out, "--steps", 1, "--seeds", 0, "--size", 64, "--dtype", precision, "--held-out", 1,
        )  # fmt: skip
        assert done.exit_code == 0, done.output + repr(done.exception)
        text = check(out)
        assert "SD 2.x, predicts v prediction" in text
        assert f"64 pixels, {'bfloat16' if precision == 'bf16' else 'float32'}" in text
        numbers[precision] = json.loads((out / "numbers.json").read_text(encoding="utf-8"))["rows"]
    for key, row in numbers["fp32"].items():
        for half, full in zip(numbers["bf16"][key]["values"], row["values"], strict=True):
            assert (half is None) == (full is None), key
            assert half is None or half == pytest.approx(full, rel=0.3, abs=0.02), key
    assert numbers["fp32"]["drift_base_prompt"]["values"][1] > 1e-4


def test_a_single_file_is_the_same_model(tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint in the original format gives the numbers of the folder it was made from."""
    from diffusers.loaders import single_file as loading

    model, images = tiny_sd15, tiny.images(tmp_path / "images")
    file = single_file.write(model, tmp_path / "all-in-one.safetensors")
    asked: list[str] = []

    def configuration(name: str, **_: Any) -> str:  # diffusers fetches it from the hub; the weights are the file's own
        asked.append(name)
        return str(bare)

    bare = tmp_path / "configuration"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(loading, "_download_diffusers_model_config_from_hub", configuration)
    lora = train(Settings(str(file), images, tmp_path / "one.safetensors", None, steps=1, rank=2, learning_rate=1e-2))
    numbers = {}
    for source in (model, file):
        out = tmp_path / f"report-{source.stem}"
        # Of 64 px the map leaves hardly any place outside, and a drift there is mostly rounding.
        done = spf(
            "--model", source, "--lora", lora.path, "--target", "blonde hair", "--prompt", PROMPTS[0], "--out", out,
            "--steps", 1, "--seeds", 0, "--size", 128, "--held-out", 0,
        )  # fmt: skip
        assert done.exit_code == 0, done.output + repr(done.exception)
        assert "What nobody trained" not in check(out)
        numbers[source] = json.loads((out / "numbers.json").read_text(encoding="utf-8"))
    assert set(asked) == {"stable-diffusion-v1-5/stable-diffusion-v1-5"}
    assert numbers[file]["hashes"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert numbers[file]["rows"]["drift_base_prompt"]["values"][1] > 1e-4
    for key, row in numbers[model]["rows"].items():
        values = [value for value in row["values"] if value is not None]
        of_file = [value for value in numbers[file]["rows"][key]["values"] if value is not None]
        assert of_file == pytest.approx(values, rel=1e-4, abs=1e-6), key


def test_a_lora_of_another_family(xl: tuple[Path, Path], lora: Path, tmp_path: Path) -> None:
    done = spf("--model", xl[0], "--lora", lora, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "was trained for SD 1.x, and --model is SDXL" in " ".join(done.output.split())


def test_mistakes_give_one_sentence(lora: Path, tmp_path: Path) -> None:
    plain, missing = lora.with_name("plain.safetensors"), tmp_path / "none"
    empty, ansi, file = tmp_path / "empty.txt", tmp_path / "ansi.txt", tmp_path / "file"
    empty.write_text("# nothing\n\n", encoding="utf-8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    (broken / "a.txt").write_text("a hat", encoding="utf-8")
    ansi.write_bytes("caf\xe9".encode("latin-1"))
    file.write_text("x", encoding="utf-8")
    for words, said in (
        (["--lora", missing], "there is no such file"),
        (["--lora", plain], "does not say what it was taught"),
        (["--lora", lora, "--model", missing], "there is no such file or folder"),
        (["--lora", lora, "--target", "|"], "has an empty target phrase"),
        (["--lora", lora, "--prompts", missing], "cannot be read"),
        (["--lora", lora, "--prompts", empty], "holds no prompt"),
        (["--lora", lora, "--prompts", ansi], "is not UTF-8"),
        (["--lora", lora, "--seeds", "a"], "write whole numbers"),
        (["--lora", lora, "--held-out", "many"], "no number of prompts, and no file"),
        (["--lora", lora, "--held-out", "-1"], "no number of prompts, and no file"),
        (["--lora", lora, "--held-out", "1000"], "the bank has 48 prompts"),
        (["--lora", lora, "--held-out", empty], "--held-out"),
        (["--lora", lora, "--size", "130"], "must be a multiple of 8"),
        (["--lora", lora, "--dtype", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--lora", lora, "--out", file], "is a file"),
        (["--lora", lora, "--faces", missing], "no file named face_detection_yunet"),
        (["--lora", lora, "--segmentation", missing], SEGMENTATION),
        (["--lora", lora, "--dino", missing], "not a DINOv2 of transformers"),
        (["--lora", lora, "--subject", missing], "--subject"),
        (["--lora", lora, "--subject", broken], "cannot be read as an image"),
        (["--lora", lora, "--target-class", "hair"], "Give the model with --segmentation"),
    ):
        done = spf("--model", MODEL, "--out", tmp_path / "out", *words)
        assert done.exit_code == 2, (words, done.output, done.exception)
        assert said in " ".join(done.output.split()), words
        assert "Traceback" not in done.output
    assert not list((tmp_path / "out").rglob("*.html"))


def test_ctrl_c_and_a_missing_library(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", stop)
        done = spf("--model", MODEL, "--lora", lora, "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert "no report was written" in done.output
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        done = spf("--model", MODEL, "--lora", lora, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert 'spf report needs matplotlib: pip install "spf-plugin[report]"' in " ".join(done.output.split())

    def placeholder(*_: Any) -> None:  # what transformers and diffusers raise where they miss something
        raise ImportError("\nReader requires the Torchvision library but it was not found. Check out\nthe page")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", placeholder)
        done = spf("--model", MODEL, "--lora", lora, "--out", tmp_path / "out")
    assert done.exit_code == 2
    said = 'Reader requires the Torchvision library but it was not found: pip install "spf-plugin[report]"'
    assert said in " ".join(done.output.split())


def test_a_diffusers_that_does_not_know_the_text_encoders_names(lora: Path) -> None:
    """0.40 beside transformers 5.6 and later, where it ends with a bare IndexError."""

    def load(*_: Any, **__: Any) -> None:
        raise IndexError("list index out of range")

    pipeline = SimpleNamespace(load_lora_weights=load)
    with pytest.raises(SPFError, match="has a text encoder's part"), models.applied(pipeline, lora, 1.0):
        pass


def test_prompts_from_metadata() -> None:
    counts = {"blonde hair": 9, "a woman": 7, "street": 2, "a girl with blonde hair in a red coat": 1}
    assert prompts.from_tags(counts, HAIR, 4) == ["a girl with blonde hair in a red coat"]
    del counts["a girl with blonde hair in a red coat"]
    assert prompts.from_tags(counts, HAIR, 4) == ["a woman", "a woman, street"]
    assert prompts.from_tags({}, HAIR, 4) == []
    datasets = [{"tag_frequency": {"1_x": {"(a woman:1.2)": 2}}}, {"tag_frequency": {"2_x": {"a woman": 1}}}]
    assert prompts.tag_counts({"ss_datasets": json.dumps(datasets)}) == Counter({"a woman": 3})
    assert prompts.tag_counts({"ss_tag_frequency": "not json"}) == Counter()
    two = (Target("hat"), Target("dress", "T-shirt"))
    asked = prompts.questions(["a man", "a woman", "a hat, a man", "a man"], two)
    assert [(q.base, q.full, q.target) for q in asked[:2]] == [
        ("a man", "a man, hat", two[0]),
        ("a woman, T-shirt", "a woman, dress", two[1]),
    ]
    assert asked[2].base == "a man"
    assert asked[2].target == two[0]
    assert prompts.targets({"modelspec.trigger_phrase": "ohwx"}, None, "x") == (Target("ohwx"),)
    assert prompts.map_settings({"ss_network_args": json.dumps({"spf_map": "nonsense"})}).map == "soft"
    with pytest.raises(SPFError, match="Give --target"):
        prompts.targets({}, None, "x.safetensors")


def test_large_pictures_are_smaller_on_the_page() -> None:
    image = np.zeros((600, 800, 3), np.uint8)
    source = page.data_uri(image)
    assert source.startswith("data:image/jpeg")
    assert max(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size) == page.SHOWN_SIDE
    assert pixel_change(image, image + 51) == pytest.approx(0.2)


def test_licences(tmp_path: Path) -> None:
    assert metrics.clip_licence("ViT-B-32:laion2b_s34b_b79k") == "MIT"
    assert metrics.clip_licence("ViT-B-32:metaclip_400m").startswith("not recorded")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert metrics.clip_licence(str(tmp_path)) == "apache-2.0"


def test_importing_it_is_light() -> None:
    code = (
        "import sys, spf_plugin.tools.report.content, spf_plugin.tools.report.prompts\n"
        "heavy = {'matplotlib', 'diffusers', 'typer', 'jinja2', 'transformers', 'torchvision', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=MODEL.parents[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not (os.environ.get("SPF_CHROMIUM") and shutil.which(os.environ["SPF_CHROMIUM"])),
    reason="BROWSER NOT TESTED: set SPF_CHROMIUM to a Chromium to load the page in a real browser",
)
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_real_browser(made: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """Every picture is decoded, nothing is wider than the window, text stands out from the page; the console stays
    empty."""
    probe = (
        "<script>addEventListener('load',()=>{const w=document.documentElement.scrollWidth;"
        "const broken=[...document.images].filter(i=>!i.naturalWidth).length;"
        "const s=getComputedStyle(document.body);const sum=c=>c.match(/\\d+/g).slice(0,3).reduce((a,b)=>a+ +b,0);"
        "document.title=`probe ${innerWidth} ${w} ${broken} ${sum(s.color)} ${sum(s.backgroundColor)}`})"
        "</script></body>"
    )
    text = (made / "report.html").read_text(encoding="utf-8").replace("</body>", probe)
    framed = tmp_path / "framed.html"
    framed.write_text(text, encoding="utf-8")
    # A window cannot be made as narrow as a phone; a frame can.
    inner = f"<iframe id=f src=framed.html style='width:{width}px;height:800px;border:0'></iframe>"
    report = "<script>addEventListener('load',()=>{document.title=f.contentDocument.title})</script>"
    (tmp_path / "outer.html").write_text(f"<!doctype html>{inner}{report}", encoding="utf-8")
    words = [
        os.environ["SPF_CHROMIUM"],
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
    ]
    words += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]  # Chromium's own numbers
    words += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--window-size=1400,900", "--dump-dom"]
    done = subprocess.run([*words, (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>probe (\d+) (\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    inner_width, content_width, broken, ink, paper = map(int, found.groups())
    assert (ink > paper + 300) if scheme == "dark" else (paper > ink + 300)
    assert inner_width == width
    assert content_width <= width
    assert broken == 0
    assert "CONSOLE" not in done.stderr
