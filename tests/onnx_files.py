"""ONNX files of a few nodes, written by hand: a face detector and a recogniser whose answers are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FLOAT, _INT, _INTS = 1, 2, 7  # ONNX's numbers for the type of a tensor and of two kinds of attribute


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message: a number, or a text or message with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(kind: str, inputs: Sequence[str], output: str, **ints: Sequence[int] | int) -> bytes:
    parts = [_field(1, name) for name in inputs] + [_field(2, output), _field(3, output), _field(4, kind)]
    for name, value in ints.items():
        if isinstance(value, int):
            attribute = _field(3, value) + _field(20, _INT)
        else:
            attribute = b"".join(_field(8, one) for one in value) + _field(20, _INTS)
        parts.append(_field(5, _field(1, name) + attribute))
    return b"".join(parts)


def _described(name: str, shape: Iterable[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, dims)))


def _write(
    path: Path, shape: Sequence[int], nodes: Sequence[bytes], weights: Mapping[str, NDArray[np.float32]],
    outputs: Mapping[str, Sequence[int]],
) -> Path:  # fmt: skip
    tensors = [
        b"".join(_field(1, size) for size in array.shape)
        + _field(2, _FLOAT) + _field(8, name) + _field(9, array.astype("<f4").tobytes())
        for name, array in weights.items()
    ]  # fmt: skip
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, "graph"),
            *(_field(5, tensor) for tensor in tensors),
            _field(11, _described("input", shape)),
            *(_field(12, _described(name, size)) for name, size in outputs.items()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_field(1, 7) + _field(8, _field(2, 11)) + _field(7, graph))
    return path


def detector(path: Path) -> Path:
    """In YuNet's form: where a cell of 8 pixels is red there is a face of 32 pixels, its eyes above the cell's middle.

    The coarser cells of YuNet, of 16 and 32 pixels, find nothing.
    """
    side = 64
    offsets = np.array([-0.8, -0.8, 0.8, -0.8, 0.0, 0.0, -0.7, 0.9, 0.7, 0.9], np.float32)  # eyes, nose, mouth; cells
    nodes, weights, outputs = [], {}, {}
    for stride in (8, 16, 32):
        pooled, cells = f"pooled_{stride}", side // stride
        nodes.append(_node("AveragePool", ["input"], pooled, kernel_shape=[stride] * 2, strides=[stride] * 2))
        red = np.array([-1, -1, 1], np.float32).reshape(1, 3, 1, 1) / 255 * (stride == 8)  # OpenCV gives blue first
        boxes = np.array([0.5, 0.5, np.log(32 / stride), np.log(32 / stride)], np.float32)
        heads = {
            "cls": (red, np.zeros(1)),
            "obj": (red, np.zeros(1)),
            "bbox": (None, boxes),
            "kps": (None, 0.5 + offsets),
        }
        for head, (kernel, bias) in heads.items():
            name, width = f"{head}_{stride}", len(bias)
            weights[f"{name}_w"] = np.zeros((width, 3, 1, 1), np.float32) if kernel is None else kernel
            weights[f"{name}_b"] = bias.astype(np.float32)
            nodes.append(_node("Conv", [pooled, f"{name}_w", f"{name}_b"], f"{name}_map", kernel_shape=[1, 1]))
            nodes.append(_node("Transpose", [f"{name}_map"], name, perm=[0, 2, 3, 1]))
            outputs[name] = (1, cells, cells, width)
    return _write(path, (1, 3, side, side), nodes, weights, outputs)


def recognizer(path: Path) -> Path:
    """In SFace's form: the features are the colours of a face's 4 by 4 parts, around middle grey."""
    weights = {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "b": np.full(3, -127.5, np.float32)}
    nodes = [
        _node("AveragePool", ["input"], "pooled", kernel_shape=[28, 28], strides=[28, 28]),
        _node("Conv", ["pooled", "w", "b"], "centred", kernel_shape=[1, 1]),
        _node("Flatten", ["centred"], "fc1", axis=1),
    ]
    return _write(path, (1, 3, 112, 112), nodes, weights, {"fc1": (1, 48)})
