"""Face identity: is it still the same person? OpenCV's YuNet finds and aligns faces, its SFace compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spf_plugin.errors import SPFError
from spf_plugin.files import expanded
from spf_plugin.tools.report.metrics import UNKNOWN_LICENCE
from spf_plugin.tools.report.models import sha256, short
from spf_plugin.tools.report.results import Images, Row, Variant

#: How the files are named in OpenCV's model zoo.
DETECTOR, RECOGNIZER = "face_detection_yunet*.onnx", "face_recognition_sface*.onnx"
#: Licences of the zoo's files by hash; other files may be anything.
_LICENCES = {
    "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4": "MIT",
    "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79": "Apache-2.0",
}
_SURE = 0.7  # the detector's score; below it, drawn faces and patterns count as well
_SAME_PERSON = 0.363  # OpenCV's own threshold for SFace's cosine


class Faces:
    """A face detector and a recogniser, with what the page must say about them. They run on the CPU.

    Args:
        folder: holds the two files, named as in OpenCV's model zoo.

    Raises:
        ImportError: OpenCV is not installed.
        SPFError: the files are not there, or are something else.
    """

    def __init__(self, folder: str):
        import cv2

        paths = [_only(expanded(folder), pattern) for pattern in (DETECTOR, RECOGNIZER)]
        try:
            self._detector: Any = cv2.FaceDetectorYN.create(str(paths[0]), "", (64, 64), _SURE)
            self._recognizer: Any = cv2.FaceRecognizerSF.create(str(paths[1]), "")
            self._detector.detect(np.zeros((64, 64, 3), np.uint8))
            self._recognizer.feature(np.zeros((112, 112, 3), np.uint8))
        except cv2.error as error:
            raise SPFError(
                f"--faces {folder}: OpenCV cannot use these files ({error.err or error}). Take "
                "face_detection_yunet_2023mar.onnx and face_recognition_sface_2021dec.onnx of OpenCV's model zoo."
            ) from None
        self.digests = {path.name: sha256(path) for path in paths}
        files = [
            f"{name} {short(digest)}, licence {_LICENCES.get(digest, UNKNOWN_LICENCE)}"
            for name, digest in self.digests.items()
        ]
        self.by = f"OpenCV {cv2.__version__} (Apache-2.0), {'; '.join(files)}"

    def features(self, images: Images) -> list[NDArray[np.float64] | None]:
        """Of the largest face of every image, unit norm; None where no face is found."""
        return [self._feature(image) for image in images]

    def _feature(self, image: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        blue_first = np.ascontiguousarray(image[:, :, ::-1])
        self._detector.setInputSize((image.shape[1], image.shape[0]))
        found = self._detector.detect(blue_first)[1]
        if found is None:
            return None
        largest = max(found, key=lambda face: face[2] * face[3])
        feature = self._recognizer.feature(self._recognizer.alignCrop(blue_first, largest)).astype(np.float64).ravel()
        return feature / max(float(np.linalg.norm(feature)), 1e-12)

    def rows(self, variants: Sequence[Variant]) -> list[Row]:
        """Cosines with the base model's images for the base prompts, where both show a face."""
        base = self.features(variants[0].without)
        without = [likeness(self.features(v.without), base) for v in variants[1:]]
        with_ = [likeness(self.features(v.with_), base) for v in variants]

        def counted(pairs: Sequence[tuple[float | None, int]], of: Sequence[Variant]) -> str:
            counts = ", ".join(f"{n} ({v.label})" for v, (_, n) in zip(of, pairs, strict=True))
            return f"{counts} of {len(base)} pairs of images, those with a face in both"

        scale = f"1 is the same picture; {_SAME_PERSON} and more counts as the same person"
        return [
            Row("face_without", "face identity, target not asked for", scale, self.by, counted(without, variants[1:]),
                "{:.3f}", [None, *(value for value, _ in without)], "Face kept when not asked"),
            Row("face_with", "face identity, target asked for", scale, self.by, counted(with_, variants),
                "{:.3f}", [value for value, _ in with_]),
        ]  # fmt: skip


def likeness(
    found: Sequence[NDArray[np.float64] | None], reference: Sequence[NDArray[np.float64] | None]
) -> tuple[float | None, int]:
    """Mean cosine of the pairs that have a face in both images, and how many those are."""
    cosines = [float(a @ b) for a, b in zip(found, reference, strict=True) if a is not None and b is not None]
    return (float(np.mean(cosines)) if cosines else None), len(cosines)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = "no file" if not found else "more than one file"
        other = RECOGNIZER if pattern == DETECTOR else DETECTOR
        raise SPFError(
            f"--faces {folder}: {what} named {pattern}. Give a folder with one of it and one {other}, from OpenCV's "
            "model zoo (opencv_zoo)."
        )
    return found[0]
