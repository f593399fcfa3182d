"""The report's measures by other models: face identity, segmentation, KID and FID, against slow computations."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.tools.report import extras, metrics
from spf_plugin.tools.report.dino import Dino
from spf_plugin.tools.report.faces import Faces, likeness
from spf_plugin.tools.report.held_out import HeldOut
from spf_plugin.tools.report.prompts import Question
from spf_plugin.tools.report.results import Request, Variant
from spf_plugin.tools.report.segmentation import Segmenter, consistency, mean_iou, target_classes
from spf_plugin.tools.report.subject import Photos
from tests import onnx_files, tiny

HAIR = Question("a woman", "a woman, blonde hair", Target("blonde hair"))
CLASSES = {0: "background", 1: "hair", 2: "skin", 3: "eye_g"}


def variants(base: Any, *others: tuple[Any, Any]) -> list[Variant]:
    """The base model, whose pictures are the same without and with the target, and LoRAs (without, with)."""
    loras = [Variant("spf", f"LoRA {i}", f"l{i}", "", a, b) for i, (a, b) in enumerate(others)]
    return [Variant("base", "base model", "m", "", base, base), *loras]


HELD = HeldOut(("blonde", "a woman", "hair"), ("one", "one", "two"))


def held_variants(base: Any, lora: Any) -> list[Variant]:
    """The base model and a LoRA, whose pictures for the held-out prompts are those for the base prompts."""
    first, second = variants(base, (lora, lora))
    return [replace(first, held=base), replace(second, held=lora)]


# -- faces ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    folder = tmp_path_factory.mktemp("faces")
    onnx_files.detector(folder / "face_detection_yunet_test.onnx")
    onnx_files.recognizer(folder / "face_recognition_sface_test.onnx")
    return Faces(str(folder))


def portrait(column: int, row: int, colour: tuple[int, int, int], size: int = 96) -> Any:
    """A face: red in the middle, the rest of it in one colour; the rest of the picture black."""
    image = np.zeros((size, size, 3), np.uint8)
    image[8 * row - 16 : 8 * row + 24, 8 * column - 16 : 8 * column + 24] = colour
    image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (255, 0, 0)
    return image


def test_faces_are_found_aligned_and_compared(faces: Faces) -> None:
    here, there, other = portrait(4, 4, (0, 90, 200)), portrait(6, 7, (0, 90, 200)), portrait(4, 4, (0, 200, 20))
    nobody = np.zeros_like(here)
    found = faces.features(np.stack([here, there, other, nobody]))
    assert found[3] is None
    a, b, c = found[:3]
    assert a is not None
    assert b is not None
    assert c is not None
    assert a @ a == pytest.approx(1.0)
    assert a @ b == pytest.approx(1.0, abs=1e-3)  # the same face elsewhere
    assert a @ c < 0.9
    assert likeness([a, None, c, b], [a, a, None, a]) == (pytest.approx((1 + a @ b) / 2), 2)
    assert likeness([None], [a]) == (None, 0)


def test_the_face_rows_count_what_was_compared(faces: Faces) -> None:
    base = np.stack([portrait(4, 4, (0, 90, 200)), portrait(5, 5, (0, 10, 90)), np.zeros((96, 96, 3), np.uint8)])
    changed = base.copy()
    changed[1] = 0
    without, with_ = faces.rows(variants(base, (base, changed)))
    assert without.values == [None, pytest.approx(1.0)]
    assert with_.values == [pytest.approx(1.0), pytest.approx(1.0)]
    assert with_.n == "2 (base model), 1 (LoRA 0) of 3 pairs of images, those with a face in both"
    assert "licence not recorded" in with_.by
    for name, digest in faces.digests.items():
        assert f"{name} {digest[:12]}" in with_.by
    nobody = np.zeros_like(base)
    assert faces.rows(variants(nobody, (nobody, nobody)))[0].values == [None, None]


def test_a_folder_without_the_two_files(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match=r"no file named face_detection_yunet\*"):
        Faces(str(tmp_path / "none"))
    onnx_files.detector(tmp_path / "face_detection_yunet_a.onnx")
    with pytest.raises(SPFError, match=r"no file named face_recognition_sface\*"):
        Faces(str(tmp_path))
    shutil.copy(tmp_path / "face_detection_yunet_a.onnx", tmp_path / "face_detection_yunet_b.onnx")
    with pytest.raises(SPFError, match="more than one file"):
        Faces(str(tmp_path))
    (tmp_path / "face_detection_yunet_b.onnx").unlink()
    (tmp_path / "face_recognition_sface_a.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(SPFError, match="OpenCV cannot use these files"):
        Faces(str(tmp_path))


# -- segmentation -----------------------------------------------------------------------------------------------------


def slow_iou(a: Any, b: Any, left_out: set[int]) -> float:
    cells = [(x, y) for x, y in np.ndindex(a.shape) if a[x, y] not in left_out and b[x, y] not in left_out]
    ratios = []
    for label in {int(m[cell]) for m in (a, b) for cell in cells}:
        one, two = {c for c in cells if a[c] == label}, {c for c in cells if b[c] == label}
        ratios.append(len(one & two) / len(one | two))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("left_out", [set(), {1}, {0, 4}])
def test_mean_iou_by_sets_of_pixels(left_out: set[int]) -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(0, 6, (2, 9, 7))
    b[:5] = a[:5]
    assert mean_iou(a, b, left_out) == pytest.approx(slow_iou(a, b, left_out))
    assert mean_iou(a, a, left_out) == 1.0


def test_what_is_left_out_may_change_freely() -> None:
    """Hair that turns to skin, or skin to hair, costs nothing; a background that turns to skin does."""
    a = np.array([[0, 0, 1, 2], [0, 0, 2, 2]])
    hair_moved, background_changed = a.copy(), a.copy()
    hair_moved[0, 2], hair_moved[1, 3] = 2, 1
    background_changed[0, 0] = 2
    assert mean_iou(hair_moved, a, {1}) == 1.0
    assert mean_iou(hair_moved, a, ()) < 1.0
    assert mean_iou(background_changed, a, {1}) == pytest.approx((3 / 4 + 3 / 4) / 2)
    everything = np.ones_like(a)
    assert np.isnan(mean_iou(everything, a, {1}))
    assert consistency([everything, hair_moved], [a, a], {1}) == 1.0
    assert consistency([everything], [a], {1}) is None


def test_the_targets_class() -> None:
    assert target_classes(CLASSES, None, ["blonde_hair"]) == {1}
    assert target_classes({0: "hair", 1: "hat"}, None, ["hats", "a chair"]) == {1}  # whole words only
    assert target_classes(CLASSES, None, ["sunglasses"]) == set()
    assert target_classes(CLASSES, "Eye_G|skin", ["sunglasses"]) == {2, 3}
    with pytest.raises(SPFError, match=r"no such class; did you mean hair\? Its classes: background, hair"):
        target_classes(CLASSES, "hairs", [])
    with pytest.raises(SPFError, match=r"no such class\. Its"):
        target_classes(CLASSES, " | ", [])


def test_the_segmentation_is_that_of_transformers_own_pipeline(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import pipeline

    folder = tiny.segmenter(tmp_path / "seg", CLASSES)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n", encoding="utf-8")
    segmenter = Segmenter(str(folder))
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (2, 6, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    theirs = pipeline("image-segmentation", model=str(folder), framework="pt", device="cpu")
    names = list(CLASSES.values())
    for image, labels in zip(images, segmenter.labels(images), strict=True):
        masks = {one["label"]: np.asarray(one["mask"]) > 0 for one in theirs(Image.fromarray(image))}
        assert len(masks) > 1  # not one class everywhere
        for name in names:
            assert np.array_equal(labels == names.index(name), masks.get(name, np.zeros_like(labels, bool)))
    without, with_ = segmenter.rows(variants(images, (images, images[::-1])), {1}, HeldOut())
    assert without.values == [None, 1.0]
    labels = segmenter.labels(images)
    slow = [slow_iou(labels[i], labels[1 - i], {1}) for i in (0, 1)]
    assert with_.values == [1.0, pytest.approx(np.mean(slow))]
    assert "outside “hair”" in with_.note
    assert with_.n == "2 images"
    assert f"SegformerForSemanticSegmentation seg {segmenter.digest[:12]}, licence research-only" in with_.by


def test_what_is_no_segmentation_model(tmp_path: Path) -> None:
    folder = tiny.segmenter(tmp_path / "seg", CLASSES)
    with pytest.raises(SPFError, match=r"--segmentation .*not a semantic segmentation model"):
        Segmenter(str(tiny.clip(tmp_path / "clip")))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SPFError, match="with safetensors weights"):  # never a pickle
        Segmenter(str(folder))


def test_segmentation_of_the_held_out_prompts(tmp_path: Path) -> None:
    segmenter = Segmenter(str(tiny.segmenter(tmp_path / "seg", CLASSES)))
    random = np.random.default_rng(1)
    images = random.integers(0, 255, (3, 6, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    row = segmenter.rows(held_variants(images, images[[1, 1, 0]]), {1}, HELD)[-1]
    labels = segmenter.labels(images)
    slow = [slow_iou(labels[i], labels[j], set()) for i, j in ((0, 1), (1, 1), (2, 0))]  # nothing is left out
    assert row.key == "segmentation_held_out"
    assert row.values == [None, pytest.approx(np.mean(slow))]
    assert row.groups == {"one": [None, pytest.approx((slow[0] + slow[1]) / 2)], "two": [None, pytest.approx(slow[2])]}


# -- DINOv2 -----------------------------------------------------------------------------------------------------------


def slow_class_token(folder: Path, image: Any, registers: int = 0) -> Any:
    """The class token of a DINOv2, written out from the file's tensors, for an image of 28 px as the model gets it."""
    from safetensors.torch import load_file

    tensors = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    pixels = (image.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    def linear(x: Any, name: str) -> Any:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x: Any) -> Any:
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    weight = tensors["embeddings.patch_embeddings.projection.weight"]
    bias = tensors["embeddings.patch_embeddings.projection.bias"]
    patches = [
        (weight * pixels[y : y + 7, x : x + 7].transpose(2, 0, 1)).sum((1, 2, 3)) + bias
        for y in range(0, 28, 7)
        for x in range(0, 28, 7)
    ]
    states = np.stack([tensors["embeddings.cls_token"][0, 0], *patches]) + tensors["embeddings.position_embeddings"][0]
    if registers:
        states = np.concatenate([states[:1], tensors["embeddings.register_tokens"][0], states[1:]])
    for i in range(2):
        layer = f"encoder.layer.{i}"
        seen = norm(states, f"{layer}.norm1")
        q, k, v = (linear(seen, f"{layer}.attention.attention.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        attended = linear(np.concatenate(heads, axis=1), f"{layer}.attention.output.dense")
        states = states + attended * tensors[f"{layer}.layer_scale1.lambda1"]
        inner = linear(gelu(linear(norm(states, f"{layer}.norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        states = states + inner * tensors[f"{layer}.layer_scale2.lambda1"]
    return norm(states, "layernorm")[0]


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2s_drift_is_that_of_its_formula(tmp_path: Path, registers: int) -> None:
    if not tiny.can_segment():
        pytest.skip("DINOV2 NOT TESTED: transformers 5 needs a torchvision for its image processor")
    from PIL import Image

    folder = tiny.dino(tmp_path / "dino", registers=registers)
    dino = Dino(str(folder))
    images = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), dtype=np.uint8)

    def seen(image: Any) -> Any:
        """Shorter side to 32, the middle 28."""
        small = np.asarray(Image.fromarray(image).resize((42, 32), Image.Resampling.BICUBIC))
        return small[2:30, 7:35]

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))

    tokens = [slow_class_token(folder, seen(image), registers) for image in images]
    drifts = [(1 - cosine(tokens[i], tokens[j])) / 2 for i, j in ((0, 1), (1, 3), (2, 2))]
    assert drifts[0] > 1e-2
    without, held = dino.rows(held_variants(images[:3], images[[1, 3, 2]]), HELD, Photos())
    assert without.key == "dino_without"
    assert without.values == [None, pytest.approx(np.mean(drifts), rel=1e-3)]
    assert held.values == [None, pytest.approx(np.mean(drifts), rel=1e-3)]
    assert held.groups["one"] == [None, pytest.approx(np.mean(drifts[:2]), rel=1e-3)]
    assert held.groups["two"] == [None, pytest.approx(0, abs=1e-6)]
    assert held.n == "3 images"
    assert f"dino {dino.digest[:12]}, licence not recorded" in held.by
    assert len(dino.rows(variants(images[:1], (images[1:2], images[1:2])), HeldOut(), Photos())) == 1
    # Two photos of other sizes, two seeds each; the first of the second photo's is the photo itself.
    photos = Photos([np.ascontiguousarray(images[0, :, :48]), images[1]], ["a", "b"])
    base, lora = held_variants(images[:1], images[:1])
    drawn = [replace(base, subject=images[[2, 3, 1, 2]]), replace(lora, subject=images[[3, 3, 3, 1]])]
    likeness = dino.rows(drawn, HeldOut(), photos)[-1]
    square = np.asarray(Image.fromarray(images[0, :, :48]).resize((32, 32), Image.Resampling.BICUBIC))[2:30, 2:30]
    known = [slow_class_token(folder, square, registers), tokens[1]]
    for value, chosen in zip(likeness.values, ([2, 3, 1, 2], [3, 3, 3, 1]), strict=True):
        cosines = [cosine(tokens[i], known[n // 2]) for n, i in enumerate(chosen)]
        assert value == pytest.approx(np.mean(cosines), rel=1e-3)
    assert likeness.n == "4 images of 2 photos' captions"


def test_what_is_no_dinov2(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match=r"--dino .*not a DINOv2 of transformers .*it is a clip"):
        Dino(str(tiny.clip(tmp_path / "clip")))
    if not tiny.can_segment():
        pytest.skip("DINOV2 NOT TESTED: transformers 5 needs a torchvision for its image processor")
    from safetensors.torch import load_file, save_file

    folder = tiny.dino(tmp_path / "dino")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SPFError, match=r"its weights lack layernorm\.weight"):  # never a random one in its place
        Dino(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SPFError, match="with safetensors weights"):  # never a pickle
        Dino(str(folder))


# -- CLIP-T -----------------------------------------------------------------------------------------------------------


def test_change_of_clip_t_by_single_cosines(tmp_path: Path) -> None:
    measure = metrics.Clip(str(tiny.clip(tmp_path / "clip")))
    images = np.random.default_rng(2).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    seen = held_variants(images, images[[1, 1, 0]])
    asked = [(Question(text, f"{text}, hair", Target("hair")), 0) for text in ("a woman", "blonde", "woman")]
    change, held = measure.change_rows(seen, asked, HELD)

    def said(image: Any, text: str) -> float:
        picture, words = measure.images(image[None])[0].double().numpy(), measure.texts([text])[0].double().numpy()
        return float(picture @ words / np.sqrt(picture @ picture) / np.sqrt(words @ words))

    def changes(texts: Any) -> list[float]:
        pairs = zip(((0, 1), (1, 1), (2, 0)), texts, strict=True)
        return [100 * (said(images[j], text) - said(images[i], text)) for (i, j), text in pairs]

    assert change.values == [None, pytest.approx(np.mean(changes(["a woman", "blonde", "woman"])), abs=1e-3)]
    slow = changes(HELD.texts)
    assert abs(slow[0]) > 1e-2
    assert held.values == [None, pytest.approx(np.mean(slow), abs=1e-3)]
    assert held.groups["two"] == [None, pytest.approx(slow[2], abs=1e-3)]
    assert len(measure.change_rows(seen, asked, HeldOut())) == 1


# -- KID and FID ------------------------------------------------------------------------------------------------------


def test_kid_and_fid_by_their_formulas(tmp_path: Path) -> None:
    pytest.importorskip(
        "torchmetrics", reason="KID AND FID NOT TESTED: torchmetrics is missing (requirements/test.txt)"
    )
    random = np.random.default_rng(1)
    n, width = 120, 8
    a = random.normal(0, 0.3, (n, width))
    b = random.normal(0.15, 0.4, (n, width)) @ random.normal(0, 0.5, (width, width))

    def root(matrix: Any) -> Any:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    half = root(np.cov(a.T))
    both = root(half @ np.cov(b.T) @ half)
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * both)

    def kernel(x: Any, y: Any) -> Any:
        return (x @ y.T / width + 1) ** 3

    def off(matrix: Any) -> Any:
        return (matrix.sum() - np.trace(matrix)) / (n * (n - 1))

    kid = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()

    measure = metrics.Clip(str(tiny.clip(tmp_path / "clip")))
    empty = np.zeros((n, 1, 1, 3), np.uint8)
    features = [torch.from_numpy(x) for x in (a, b, a)]
    kid_row, fid_row = metrics.set_rows(measure, variants(empty, (empty, empty), (empty, empty)), features)
    assert fid_row.values[0] is None
    assert fid_row.values[1] == pytest.approx(fid, rel=1e-4)
    assert fid_row.values[2] == pytest.approx(0, abs=1e-4)
    assert kid_row.values[1] == pytest.approx(kid, rel=0.1)  # the mean over subsets
    assert kid_row.values[2] == pytest.approx(0, abs=0.05 * kid)
    for row in (kid_row, fid_row):
        assert row.n == f"{n} images each"
        assert measure.digest[:12] in row.by


# -- LPIPS ------------------------------------------------------------------------------------------------------------


def test_lpips_by_its_formula(tmp_path: Path) -> None:
    """AlexNet written out with the file's own tensors, and lpips' weights of its five layers."""
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another build
        pytest.skip(f"LPIPS NOT TESTED: it needs lpips and a torchvision that fits this torch ({error})")
    from safetensors.torch import save_file

    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"features.{i}.weight": torch.randn(o, n, k, k, generator=random) * (2 / (n * k * k)) ** 0.5
        for i, (o, n, k) in shapes.items()
    } | {f"features.{i}.bias": torch.randn(o, generator=random) * 0.1 for i, (o, _, _) in shapes.items()}
    save_file(tensors, tmp_path / "alex.safetensors")
    measure = metrics.Lpips(str(tmp_path / "alex.safetensors"))

    def layers(image: Any) -> list[torch.Tensor]:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.double().view(3, 1, 1)) / scale.double().view(3, 1, 1)
        out = []
        for i, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
            if i in (3, 6):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            weight, bias = tensors[f"features.{i}.weight"].double(), tensors[f"features.{i}.bias"].double()
            x = torch.nn.functional.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
            out.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    a, b = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    expected = 0.0
    for x, y, line in zip(layers(a), layers(b), measure.net.lins, strict=True):
        weight = line.model[-1].weight.detach().double()
        expected += float(((x - y) ** 2 * weight.view(1, -1, 1, 1)).sum(1).mean())
    without, with_ = measure.rows(variants(a[None], (a[None], b[None])))
    assert without.values == [None, 0.0]
    assert with_.values == [0.0, pytest.approx(expected, rel=1e-3)]
    assert f"alex.safetensors {measure.digest[:12]}, licence not recorded" in with_.by
    (tmp_path / "other.safetensors").write_bytes(b"none")
    with pytest.raises(SPFError, match="not AlexNet's weights"):
        metrics.Lpips(str(tmp_path / "other.safetensors"))


# -- what is missing --------------------------------------------------------------------------------------------------


def test_what_was_not_asked_for_is_said(tmp_path: Path) -> None:
    found = extras.load(Request("m", (), tmp_path), [HAIR], pytest.fail)
    assert set(found.missing) == {
        "CLIP-I, CLIP-T, KID, FID", "DINOv2 drift, likeness to the subject", "LPIPS", "face identity",
        "segmentation consistency",
    }  # fmt: skip
    assert found.missing["face identity"] == "no identity model was given (--faces)"
    with pytest.raises(SPFError, match="Give the model with --dino"):
        extras.load(Request("m", (), tmp_path, subject=tmp_path), [HAIR], pytest.fail)
    with pytest.raises(SPFError, match="Give the model with --segmentation"):
        extras.load(Request("m", (), tmp_path, target_class="hair"), [HAIR], pytest.fail)


def test_libraries_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cv2", "torchmetrics", "torchmetrics.image.fid", "lpips"):
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    settings = Request(
        "m", (), tmp_path, seeds=tuple(range(metrics.SET_IMAGES)), clip=str(tiny.clip(tmp_path / "clip")),
        lpips="alex", faces=str(tmp_path),
    )  # fmt: skip
    found = extras.load(settings, [HAIR], said.append)
    assert found.clip is not None
    assert [text.partition(" is not")[0] for text in said] == ["KID, FID", "LPIPS", "face identity"]
    assert 'pip install "spf-plugin[report]"' in found.missing["KID, FID"]
    assert 'pip install "spf-plugin[faces]"' in found.missing["face identity"]


def test_few_images_make_no_distribution(tmp_path: Path) -> None:
    settings = Request("m", (), tmp_path, clip=str(tiny.clip(tmp_path / "clip")))
    missing = extras.load(settings, [HAIR], pytest.fail).missing
    assert missing["KID, FID"] == "2 images; they need 50 or more (prompts times seeds)"
    assert json.dumps(missing)
