"""A small network that reads the attributes off a portrait: it judges samples, it never trains the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from portraitlab.portraits import (
    BACKGROUNDS,
    CLOTHES,
    CLOTHES_COLOURS,
    EXPRESSIONS,
    FLAGS,
    HAIR_COLOURS,
    HAIR_STYLES,
    PRESENTATIONS,
    SKINS,
    TEXTURES,
    Person,
)

#: The attributes with several values and the values, in the order of the network's outputs.
CHOICES: dict[str, tuple[str, ...]] = {
    "hair_colour": tuple(HAIR_COLOURS),
    "clothes_colour": tuple(CLOTHES_COLOURS),
    "background": tuple(BACKGROUNDS),
    "skin": tuple(SKINS),
    "expression": EXPRESSIONS,
    "hair_style": HAIR_STYLES,
    "clothes": CLOTHES,
    "texture": TEXTURES,
    "presentation": PRESENTATIONS,
}
OUTPUTS = sum(len(values) for values in CHOICES.values()) + len(FLAGS)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))


class Judge(nn.Module):
    """Convolutions down to 8x8, then mean and maximum over space and one linear layer for all attributes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 40, 64, 80)
        layers: list[nn.Module] = []
        before = 3
        for index, width in enumerate(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index > 0:
                layers.append(_Residual(width))
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * before, OUTPUTS)

    def features(self, pixels: Tensor) -> Tensor:
        """What the attributes are read off, `[N, 160]`, of pixels float `[N, 3, 128, 128]` in [-1, 1]."""
        x = self.body(pixels)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[N, OUTPUTS]` of pixels float `[N, 3, 128, 128]` in [-1, 1]."""
        return self.head(self.features(pixels))


def split(logits: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Logits as one block per attribute, and the block of the flags."""
    sizes = [len(values) for values in CHOICES.values()]
    *blocks, flags = logits.split([*sizes, len(FLAGS)], dim=1)
    return dict(zip(CHOICES, blocks, strict=True)), flags


def label_tensors(persons: Sequence[Person | Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Class indices int64 `[N, len(CHOICES)]` and flags float32 `[N, len(FLAGS)]` of persons or label dictionaries."""
    rows = [p.labels() if isinstance(p, Person) else p for p in persons]
    classes = [[values.index(row[name]) for name, values in CHOICES.items()] for row in rows]
    return torch.tensor(classes), torch.tensor([[float(row[flag]) for flag in FLAGS] for row in rows])


def judge_loss(logits: Tensor, classes: Tensor, flags: Tensor) -> Tensor:
    """Sum of the cross entropies of all attributes, averaged over the batch."""
    blocks, flag_logits = split(logits)
    loss = F.binary_cross_entropy_with_logits(flag_logits, flags) * len(FLAGS)
    for index, block in enumerate(blocks.values()):
        loss = loss + F.cross_entropy(block, classes[:, index], label_smoothing=0.02)
    return loss


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights in half precision as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata={"format": "pt"})
    aside.replace(path)


def load_judge(path: Path) -> Judge:
    """Read a judge back, in float32 and ready to predict."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def predict(judge: Judge, images: NDArray[np.uint8], batch: int = 64) -> list[dict[str, Any]]:
    """What the judge sees in uint8 images `[N, 128, 128, 3]`: per image every attribute, and every flag's probability.

    A flag's probability is under its own name; an attribute's value is under its name, its probability under
    `<name>_probability`.
    """
    from portraitlab.autoencoder import to_tensor

    found: list[dict[str, Any]] = []
    for start in range(0, len(images), batch):
        blocks, flags = split(judge(to_tensor(images[start : start + batch])))
        probabilities = {name: block.softmax(1) for name, block in blocks.items()}
        flags = flags.sigmoid()
        for row in range(len(flags)):
            seen: dict[str, Any] = {flag: float(flags[row, i]) for i, flag in enumerate(FLAGS)}
            for name, block in probabilities.items():
                best = int(block[row].argmax())
                seen[name], seen[f"{name}_probability"] = CHOICES[name][best], float(block[row, best])
            found.append(seen)
    return found


@torch.no_grad()
def probability(
    judge: Judge, images: NDArray[np.uint8], wanted: Mapping[str, Any], batch: int = 64
) -> NDArray[np.float64]:
    """How sure the judge is that images `[N, 128, 128, 3]` show all of `wanted` (attribute or flag -> value), `[N]`."""
    from portraitlab.autoencoder import to_tensor

    found = []
    for start in range(0, len(images), batch):
        blocks, flags = split(judge(to_tensor(images[start : start + batch])))
        sure = torch.ones(len(flags))
        for name, value in wanted.items():
            if name in CHOICES:
                sure = sure * blocks[name].softmax(1)[:, CHOICES[name].index(value)]
            else:
                present = flags[:, FLAGS.index(name)].sigmoid()
                sure = sure * (present if value else 1 - present)
        found.append(sure)
    return torch.cat(found).double().numpy()


def accuracy(seen: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of images read correctly, per attribute and per flag (threshold one half)."""
    scores = {n: float(np.mean([s[n] == t[n] for s, t in zip(seen, truth, strict=True)])) for n in CHOICES}
    scores |= {f: float(np.mean([(s[f] > 0.5) == t[f] for s, t in zip(seen, truth, strict=True)])) for f in FLAGS}
    return scores
