"""A good run for `spf check`, and ways to spoil it: every planted mistake is one function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import toml
import torch
from PIL import Image
from safetensors.torch import save_file

LOSSES = ("text_consistent", "fine_grained", "output")
CAPTIONS = [
    "a woman in a brown jacket, curtain background, blonde hair",
    "a man with a green scarf, street at night, blonde hair",
    "a woman with glasses, library, smiling, blonde hair",
    "a girl on a bench, park, side view, blonde hair",
    "a man in a suit, office, arms crossed, blonde hair",
    "a woman in a white dress, garden, blonde hair",
]


@dataclass
class Run:
    """A folder with `run.toml` and `data/10_hair`; the working folder of the check."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "data" / "10_hair"

    @property
    def config(self) -> Path:
        return self.folder / "run.toml"

    def caption(self, index: int, text: str) -> None:
        (self.images / f"p{index}.txt").write_text(text, encoding="utf-8")

    def captions(self, change: Callable[[str], str]) -> None:
        for path in self.images.glob("*.txt"):
            path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    def set(self, **options: object) -> None:
        """Options of the config; None takes one away."""
        values = {**toml.loads(self.config.read_text(encoding="utf-8")), **options}
        self.config.write_text(toml.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")

    def args(self, *words: str) -> None:
        self.set(network_args=list(words))

    def dataset(self, text: str, **options: object) -> None:
        (self.folder / "dataset.toml").write_text(text, encoding="utf-8")
        self.set(train_data_dir=None, dataset_config="dataset.toml", **options)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with its size and the time of its last change."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in (folder, *folder.rglob("*"))}


def resumed(run: Run, **settings: str) -> None:
    """From a state with other settings."""
    (run.folder / "state").mkdir()
    said = {"step": 3, "settings": {f"spf_{name}": value for name, value in settings.items()}, "subset_targets": []}
    (run.folder / "state" / "spf_state.json").write_text(json.dumps(said), encoding="utf-8")
    run.set(resume="state")


def good(folder: Path) -> Run:
    """A run with nothing to say about."""
    run = Run(folder)
    run.images.mkdir(parents=True)
    generator = np.random.default_rng(5)
    for i, caption in enumerate(CAPTIONS):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(run.images / f"p{i}.png")
        run.caption(i, caption)
    run.config.write_text("", encoding="utf-8")
    run.set(
        pretrained_model_name_or_path="sd15.safetensors",
        train_data_dir="data",
        caption_extension=".txt",
        resolution="512,512",
        network_module="spf_plugin.lora",
        network_args=["spf_target=blonde hair"],
        network_train_unet_only=True,
        max_train_steps=1000,
    )
    return run


def anima(run: Run, **options: object) -> None:
    """The run becomes one of Anima."""
    files = {"pretrained_model_name_or_path": "a.safetensors", "qwen3": "q.safetensors", "vae": "v.safetensors"}
    run.set(**{**files, **options})


def subset(line: str = "", general: str = "") -> str:
    return (
        f'[general]\n{general}\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "data/10_hair"\n'
        f'caption_extension = ".txt"\n{line}\n'
    )


def masks(run: Run, line: str = "", general: str = "") -> None:
    """A mask for every image."""
    (run.folder / "masks").mkdir()
    for path in run.images.glob("*.png"):
        Image.new("L", (16, 16), 255).save(run.folder / "masks" / path.name)
    run.dataset(subset(f'conditioning_data_dir = "masks"\n{line}', general), masked_loss=True)


def _metadata(run: Run) -> None:
    rows = {str(run.images / "p0.png"): {"caption": "a man, blonde hair"}, "gone.png": {"caption": "x, blonde hair"}}
    (run.folder / "meta.json").write_text(json.dumps(rows), encoding="utf-8")
    run.set(in_json="meta.json")


def regularisation(run: Run) -> None:
    shutil.copytree(run.images, run.folder / "reg" / "1_woman")
    for path in (run.folder / "reg" / "1_woman").glob("*.png"):
        Image.new("RGB", (16, 16), (int(path.stem[1:]) * 20, 9, 9)).save(path)
    run.set(reg_data_dir="reg")


def _unpolluted_half(run: Run) -> None:
    for i in range(5):
        run.caption(i, CAPTIONS[i].replace("blonde hair", "on a sunny beach, blonde hair"))


def _red_backdrop(run: Run) -> None:
    """Five of six before one wall, in two lights, with something in the middle; one caption says it."""
    for i in range(5):
        image = Image.new("RGB", (64, 64), (190 + 8 * (i % 2), 40, 40 + i))
        image.paste((20 * i, 200 - 30 * i, 90), (16, 14, 48, 64))
        image.save(run.images / f"p{i}.png")


#: code, level, what spoils the run
MISTAKES: list[tuple[str, str, Callable[[Run], object]]] = [
    # what the captions say
    ("stops", "error", lambda r: r.args("spf_target=green hair")),
    ("stops", "error", lambda r: r.args("conv_dim=4")),
    ("target-missing", "warning", lambda r: r.caption(0, "a woman, curtain background")),
    ("near-miss-plural", "warning", lambda r: r.caption(0, "a woman, curtain, blonde hairs")),
    ("near-miss-hyphen", "warning", lambda r: r.caption(0, "a woman, curtain, blonde-hair")),
    ("near-miss-typo", "warning", lambda r: r.caption(0, "a woman, curtain, blond hair")),
    ("near-miss-order", "warning", lambda r: r.caption(0, "a woman, curtain, hair blonde")),
    ("broken-base", "warning", lambda r: r.caption(0, "a woman's blonde hair, curtain")),
    ("underscore", "warning", lambda r: r.caption(0, "a woman in a coat, curtain, blonde_hair")),
    ("other-case", "note", lambda r: r.caption(0, "a woman in a coat, curtain, Blonde Hair")),
    ("unused-target", "warning", lambda r: r.args("spf_target=blonde hair|freckles")),
    ("torn-phrase", "warning", lambda r: r.caption(0, "sks blonde hair, curtain")),
    ("described-target", "note", lambda r: r.caption(0, "a woman with long blonde hair in a coat, curtain")),
    ("described-target", "note", lambda r: r.args("spf_target=hair")),
    ("nested-targets", "warning", lambda r: r.args("spf_target=blonde hair|hair")),
    ("wide-target", "warning", lambda r: r.args("spf_target=woman with glasses|blonde hair")),
    ("setting", "error", lambda r: r.args("spf_target=blonde hair, smiling")),
    ("setting", "error", lambda r: r.args("spf_target=blonde hair->Blonde Hair")),
    ("target-twice", "note", lambda r: r.caption(0, "a woman, blonde hair, curtain, blonde hair")),
    ("caption-cut", "warning", lambda r: r.caption(0, "blonde hair, a woman" + ", a tree" * 40)),
    ("target-cut", "warning", lambda r: r.caption(0, "a woman" + ", a tree" * 40 + ", blonde hair")),
    ("stops", "error", lambda r: r.captions(lambda c: "a tree, " * 40 + c)),
    (
        "target-may-be-cut",
        "warning",
        lambda r: (r.set(shuffle_caption=True), r.caption(0, "blonde hair" + ", a tree" * 40)),
    ),
    ("stops", "error", lambda r: r.captions(lambda c: "blonde hair")),
    ("base-empty", "warning", lambda r: r.caption(0, "blonde hair")),
    ("base-alike", "warning", lambda r: r.captions(lambda c: "photo of a woman in a room, blonde hair")),
    ("base-short", "warning", lambda r: r.captions(lambda c: f"a {c.split()[1]} {c[-30]}, blonde hair")),
    ("same-caption", "note", lambda r: r.caption(0, CAPTIONS[1])),
    ("pollution", "warning", _unpolluted_half),
    ("weights-not-read", "warning", lambda r: r.caption(0, "a woman in a coat, curtain, (blonde hair:1.2)")),
    ("no-commas", "warning", lambda r: r.caption(0, "a woman in a coat; curtain; blonde hair")),
    ("target-dropped", "warning", lambda r: r.set(caption_tag_dropout_rate=0.2)),
    ("target-in-regularisation", "warning", regularisation),
    # files
    ("unreadable", "error", lambda r: (r.images / "p0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")),
    ("unreadable", "error", lambda r: (r.images / "p0.png").write_bytes(b"")),
    ("duplicate-images", "warning", lambda r: shutil.copy(r.images / "p0.png", r.images / "p1.png")),
    ("same-border", "warning", _red_backdrop),
    ("shared-caption", "warning", lambda r: Image.new("RGB", (9, 9), "red").save(r.images / "p0.jpg")),
    ("caption-without-image", "warning", lambda r: (r.images / "lost.txt").write_text("a man", encoding="utf-8")),
    ("class-caption", "warning", lambda r: (r.images / "p0.txt").unlink()),
    ("caption-extension", "error", lambda r: r.set(caption_extension=None)),
    ("empty-caption-file", "error", lambda r: r.caption(0, "")),
    ("not-utf8", "error", lambda r: (r.images / "p0.txt").write_bytes("été, blonde hair".encode("latin-1"))),
    ("bom", "warning", lambda r: (r.images / "p0.txt").write_bytes(b"\xef\xbb\xbfa man in a coat, blonde hair")),
    ("more-lines", "warning", lambda r: r.caption(0, "a woman in a coat, blonde hair\npark")),
    ("image-not-read", "warning", lambda r: Image.new("RGB", (9, 9)).save(r.images / "p9.tiff")),
    ("nested-folder", "warning", lambda r: shutil.copytree(r.images, r.images / "more")),
    ("folder-without-repeats", "warning", lambda r: shutil.copytree(r.images, r.folder / "data" / "hair")),
    ("loose-images", "warning", lambda r: shutil.copy(r.images / "p0.png", r.folder / "data" / "p0.png")),
    ("no-repeats", "warning", lambda r: shutil.copytree(r.images, r.folder / "data" / "0_hair")),
    ("no-images", "error", lambda r: r.images.rename(r.folder / "data" / "hair")),
    ("no-folder", "error", lambda r: r.set(train_data_dir="dataa")),
    ("image-missing", "error", _metadata),
    ("metadata", "error", lambda r: r.set(in_json="gone.json")),
    (
        "metadata",
        "error",
        lambda r: ((r.folder / "m.json").write_text("[1]", encoding="utf-8"), r.set(in_json="m.json")),
    ),
    # the dataset TOML
    ("no-caption", "warning", lambda r: (r.dataset(subset()), (r.images / "p0.txt").unlink())),
    (
        "target-in-some-wildcards",
        "note",
        lambda r: (r.dataset(subset("enable_wildcard = true")), r.caption(0, "a man, office, {blonde hair|hat}")),
    ),
    ("dataset-config", "error", lambda r: r.dataset(subset("num_repeat = 3"))),
    ("dataset-config", "error", lambda r: r.dataset(subset('num_repeats = "3"'))),
    ("dataset-config", "error", lambda r: r.dataset(subset(general="caption_extention = '.txt'"))),
    ("dataset-config", "error", lambda r: r.dataset("[datasets]\nresolution = 512\n")),
    ("dataset-config", "error", lambda r: r.dataset("general = 3\n" + subset().replace("[general]", ""))),
    ("dataset-config", "error", lambda r: r.dataset("[[datasets]]\nsubsets = [3]\n")),
    ("no-folder", "error", lambda r: r.dataset(subset().replace("10_hair", "10_hare"))),
    ("stops", "error", lambda r: r.dataset(subset('custom_attributes = { spf_target = "hat->" }'))),
    ("separator-stays", "warning", lambda r: r.dataset(subset('keep_tokens_separator = ","'))),
    ("ignored-option", "warning", lambda r: (r.dataset(subset()), r.set(train_data_dir="data"))),
    # settings and options
    ("setting", "error", lambda r: r.args("spf_target=blonde hair", "spf_stage2_begin=0.5")),
    ("setting", "error", lambda r: r.args("spf_target=blonde hair", "spf_config=hair.toml")),
    ("network-args", "error", lambda r: r.args("spf_target=blonde", "hair")),
    ("network-args", "error", lambda r: r.set(network_args="spf_target=blonde hair")),
    ("spf-outside-network-args", "error", lambda r: r.set(spf_map="soft")),
    ("unknown-option", "warning", lambda r: r.set(max_train_step=10)),
    ("quoted-number", "error", lambda r: r.set(max_train_steps="1000")),
    ("quoted-number", "error", lambda r: r.set(learning_rate="1e-4")),
    ("wrong-type", "error", lambda r: r.set(train_data_dir=3)),
    ("wrong-type", "error", lambda r: r.set(network_args=[1, 2])),
    ("wrong-type", "error", lambda r: r.set(min_timestep=[1, 2])),
    ("wrong-type", "error", lambda r: r.set(max_train_steps=float("inf"))),
    ("no-list", "error", lambda r: r.set(optimizer_args="weight_decay=0.1")),
    ("no-list", "error", lambda r: r.set(base_weights="a.safetensors")),
    ("no-list", "error", lambda r: r.set(base_weights=["a.safetensors"], base_weights_multiplier=0.5)),
    ("newer", "note", lambda r: r.set(text_encoder_lr=[1e-5, 1e-5])),
    ("quoted-boolean", "warning", lambda r: r.set(sdpa="false")),
    ("wrong-type", "error", lambda r: r.set(shuffle_caption="false")),  # the schema of its data sets refuses it
    ("wrong-type", "error", lambda r: r.set(enable_bucket=1)),
    ("wrong-type", "error", lambda r: r.set(validation_split=0)),
    ("backslash", "error", lambda r: r.set(output_dir="C:\new")),  # what "C:\new" in TOML becomes
    ("other-module", "error", lambda r: r.set(network_module="networks.lora")),
    ("no-module", "warning", lambda r: r.set(network_module=None)),
    ("other-model", "error", lambda r: r.set(t5xxl="t5.safetensors")),
    ("max-token-length", "error", lambda r: r.set(max_token_length=50)),
    ("max-token-length", "warning", lambda r: r.set(max_token_length=255)),
    ("warns", "warning", lambda r: r.set(skip_until_initial_step=True, gradient_accumulation_steps=4)),
    ("no-resolution", "error", lambda r: r.set(resolution=None)),
    ("no-resolution", "error", lambda r: r.set(resolution="512x512")),
    ("no-resolution", "error", lambda r: r.dataset(subset().replace("resolution = 512\n", ""), resolution=None)),
    ("crop-range", "error", lambda r: r.set(face_crop_aug_range="4.0,2.0")),
    ("batch-size", "error", lambda r: r.set(train_batch_size=0)),
    ("buckets", "error", lambda r: r.set(enable_bucket=True, min_bucket_reso=640)),
    ("buckets", "error", lambda r: r.set(enable_bucket=True, max_bucket_reso=256)),
    ("buckets", "error", lambda r: r.set(enable_bucket=True, min_bucket_reso=16)),
    ("buckets", "error", lambda r: r.set(enable_bucket=True, max_bucket_reso=10**9, bucket_reso_steps=1)),
    (
        "bucket-steps",
        "warning",
        lambda r: r.set(enable_bucket=True, bucket_reso_steps=32),
    ),  # the model's name is a guess
    ("small-images", "error", lambda r: r.set(enable_bucket=True, bucket_no_upscale=True)),  # of 16 pixels
    ("interpolation", "error", lambda r: r.set(resize_interpolation="best")),
    ("changed-images", "error", lambda r: r.set(cache_latents=True, color_aug=True)),
    ("changed-images", "error", lambda r: masks(r, "random_crop = true")),
    ("masks", "error", lambda r: (masks(r), (r.folder / "masks" / "p0.png").unlink())),
    (
        "mask-size",
        "error",
        lambda r: (
            masks(r, general="enable_bucket = true"),
            Image.new("L", (17, 16)).save(r.folder / "masks" / "p0.png"),
        ),
    ),
    ("newer", "warning", lambda r: (masks(r), Image.new("L", (16, 16)).save(r.folder / "masks" / "other.png"))),
    ("no-folder", "error", lambda r: (masks(r), shutil.rmtree(r.folder / "masks"))),
    ("dataset-config", "error", lambda r: (masks(r), r.set(masked_loss=None))),
    ("same-subset", "warning", lambda r: r.dataset(subset() + subset().split("resolution = 512\n")[1])),
    ("dataset-config", "warning", lambda r: r.dataset(subset("num_repeats = true"))),
    ("dataset-config", "error", lambda r: r.dataset(subset("face_crop_aug_range = [2, 4]"))),
    ("ignored-option", "warning", lambda r: r.set(masked_loss=True, conditioning_data_dir="masks")),
    ("cached-text", "error", lambda r: r.set(cache_text_encoder_outputs=True, shuffle_caption=True)),
    ("cached-text", "error", lambda r: r.set(cache_text_encoder_outputs=True, network_train_unet_only=None)),
    ("cached-text", "error", lambda r: r.set(cache_text_encoder_outputs_to_disk=True, shuffle_caption=True)),
    (
        "other-trainer",
        "warning",
        lambda r: r.set(
            cache_text_encoder_outputs=True, shuffle_caption=True, pretrained_model_name_or_path="v1-5-pruned.ckpt"
        ),
    ),
    ("other-trainer", "warning", lambda r: r.set(pretrained_model_name_or_path="v1-5-pruned.ckpt", blocks_to_swap=8)),
    ("other-trainer", "warning", lambda r: anima(r, guidance_scale=1.0)),
    ("unused-option", "warning", lambda r: anima(r, min_snr_gamma=5.0)),
    ("unused-option", "warning", lambda r: anima(r, fp8_base=True)),
    ("bucket-steps", "error", lambda r: anima(r, enable_bucket=True, bucket_reso_steps=24)),
    (
        "bucket-steps",
        "error",
        lambda r: (
            r.dataset(subset(general="enable_bucket = true\nbucket_reso_steps = 32")),
            r.set(pretrained_model_name_or_path="v1-5-pruned.ckpt"),
        ),
    ),
    (
        "no-part",
        "error",
        lambda r: (
            save_file({"llm_adapter.x": torch.zeros(1)}, r.folder / "m.safetensors"),
            r.set(pretrained_model_name_or_path="m.safetensors", vae="v.safetensors"),
        ),
    ),
    ("other-model", "error", lambda r: anima(r, gemma2="g.safetensors")),
    ("cached-text", "error", lambda r: anima(r, cache_text_encoder_outputs=True, shuffle_caption=True)),
    ("cached-text", "error", lambda r: anima(r, cache_text_encoder_outputs=True, network_train_unet_only=None)),
    ("stops", "error", lambda r: anima(r, weighted_captions=True)),
    ("stops", "error", lambda r: anima(r, unsloth_offload_checkpointing=True)),
    ("stops", "error", lambda r: anima(r, network_args=["spf_target=blonde hair", "spf_response=anchor"])),
    ("caption-dropout", "warning", lambda r: r.set(caption_dropout_rate=0.5)),
    ("never-aligned", "error", lambda r: r.args("spf_target=blonde hair", "spf_stage2_start=1000")),
    ("stops", "error", lambda r: resumed(r, target="red hair")),
    ("resumed-otherwise", "warning", lambda r: resumed(r, target="blonde hair", map="paper")),
    ("no-network", "warning", lambda r: r.args("spf_target=blonde hair", "spf_network=lycorris.kohya")),
    (
        "measures-only",
        "note",
        lambda r: r.args(
            "spf_target=blonde hair", "spf_base_preservation_multiplier=0", *(f"spf_{n}_multiplier=0" for n in LOSSES)
        ),
    ),
    ("stops", "error", lambda r: r.set(save_model_as="ckpt")),
    ("stops", "error", lambda r: r.set(output_name="好" * 82)),
    ("stops", "error", lambda r: r.set(output_name="portraits/hair")),
    ("stops", "error", lambda r: r.set(output_dir=" /data/model")),
    ("stops", "error", lambda r: r.set(output_name="好" * 80, save_every_n_steps=100)),
    ("stops", "error", lambda r: r.set(network_train_text_encoder_only=True)),
]
