"""Many small data sets, good and bad, as users write them: what `spf check` makes of them is compared with the host."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toml
from PIL import Image

COUNT = 400
SEED = 20261129
SIZES = [(64, 64), (96, 64), (64, 128), (200, 130), (40, 200), (300, 300), (30, 30), (257, 63), (128, 512)]
ENDINGS = [".png", ".jpg", ".webp", ".PNG", ".bmp", ".Png", ".gif"]
CAPTIONS = ["a man, blonde hair", "blonde hair, {park|street|sea}", "a woman\na second line", "", "\n", "été, hat"]


@dataclass
class DataSet:
    """One run: the options of its `--config_file`, and whether SDXL's script trains it."""

    config: Path
    options: dict[str, Any] = field(default_factory=dict)
    sdxl: bool = False

    def write(self, general: dict[str, Any], datasets: list[Any], more: dict[str, Any], *, as_json: bool) -> None:
        content = {**({"general": general} if general else {}), "datasets": datasets, **more}
        path = self.config.with_name(self.config.stem + ("-data.json" if as_json else "-data.toml"))
        path.write_text(json.dumps(content) if as_json else toml.dumps(content), encoding="utf-8")
        self.options["dataset_config"] = str(path)

    def finish(self) -> None:
        self.config.write_text(toml.dumps(self.options), encoding="utf-8")


class Maker:
    """Makes data sets from one pool of folders, masks and metadata files."""

    def __init__(self, root: Path, seed: int = SEED) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.folders = [self._folder(root / "pool" / f"f{i}") for i in range(14)]
        self.masks = {folder: self._masks(folder) for folder in self.folders}
        self.metadata = [self._metadata(i) for i in range(12)]
        self.parents = [self._parent(i) for i in range(8)]

    def maybe(self, chance: float, make: Callable[[], Any], else_: Any = None) -> Any:
        return make() if self.random.random() < chance else else_

    def _folder(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for i in range(self.random.choice([0, 1, 2, 3, 3, 4, 4, 5, 6])):
            path = folder / f"p{i}{self.random.choices(ENDINGS, [9, 3, 2, 2, 1, 1, 1])[0]}"
            grey = self.random.randrange(256)
            Image.new("L", self.random.choice(SIZES), grey).save(path, format=_format(path))
            if self.random.random() < 0.8:
                text = self.random.choices(CAPTIONS, [60, 20, 20, 1, 6, 10])[0]
                path.with_suffix(self.random.choice([".txt", ".txt", ".txt", ".caption"])).write_text(text, "utf-8")
        return folder

    def _masks(self, folder: Path) -> list[Path]:
        """Complete ones, and ones with a mask too few or too many."""
        made = []
        for kind in ("all", "fewer", "more"):
            masks = self.root / "pool" / f"{folder.name}-{kind}"
            masks.mkdir()
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in (".png", ".jpg", ".webp", ".bmp") and path.suffix != ".Png":
                    with Image.open(path) as image:
                        Image.new("L", image.size, 255).save(masks / f"{path.stem}.png")
            own = sorted(masks.iterdir())
            if kind == "fewer" and own:
                own[0].unlink()
            if kind == "more":
                Image.new("L", (64, 64)).save(masks / "other.png")
            made.append(masks)
        return made

    def _metadata(self, number: int) -> tuple[Path, Path | None]:
        """A metadata file and the folder that its names are of."""
        folder = self.random.choice(self.folders)
        rows: dict[str, Any] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix in (".txt", ".caption"):
                continue
            name = self.random.choices([path.name, path.stem, str(path)], [6, 1, 2])[0]
            rows[name] = self.random.choice(
                [{"caption": "a man, hat"}, {"tags": "1boy, hat"}, {"caption": "a", "tags": "b"}]
            )
        if self.random.random() < 0.15:
            rows["gone.png"] = {"caption": "lost"}
        path = self.root / "pool" / f"m{number}.json"
        if number % 4 == 3:
            path = path.with_suffix(".jsonl")
            lines = [json.dumps({"image_path": key, **row}) for key, row in rows.items()]
            path.write_text(self.random.choice(["\n"] * 4 + ["\n\n"]).join(lines) + "\n", "utf-8")
        else:
            path.write_text(self.random.choices([json.dumps(rows), "[1]", "{"], [12, 1, 1])[0], "utf-8")
        return path, self.random.choices([folder, None], [9, 1])[0]

    def _parent(self, number: int) -> Path:
        """A folder of folders with repeats, as train_data_dir is."""
        parent = self.root / f"parent{number}"
        for i in range(self.random.choice([0, 2, 3, 4])):
            source = self.random.choice(self.folders)
            name = self.random.choice(["2_hair", "1_woman hat", "3", "hair", "0_none", "x_2", "4_"])
            target = parent / f"{name}" if not (parent / name).exists() else parent / f"{i}_more"
            target.mkdir(parents=True)
            for path in source.iterdir():
                (target / path.name).write_bytes(path.read_bytes())
        parent.mkdir(exist_ok=True)
        return parent

    # -- one data set -------------------------------------------------------------------------------------------------

    def _size(self) -> Any:
        return self.random.choices([64, 128, [128, 192], 256, [64], [128, 192, 64], "128,128", 0, True, 128.0],
                                   [30, 30, 20, 20, 1, 1, 1, 1, 1, 1])[0]  # fmt: skip

    def _buckets(self) -> dict[str, Any]:
        pick = self.random.choice
        out: dict[str, Any] = {"enable_bucket": pick([True, True, True, False])}
        out["min_bucket_reso"] = pick([64] * 20 + [32, 96, 256, 0])
        out["max_bucket_reso"] = pick([256, 512, 512, 1024, 500] * 4 + [100])
        if self.random.random() < 0.7:
            out["bucket_reso_steps"] = pick([64] * 18 + [32, 32, 16, 48, 0])
        if self.random.random() < 0.3:
            out["bucket_no_upscale"] = True
        return out

    def _wrong(self, level: dict[str, Any]) -> None:
        """A slip that users make, in some."""
        if self.random.random() < 0.03:
            key, value = self.random.choice([
                ("num_repeat", 2), ("caption_extention", ".txt"), ("num_repeats", "2"), ("num_repeats", True),
                ("class_tokens", "hat"), ("is_reg", True), ("alpha_mask", True), ("cache_info", False),
                ("face_crop_aug_range", [1.0, 2.0]), ("face_crop_aug_range", [1, 2]), ("metadata_file", "x.json"),
                ("face_crop_aug_range", [2.0, 1.0, 3.0]), ("face_crop_aug_range", "1.0,2.0"), ("batch_size", 3),
                ("resolution", 64), ("keep_tokens", 1.0), ("flip_aug", 1), ("caption_dropout_rate", 0),
                ("network_multiplier", 1), ("resize_interpolation", "area"), ("resize_interpolation", "best"),
                ("validation_split", 0), ("conditioning_data_dir", "masks"), ("token_warmup_step", 0.5),
                ("custom_attributes", {"spf_target": "hat"}), ("image_dir", 3), ("caption_extension", "txt"),
            ])  # fmt: skip
            level[key] = value

    def _subset(self, kind: str) -> dict[str, Any]:
        pick = self.random.choice
        if kind == "metadata":
            path, folder = pick(self.metadata)
            out: dict[str, Any] = {"metadata_file": str(path)} | ({"image_dir": str(folder)} if folder else {})
        else:
            folder = pick(self.folders) if self.random.random() < 0.98 else self.root / "nowhere"
            out = {"image_dir": str(folder)}
            if self.random.random() < 0.8:
                out["caption_extension"] = pick([".txt", ".txt", ".txt", "txt"])
            if kind == "masks":
                if self.random.random() < 0.95:
                    masks = [*self.masks.get(folder, []), self.root / "none"]
                    weights = [30, 2, 2, 1][-len(masks) :]
                    out["conditioning_data_dir"] = str(self.random.choices(masks, weights)[0])
            else:
                if self.random.random() < 0.2:
                    out["is_reg"] = True
                if self.random.random() < 0.3:
                    out["class_tokens"] = "a hat"
        if self.random.random() < 0.6:
            out["num_repeats"] = pick([1, 2, 3, 5] * 3 + [0])
        for key, chance in (("color_aug", 0.04), ("random_crop", 0.04), ("flip_aug", 0.1), ("enable_wildcard", 0.15)):
            if self.random.random() < chance:
                out[key] = True
        self._wrong(out)
        return out

    def make(self, number: int) -> DataSet:
        pick = self.random.choice
        made = DataSet(self.root / f"run{number:03d}.toml", sdxl=self.random.random() < 0.4)
        made.options = {
            "pretrained_model_name_or_path": "stable-diffusion-xl-base-1.0" if made.sdxl else "stable-diffusion-v1-5",
            "network_module": "spf_plugin.lora",
            "network_args": ["spf_target=hat"],
            "network_train_unet_only": True,
            "caption_extension": ".txt",
            "train_batch_size": pick([1, 2, 3, 4]),
        }
        if self.random.random() < 0.3:
            made.options["cache_latents"] = True
        if self.random.random() < 0.8:
            made.options["resolution"] = pick(["128", "128,192", "256", "64,64", "128, 64"] * 8 + ["128x128", "1,2,3"])
        if self.random.random() < 0.06:
            made.options["face_crop_aug_range"] = pick(["1.0,2.0", "1,1", "2.0,1.0", "1.0", "a,b", "1,2,3"])
        if self.random.random() < 0.3:
            made.options |= self._buckets()
        if self.random.random() < 0.07:
            made.options |= pick([
                {"shuffle_caption": "false"}, {"enable_bucket": 1}, {"color_aug": True}, {"train_batch_size": 0},
                {"keep_tokens": 1.5}, {"caption_dropout_rate": 0}, {"conditioning_data_dir": "masks"},
            ])  # fmt: skip
        kind = self.random.choices(["folders", "masks", "metadata", "parent", "in_json"], [8, 5, 3, 4, 1])[0]
        if kind == "parent":
            made.options["train_data_dir"] = str(pick([*self.parents * 2, self.root / "nowhere"]))
            if self.random.random() < 0.5:
                made.options["reg_data_dir"] = str(pick(self.parents))
        elif kind == "in_json":
            path, folder = pick(self.metadata)
            made.options |= {"in_json": str(path)} | ({"train_data_dir": str(folder)} if folder else {})
        else:
            if (kind == "masks" and self.random.random() < 0.9) or self.random.random() < 0.05:
                made.options["masked_loss"] = True
            general: dict[str, Any] = {"caption_extension": ".txt"} if self.random.random() < 0.5 else {}
            if self.random.random() < 0.5:
                general |= self._buckets()
            self._wrong(general)
            datasets = []
            for _ in range(pick([1, 1, 1, 2])):
                own: dict[str, Any] = {"subsets": [self._subset(kind) for _ in range(pick([1, 1, 2, 3]))]}
                if self.random.random() < 0.8:
                    own["resolution"] = self._size()
                if self.random.random() < 0.4:
                    own["batch_size"] = pick([1, 2, 5])
                if self.random.random() < 0.3:
                    own |= self._buckets()
                if self.random.random() < 0.06:
                    own["validation_split"] = pick([0.25, 0.5, 1.0, 2.0])
                self._wrong(own)
                datasets.append(own)
            if len(datasets) == 1 and self.random.random() < 0.1:  # one folder in two resolutions
                datasets.append({**datasets[0], "resolution": 64})
            more = {"datasetss": 3} if self.random.random() < 0.02 else {}
            if self.random.random() < 0.02:
                datasets = []
            made.write(general, datasets, more, as_json=self.random.random() < 0.25)
        made.finish()
        return made


def _format(path: Path) -> str:
    return {".jpg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
