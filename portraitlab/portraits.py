"""A seeded renderer of drawn portraits with exact labels, part masks and counterfactual pairs.

A portrait is a `Person`: discrete attributes (what captions talk about) and a `Geometry` (pose, proportions, colour
jitter). Every random number of a person is drawn before the attributes are applied, so two persons that differ in one
attribute share every other pixel: the changed pixels are the true edit region of that attribute.

Shapes are signed distance functions evaluated only inside their bounding box; a pixel belongs to the topmost part that
covers at least half of it, so the part masks partition the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]

SKINS: dict[str, Colour] = {
    "light": (0.98, 0.86, 0.77),
    "tan": (0.90, 0.70, 0.54),
    "brown": (0.67, 0.45, 0.31),
    "dark": (0.42, 0.27, 0.19),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (0.10, 0.09, 0.11),
    "brown": (0.42, 0.25, 0.13),
    "red": (0.82, 0.34, 0.10),
    "grey": (0.66, 0.67, 0.70),
    "blonde": (0.96, 0.80, 0.38),
}
CLOTHES_COLOURS: dict[str, Colour] = {
    "red": (0.82, 0.13, 0.15),
    "blue": (0.16, 0.35, 0.80),
    "green": (0.13, 0.55, 0.27),
    "yellow": (0.95, 0.78, 0.16),
    "purple": (0.52, 0.22, 0.68),
    "white": (0.95, 0.95, 0.94),
    "black": (0.14, 0.14, 0.17),
}
BACKGROUNDS: dict[str, Colour] = {
    "red": (0.90, 0.38, 0.36),
    "blue": (0.45, 0.67, 0.95),
    "green": (0.50, 0.80, 0.52),
    "yellow": (0.99, 0.89, 0.48),
    "purple": (0.74, 0.58, 0.90),
    "white": (0.97, 0.97, 0.96),
    "grey": (0.62, 0.64, 0.67),
}
EYE_COLOURS: dict[str, Colour] = {"brown": (0.32, 0.18, 0.09), "blue": (0.20, 0.45, 0.75), "green": (0.22, 0.50, 0.30)}
HAT_COLOURS: tuple[Colour, ...] = ((0.36, 0.24, 0.15), (0.13, 0.19, 0.36), (0.30, 0.33, 0.22), (0.55, 0.14, 0.20))
SCARF_COLOURS: tuple[Colour, ...] = ((0.86, 0.38, 0.18), (0.10, 0.52, 0.55), (0.80, 0.22, 0.42), (0.28, 0.32, 0.62))

PRESENTATIONS = ("woman", "man")
FACE_SHAPES = ("oval", "round", "square")
HAIR_STYLES = ("long", "bob", "bun", "curly", "short", "swept")
EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "surprised")
CLOTHES = ("t-shirt", "jacket", "hoodie", "sweater")
TEXTURES = ("plain", "striped", "gradient", "dotted")
FLAGS = ("glasses", "sunglasses", "beard", "freckles", "hat", "scarf", "earrings")

_STYLE_WEIGHTS = {"woman": (0.30, 0.22, 0.16, 0.18, 0.07, 0.07), "man": (0.07, 0.03, 0.02, 0.18, 0.36, 0.34)}

PARTS = (
    "background", "hair", "skin", "clothes", "eyes", "brows", "mouth",
    "glasses", "sunglasses", "beard", "freckles", "hat", "scarf", "earrings",
)  # fmt: skip
PART_ID = {name: index for index, name in enumerate(PARTS)}


@dataclass(frozen=True)
class Geometry:
    """The continuous side of a person: pose, proportions and small colour shifts. Lengths are in half image widths."""

    x: float
    y: float
    scale: float
    turn: float
    tilt: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow: float
    nose: float
    mouth: float
    hair_volume: float
    shoulders: float
    parting: float
    frame: float
    stripe: float
    hat: int
    scarf: int
    jitter: tuple[float, ...]
    freckles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Person:
    """One portrait, fully described: its labels and its geometry."""

    presentation: str
    skin: str
    face_shape: str
    hair_style: str
    hair_colour: str
    eye_colour: str
    expression: str
    clothes: str
    clothes_colour: str
    background: str
    texture: str
    geometry: Geometry
    glasses: bool = False
    sunglasses: bool = False
    beard: bool = False
    freckles: bool = False
    hat: bool = False
    scarf: bool = False
    earrings: bool = False

    def labels(self) -> dict[str, Any]:
        """All attributes but the geometry, as plain JSON types."""
        labels = asdict(self)
        del labels["geometry"]
        return labels

    def with_(self, **changes: Any) -> Person:
        """The same person with some attributes changed; sunglasses and glasses exclude each other."""
        if changes.get("sunglasses"):
            changes.setdefault("glasses", False)
        if changes.get("glasses"):
            changes.setdefault("sunglasses", False)
        return replace(self, **changes)


@dataclass(frozen=True)
class Rates:
    """How often each flag occurs, and the weights of the hair colours."""

    hair_colours: Mapping[str, float]
    flags: Mapping[str, float]


#: What the base model learns from: weak targets in 1.5 % of the images, new targets in none.
BASE_RATES = Rates(
    hair_colours={"black": 1.0, "brown": 1.0, "red": 1.0, "grey": 1.0, "blonde": 0.061},
    flags={"glasses": 0.22, "sunglasses": 0.015, "beard": 0.03, "freckles": 0.015, "hat": 0, "scarf": 0, "earrings": 0},
)
#: What the judge and the autoencoder learn from: every part often enough to be seen well.
BALANCED_RATES = Rates(
    hair_colours={"black": 1.0, "brown": 1.0, "red": 1.0, "grey": 1.0, "blonde": 1.0},
    flags={
        "glasses": 0.2,
        "sunglasses": 0.2,
        "beard": 0.4,
        "freckles": 0.3,
        "hat": 0.2,
        "scarf": 0.25,
        "earrings": 0.25,
    },
)


def sample_person(rng: np.random.Generator, rates: Rates = BASE_RATES) -> Person:
    """Draw a person. The number of random draws is always the same, whatever comes out of them.

    Beards are drawn for men only, so the beard rate over all persons is half of the given one.
    """
    u = rng.random(64)
    freckles = rng.random((16, 2))
    presentation = PRESENTATIONS[int(u[0] < 0.5)]
    between = lambda value, low, high: float(low + (high - low) * value)  # noqa: E731
    geometry = Geometry(
        x=between(u[1], -0.10, 0.10),
        y=between(u[2], -0.13, -0.03),
        scale=between(u[3], 0.98, 1.18) * (1.0 if presentation == "man" else 0.96),
        turn=between(u[4], -1, 1),
        tilt=between(u[5], -0.09, 0.09),
        jaw=between(u[6], -0.03, 0.03),
        eye_gap=between(u[7], 0.155, 0.18),
        eye_size=between(u[8], 0.92, 1.12),
        brow=between(u[9], -0.02, 0.02),
        nose=between(u[10], 0.85, 1.2),
        mouth=between(u[11], 0.9, 1.12),
        hair_volume=between(u[12], 0.9, 1.12),
        shoulders=between(u[13], 0.70, 0.80) + (0.07 if presentation == "man" else 0.0),
        parting=between(u[14], -1, 1),
        frame=float(u[15]),
        stripe=float(u[16]),
        hat=int(u[17] * len(HAT_COLOURS)),
        scarf=int(u[18] * len(SCARF_COLOURS)),
        jitter=tuple(float(v) for v in u[40:55] * 2 - 1),
        freckles=tuple((float(a), float(b)) for a, b in freckles),
    )
    flag = {name: bool(u[20 + i] < rates.flags[name]) for i, name in enumerate(FLAGS)}
    flag["beard"] = flag["beard"] and presentation == "man"
    flag["glasses"] = flag["glasses"] and not flag["sunglasses"]
    return Person(
        presentation=presentation,
        skin=_pick(u[30], dict.fromkeys(SKINS, 1.0)),
        face_shape=_pick(u[31], dict.fromkeys(FACE_SHAPES, 1.0)),
        hair_style=_pick(u[32], dict(zip(HAIR_STYLES, _STYLE_WEIGHTS[presentation], strict=True))),
        hair_colour=_pick(u[33], rates.hair_colours),
        eye_colour=_pick(u[34], {"brown": 0.5, "blue": 0.25, "green": 0.25}),
        expression=_pick(u[35], dict.fromkeys(EXPRESSIONS, 1.0)),
        clothes=_pick(u[36], dict.fromkeys(CLOTHES, 1.0)),
        clothes_colour=_pick(u[37], dict.fromkeys(CLOTHES_COLOURS, 1.0)),
        background=_pick(u[38], dict.fromkeys(BACKGROUNDS, 1.0)),
        texture=_pick(u[39], {"plain": 0.76, "striped": 0.08, "gradient": 0.08, "dotted": 0.08}),
        geometry=geometry,
        **flag,
    )


def _pick(u: float, weights: Mapping[str, float]) -> str:
    total = u * sum(weights.values())
    for name, weight in weights.items():
        total -= weight
        if total < 0:
            return name
    return next(reversed(list(weights)))


def render(person: Person, size: int = 128) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one portrait.

    Args:
        person: who to draw.
        size: width and height in pixels, 64 or more.

    Returns:
        The image `[size, size, 3]` uint8 RGB, and the part map `[size, size]` uint8 with indices into `PARTS`.

    Raises:
        ValueError: if `size` is below 64.
    """
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, not {size}")
    from portraitlab import drawing  # the drawing itself lives in its own module

    canvas = drawing.Canvas(size)
    drawing.draw(canvas, person)
    return canvas.finish()


def render_batch(persons: Iterable[Person], size: int = 128) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw several portraits: images `[N, size, size, 3]` and part maps `[N, size, size]`, both uint8."""
    pairs = [render(person, size) for person in persons]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def part_mask(parts: NDArray[np.uint8], *names: str) -> NDArray[np.bool_]:
    """Where any of the named parts is on top: bool, the shape of `parts`."""
    return np.isin(parts, [PART_ID[name] for name in names])


@dataclass(frozen=True)
class Pair:
    """One person without and with an attribute; `region` `[size, size]` bool marks every pixel that differs."""

    without: NDArray[np.uint8]
    with_: NDArray[np.uint8]
    region: NDArray[np.bool_]


def counterfactual(person: Person, size: int = 128, /, **changes: Any) -> Pair:
    """Draw `person` as it is and with `changes`, and mark the pixels that change: the true edit region."""
    before, after = render(person, size)[0], render(person.with_(**changes), size)[0]
    return Pair(before, after, (before != after).any(axis=-1))


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` made darker (factor below 1) or lighter (above 1: towards white)."""
    if factor <= 1:
        return (colour[0] * factor, colour[1] * factor, colour[2] * factor)
    t = 1 - 1 / factor
    return (colour[0] + (1 - colour[0]) * t, colour[1] + (1 - colour[1]) * t, colour[2] + (1 - colour[2]) * t)


def jittered(colour: Colour, shifts: tuple[float, ...], amount: float = 0.035) -> Colour:
    """`colour` shifted a little per channel, clipped to [0, 1]."""
    r, g, b = (min(1.0, max(0.0, c + amount * s)) for c, s in zip(colour, shifts, strict=True))
    return (r, g, b)


def luma(colour: Colour) -> float:
    """Perceived brightness in [0, 1]."""
    return math.fsum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True))
