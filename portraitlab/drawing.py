"""How a portrait is drawn: signed distance functions, antialiasing and the painting order.

Coordinates: the image spans [-1, 1] in both directions, y downwards. Head features live in a frame that is shifted,
scaled and tilted with the head; the body has its own, upright frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from portraitlab.portraits import (
    BACKGROUNDS,
    CLOTHES_COLOURS,
    EYE_COLOURS,
    HAIR_COLOURS,
    HAT_COLOURS,
    PART_ID,
    SCARF_COLOURS,
    SKINS,
    Colour,
    FloatArray,
    Person,
    jittered,
    luma,
    shade,
)

Distance = Callable[[FloatArray, FloatArray], FloatArray]
Box = tuple[float, float, float, float]  # centre x, centre y, half width, half height


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[FloatArray, FloatArray]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return axis[None, :], axis[:, None]


@dataclass(frozen=True)
class Frame:
    """A shifted, scaled and rotated coordinate system."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    angle: float = 0.0


class Canvas:
    """An image and its part map, painted shape by shape."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image: FloatArray = np.zeros((size, size, 3), np.float32)
        self.parts: NDArray[np.uint8] = np.zeros((size, size), np.uint8)

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The image as uint8 and the part map."""
        return (np.clip(self.image, 0, 1) * 255 + 0.5).astype(np.uint8), self.parts

    def paint(
        self,
        part: str | None,
        distance: Distance,
        colour: Colour | Callable[[FloatArray, FloatArray], FloatArray],
        box: Box,
        frame: Frame,
        opacity: float = 1.0,
        softness: float = 0.0,
    ) -> None:
        """Blend one shape over the image.

        Args:
            part: the part the covered pixels now belong to; None leaves the part map (blush, highlights).
            distance: signed distance of frame coordinates, negative inside.
            colour: RGB, or a function of the frame coordinates that gives `[h, w, 3]`.
            box: bounding box in frame coordinates.
            frame: where the shape lives.
            opacity: of the whole shape.
            softness: width of a blurred edge in frame units; 0 is one antialiased pixel.
        """
        cos, sin = math.cos(frame.angle), math.sin(frame.angle)
        cx = frame.x + frame.scale * (cos * box[0] - sin * box[1])
        cy = frame.y + frame.scale * (sin * box[0] + cos * box[1])
        hw = frame.scale * (abs(cos) * box[2] + abs(sin) * box[3] + softness)
        hh = frame.scale * (abs(sin) * box[2] + abs(cos) * box[3] + softness)
        half = self.size / 2
        x0, x1 = max(0, math.floor((cx - hw + 1) * half) - 1), min(self.size, math.ceil((cx + hw + 1) * half) + 1)
        y0, y1 = max(0, math.floor((cy - hh + 1) * half) - 1), min(self.size, math.ceil((cy + hh + 1) * half) + 1)
        if x0 >= x1 or y0 >= y1:
            return
        gx, gy = _grid(self.size)
        px, py = (gx[:, x0:x1] - frame.x) / frame.scale, (gy[y0:y1] - frame.y) / frame.scale
        x = cos * px + sin * py
        y = cos * py - sin * px
        width = max(1.0 / half / frame.scale, softness)
        alpha = np.clip(0.5 - distance(x, y) / width, 0.0, 1.0)
        if part is not None:
            region = self.parts[y0:y1, x0:x1]
            region[alpha >= 0.5] = PART_ID[part]
        if opacity != 1.0:
            alpha = alpha * np.float32(opacity)
        target = self.image[y0:y1, x0:x1]
        paint = colour(x, y) if callable(colour) else np.asarray(colour, np.float32)
        target += alpha[..., None] * (paint - target)


# -- distance functions ------------------------------------------------------------------------------------------------
def ellipse(cx: float, cy: float, a: float, b: float) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        u, v = (x - cx) / a, (y - cy) / b
        k = np.sqrt(u * u + v * v) + 1e-6
        g = np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-6
        return k * (k - 1) / g

    return distance


def box(cx: float, cy: float, a: float, b: float, r: float = 0.0) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        u, v = np.abs(x - cx) - (a - r), np.abs(y - cy) - (b - r)
        return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - r

    return distance


def segment(x0: float, y0: float, x1: float, y1: float, r: float) -> Distance:
    dx, dy = x1 - x0, y1 - y0
    length = dx * dx + dy * dy + 1e-9

    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / length, 0, 1)
        return np.hypot(x - x0 - t * dx, y - y0 - t * dy) - r

    return distance


def arc(cx: float, cy: float, half: float, bend: float, r: float) -> Distance:
    """A stroke along the parabola y = cy + bend * (1 - ((x - cx) / half)^2): bend > 0 sags like a smile."""

    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        u = np.clip((x - cx) / half, -1, 1)
        slope = -2 * bend * u / half
        off = (y - cy - bend * (1 - u * u)) / np.sqrt(1 + slope * slope)
        return np.hypot(off, np.maximum(np.abs(x - cx) - half, 0)) - r

    return distance


def union(*shapes: Distance) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        out = shapes[0](x, y)
        for shape in shapes[1:]:
            out = np.minimum(out, shape(x, y))
        return out

    return distance


def both(*shapes: Distance) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        out = shapes[0](x, y)
        for shape in shapes[1:]:
            out = np.maximum(out, shape(x, y))
        return out

    return distance


def minus(shape: Distance, *holes: Distance) -> Distance:
    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        out = shape(x, y)
        for hole in holes:
            out = np.maximum(out, -hole(x, y))
        return out

    return distance


def outline(shape: Distance, r: float) -> Distance:
    return lambda x, y: np.abs(shape(x, y)) - r


def below(y0: float) -> Distance:
    """The half plane y > y0."""
    return lambda x, y: y0 - y + 0 * x


# -- the portrait ------------------------------------------------------------------------------------------------------
def draw(canvas: Canvas, person: Person) -> None:
    """Paint a person on an empty canvas, back to front."""
    g = person.geometry
    head = Frame(g.x, g.y, g.scale, g.tilt)
    body = Frame(g.x * 0.5, 0.0, 1.0, 0.0)
    skin = jittered(SKINS[person.skin], g.jitter[0:3], 0.025)
    hair = jittered(HAIR_COLOURS[person.hair_colour], g.jitter[3:6], 0.03)
    cloth = jittered(CLOTHES_COLOURS[person.clothes_colour], g.jitter[6:9])
    _background(canvas, person)
    _hair_back(canvas, person, head, hair)
    _neck(canvas, head, body, skin)
    _clothes(canvas, person, body, cloth, skin)
    if person.hair_style == "long":
        for side in (-1, 1):
            x = 0.40 * side
            lock = segment(x, 0.0, x * 1.08, 0.62, 0.10 * g.hair_volume)
            canvas.paint("hair", lock, _hair_paint(hair, 0.92), (x, 0.3, 0.2, 0.5), head)
    if person.scarf:
        _scarf(canvas, person, head)
    face = _face_shape(person)
    _head(canvas, head, face, skin)
    if person.beard:
        _beard(canvas, person, head, face, hair)
    _face(canvas, person, head, skin, hair)
    _hair_front(canvas, person, head, hair)
    if person.glasses or person.sunglasses:
        _eyewear(canvas, person, head)
    if person.earrings:
        for side in (-1, 1):
            x = side * 0.415 + 0.01 * g.turn
            ring = union(outline(ellipse(x, 0.285, 0.052, 0.062), 0.019), ellipse(x, 0.215, 0.026, 0.026))
            canvas.paint("earrings", ring, (0.98, 0.80, 0.18), (x, 0.27, 0.09, 0.11), head)
    if person.hat:
        _hat(canvas, person, head)


def _background(canvas: Canvas, person: Person) -> None:
    g = person.geometry
    colour = np.asarray(jittered(BACKGROUNDS[person.background], g.jitter[9:12]), np.float32)
    canvas.image[:] = colour
    if person.texture == "plain":
        return
    x, y = _grid(canvas.size)
    other = np.asarray(shade((float(colour[0]), float(colour[1]), float(colour[2])), 0.80), np.float32)
    if person.texture == "striped":
        wave = np.cos((x + 0 * y) * math.pi * 4 + g.stripe * 6.283)
        amount = np.clip(0.5 + wave * canvas.size / 26, 0, 1)
    elif person.texture == "gradient":
        amount = (y * 0.5 + 0.5) * 1.0 + 0 * x
    else:
        u = np.abs(((x + g.stripe) * 2.5) % 1 - 0.5)
        v = np.abs(((y + g.stripe) * 2.5) % 1 - 0.5)
        amount = np.clip(0.5 - (np.hypot(u, v) - 0.22) / 2.5 * canvas.size / 2, 0, 1)
    canvas.image += amount[..., None].astype(np.float32) * (other - canvas.image)


def _hair_paint(hair: Colour, level: float = 1.0) -> Callable[[FloatArray, FloatArray], FloatArray]:
    """Hair with a soft band of light over the crown, darker towards the tips."""
    base = np.asarray(shade(hair, level), np.float32)
    light = np.asarray(shade(hair, 1.30 if luma(hair) > 0.2 else 1.18), np.float32) - base

    def paint(x: FloatArray, y: FloatArray) -> FloatArray:
        band = np.clip(1 - np.abs(y + 0.40 - 0.35 * x * x) * 7, 0, 1) * 0.8
        return base * np.clip(1.0 - 0.16 * (y + 0.1), 0.8, 1.03)[..., None] + band[..., None] * light

    return paint


def _hair_back(canvas: Canvas, person: Person, head: Frame, hair: Colour) -> None:
    v = person.geometry.hair_volume
    dark = _hair_paint(hair, 0.80)
    style = person.hair_style
    if style == "long":
        shape = union(ellipse(0, -0.10, 0.50 * v, 0.52 * v), box(0, 0.30, 0.50 * v, 0.48, 0.16))
        canvas.paint("hair", shape, dark, (0, 0.08, 0.6, 0.75), head)
    elif style == "bob":
        shape = union(ellipse(0, -0.08, 0.52 * v, 0.52 * v), box(0, 0.16, 0.51 * v, 0.26, 0.14))
        canvas.paint("hair", shape, dark, (0, 0, 0.62, 0.65), head)
    elif style == "curly":
        canvas.paint("hair", _curls(v), dark, (0, -0.12, 0.8, 0.7), head)
    elif style == "bun":
        canvas.paint("hair", ellipse(0, -0.60 * v, 0.21, 0.19), _hair_paint(hair, 1.0), (0, -0.6, 0.26, 0.26), head)


def _curls(v: float) -> Distance:
    """A big scalloped cloud of hair."""

    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        angle = np.arctan2(y + 0.12, x)
        return np.hypot(x / 1.08, y + 0.12) - v * (0.545 + 0.035 * np.cos(angle * 13))

    return distance


def _neck(canvas: Canvas, head: Frame, body: Frame, skin: Colour) -> None:
    top = head.y + 0.25 * head.scale
    neck = segment(head.x - 0.3 * head.angle, top, body.x, 0.78, 0.175)
    canvas.paint("skin", neck, shade(skin, 0.84), (0, 0.6, 0.5, 0.5), Frame())


def _clothes(canvas: Canvas, person: Person, body: Frame, cloth: Colour, skin: Colour) -> None:
    w = person.geometry.shoulders
    trunk = union(both(ellipse(0, 1.12, w, 0.52), below(0.5)), box(0, 1.3, w * 0.96, 0.35, 0.1))
    outside = (0.0, 0.9, w + 0.05, 0.45)
    base = np.asarray(cloth, np.float32)

    def paint(x: FloatArray, y: FloatArray) -> FloatArray:
        return base * np.clip(1.06 - 0.30 * np.abs(x) ** 2 - 0.0 * y, 0.7, 1.03)[..., None]

    dark = shade(cloth, 0.72) if luma(cloth) > 0.2 else shade(cloth, 1.25)
    canvas.paint("clothes", trunk, paint, outside, body)
    style = person.clothes
    if style == "t-shirt":
        canvas.paint("clothes", ellipse(0, 0.60, 0.27, 0.165), dark, (0, 0.62, 0.3, 0.2), body)
        canvas.paint("skin", ellipse(0, 0.585, 0.235, 0.145), shade(skin, 0.93), (0, 0.6, 0.26, 0.18), body)
    elif style == "sweater":
        collar = box(0, 0.60, 0.215, 0.12, 0.06)
        canvas.paint("clothes", collar, shade(cloth, 0.90) if luma(cloth) > 0.2 else dark, (0, 0.6, 0.25, 0.15), body)
        canvas.paint("clothes", arc(0, 0.665, 0.205, 0.035, 0.012), dark, (0, 0.69, 0.24, 0.06), body)
    elif style == "hoodie":
        hood = minus(ellipse(0, 0.66, 0.40, 0.22), ellipse(0, 0.585, 0.235, 0.145))
        canvas.paint("clothes", hood, dark, (0, 0.66, 0.42, 0.25), body)
        canvas.paint("skin", ellipse(0, 0.585, 0.235, 0.145), shade(skin, 0.93), (0, 0.6, 0.26, 0.18), body)
        string = (0.96, 0.96, 0.94) if luma(cloth) < 0.7 else (0.45, 0.45, 0.48)
        for side in (-1, 1):
            cord = segment(side * 0.13, 0.78, side * 0.15, 0.95, 0.020)
            canvas.paint("clothes", cord, string, (side * 0.14, 0.86, 0.05, 0.14), body)
    else:  # jacket: an open front over a pale shirt, with lapels
        shirt: Colour = (0.93, 0.93, 0.91) if luma(cloth) < 0.7 else (0.40, 0.42, 0.48)
        opening = lambda x, y: np.maximum((np.abs(x) - (1.02 - y) * 0.48) * 0.9, 0.55 - y)  # noqa: E731
        canvas.paint("clothes", opening, shirt, (0, 0.78, 0.3, 0.28), body)
        for side in (-1, 1):
            lapel = segment(side * 0.245, 0.56, 0.0, 1.04, 0.036)
            canvas.paint("clothes", lapel, dark, (side * 0.12, 0.8, 0.2, 0.3), body)
        canvas.paint("skin", ellipse(0, 0.575, 0.20, 0.135), shade(skin, 0.93), (0, 0.58, 0.22, 0.16), body)


def _scarf(canvas: Canvas, person: Person, head: Frame) -> None:
    colour = jittered(SCARF_COLOURS[person.geometry.scarf], person.geometry.jitter[12:15])
    side = 1 if person.geometry.parting > 0 else -1
    tail = segment(side * 0.17, 0.62, side * 0.21, 1.05, 0.115)
    frame = Frame(head.x * 0.75, 0.0, 1.0, 0.0)
    canvas.paint("scarf", tail, shade(colour, 0.85), (side * 0.19, 0.83, 0.18, 0.4), frame)
    loop = arc(0, 0.52, 0.31, 0.11, 0.115)
    canvas.paint("scarf", loop, colour, (0, 0.58, 0.44, 0.26), frame)
    canvas.paint(None, arc(0, 0.52, 0.30, 0.115, 0.012), shade(colour, 0.68), (0, 0.58, 0.4, 0.2), frame)


def _face_shape(person: Person) -> Distance:
    a, b, taper = {"oval": (0.375, 0.50, 0.26), "round": (0.415, 0.465, 0.10), "square": (0.385, 0.485, -0.04)}[
        person.face_shape
    ]
    taper -= person.geometry.jaw * 2
    a = a + (0.012 if person.presentation == "man" else 0.0)
    inner = ellipse(0, 0, a, b)

    def distance(x: FloatArray, y: FloatArray) -> FloatArray:
        narrow = 1 - taper * np.clip(y / b, 0, 1) ** 2
        return inner(x / narrow, y - 0.02)

    return distance


def _head(canvas: Canvas, head: Frame, face: Distance, skin: Colour) -> None:
    for side in (-1, 1):
        x = side * 0.40
        canvas.paint("skin", ellipse(x, 0.07, 0.075, 0.105), shade(skin, 0.92), (x, 0.07, 0.1, 0.12), head)
    base = np.asarray(skin, np.float32)
    paint = lambda x, y: base * np.clip(1.02 - 0.14 * np.abs(x) - 0.06 * y, 0.86, 1.02)[..., None]  # noqa: E731
    canvas.paint("skin", face, paint, (0, 0.02, 0.46, 0.54), head)


def _beard(canvas: Canvas, person: Person, head: Frame, face: Distance, hair: Colour) -> None:
    g = person.geometry
    t = 0.05 * g.turn
    colour = shade(hair, 0.88)
    grown = lambda x, y: face(x, y) - 0.030  # noqa: E731
    cheeks = ellipse(t, -0.06, 0.335, 0.325)
    canvas.paint("beard", both(minus(grown, cheeks), below(0.08)), colour, (0, 0.3, 0.46, 0.32), head)
    canvas.paint("beard", arc(t, 0.265, 0.15, -0.045, 0.040), colour, (t, 0.24, 0.22, 0.12), head)


def _face(canvas: Canvas, person: Person, head: Frame, skin: Colour, hair: Colour) -> None:
    g = person.geometry
    t = 0.06 * g.turn
    warm = (min(1.0, skin[0] * 1.02), skin[1] * 0.72, skin[2] * 0.70)
    for side in (-1, 1):
        x = side * 0.235 + t
        canvas.paint(None, ellipse(x, 0.185, 0.07, 0.05), warm, (x, 0.185, 0.1, 0.08), head, 0.45, 0.06)
    if person.freckles:
        spot = (skin[0] * 0.62, skin[1] * 0.47, skin[2] * 0.38)
        for index, (u, v) in enumerate(g.freckles):
            side = -1 if index % 2 else 1
            row, column = (index // 2) % 2, index // 4
            x = t + side * (0.085 + 0.062 * column + 0.020 * (u - 0.5))
            y = 0.135 + 0.085 * row + 0.030 * (v - 0.5) - 0.02 * (column == 3)
            canvas.paint("freckles", ellipse(x, y, 0.025, 0.025), spot, (x, y, 0.03, 0.03), head)
    _eyes(canvas, person, head, skin, hair, t)
    nose = shade(skin, 0.74)
    n = t * 1.5
    canvas.paint(None, arc(n, 0.165, 0.048 * g.nose, 0.028, 0.012), nose, (n, 0.18, 0.09, 0.06), head)
    canvas.paint(None, segment(n + 0.012, 0.04, n + 0.022, 0.15, 0.008), nose, (n, 0.1, 0.06, 0.1), head, 0.45)
    _mouth(canvas, person, head, skin, t)


def _eyes(canvas: Canvas, person: Person, head: Frame, skin: Colour, hair: Colour, t: float) -> None:
    g = person.geometry
    brow = shade(hair, 0.75) if luma(hair) > 0.12 else hair
    if person.hair_colour in ("blonde", "grey"):
        brow = shade(hair, 0.62)
    big = g.eye_size * (1.14 if person.expression == "surprised" else 1.0)
    lift, slant = {"surprised": (-0.05, 0.0), "sad": (-0.005, 0.045), "laughing": (-0.02, -0.01)}.get(
        person.expression, (0.0, -0.012)
    )
    squeeze = 0.72 if person.expression == "laughing" else 1.0
    iris = EYE_COLOURS[person.eye_colour]
    woman = person.presentation == "woman"
    for side in (-1, 1):
        x, y = side * g.eye_gap + t, 0.03
        a, b = 0.088 * big, 0.066 * big * squeeze
        near = (x, y, 0.15, 0.13)
        white = ellipse(x, y, a, b)
        canvas.paint("eyes", white, (0.99, 0.99, 0.98), near, head)
        ix = x + 0.022 * g.turn
        canvas.paint("eyes", both(ellipse(ix, y, 0.052 * big, 0.052 * big), white), iris, near, head)
        canvas.paint("eyes", both(ellipse(ix, y, 0.027 * big, 0.027 * big), white), (0.05, 0.04, 0.05), near, head)
        canvas.paint("eyes", ellipse(ix + 0.017, y - 0.018 * squeeze, 0.014, 0.014), (1.0, 1.0, 1.0), near, head)
        lid = arc(x, y + 0.004, a * 1.02, -b * 1.02, 0.020 if woman else 0.014)
        canvas.paint("eyes", lid, (0.10, 0.07, 0.07), near, head)
        if woman:
            lash = segment(x + side * a * 0.92, y - 0.018, x + side * (a + 0.035), y - 0.052, 0.012)
            canvas.paint("eyes", lash, (0.10, 0.07, 0.07), (x + side * a, y - 0.03, 0.06, 0.06), head)
        inner, outer = y - 0.125 + lift + g.brow - slant, y - 0.115 + lift + g.brow + slant
        stroke = segment(x - side * 0.075, inner, x + side * 0.085, outer, 0.017 if woman else 0.025)
        canvas.paint("brows", stroke, brow, (x, (inner + outer) / 2, 0.13, 0.09), head)


def _mouth(canvas: Canvas, person: Person, head: Frame, skin: Colour, t: float) -> None:
    g = person.geometry
    y, half = 0.315, 0.105 * g.mouth
    dark = luma(skin) < 0.45
    lip: Colour = (
        (0.78, 0.20, 0.23) if person.presentation == "woman" else shade((skin[0], skin[1] * 0.72, skin[2] * 0.72), 0.62)
    )
    if dark:
        lip = (0.66, 0.24, 0.25) if person.presentation == "woman" else (0.26, 0.11, 0.10)
    near = (t, y, 0.2, 0.14)
    expression = person.expression
    if expression == "smiling":
        canvas.paint("mouth", arc(t, y - 0.035, half * 1.25, 0.068, 0.024), lip, near, head)
    elif expression == "laughing":
        shape = both(ellipse(t, y - 0.05, half * 1.35, 0.140), below(y - 0.05))
        canvas.paint("mouth", shape, (0.48, 0.09, 0.11), near, head)
        canvas.paint("mouth", both(shape, lambda x, v: v - (y - 0.008) + 0 * x), (1.0, 1.0, 0.99), near, head)
    elif expression == "sad":
        canvas.paint("mouth", arc(t, y + 0.045, half * 1.05, -0.062, 0.023), lip, near, head)
    elif expression == "surprised":
        canvas.paint("mouth", ellipse(t, y + 0.01, 0.062, 0.078), lip, near, head)
        canvas.paint("mouth", ellipse(t, y + 0.01, 0.040, 0.055), (0.30, 0.06, 0.08), near, head)
    else:
        canvas.paint("mouth", segment(t - half, y, t + half, y, 0.022), lip, near, head)


def _hair_front(canvas: Canvas, person: Person, head: Frame, hair: Colour) -> None:
    g = person.geometry
    v = g.hair_volume
    t = 0.05 * g.turn
    paint = _hair_paint(hair)
    style = person.hair_style
    near = (0.0, -0.22, 0.66, 0.62)
    cap = ellipse(0, -0.10, 0.455 * (0.5 + v / 2), 0.475 * (0.6 + 0.4 * v))
    if style in ("long", "bun"):  # parted in the middle or at a side
        p = 0.12 * g.parting
        open_ = union(ellipse(-0.17 + p + t, 0.14, 0.27, 0.44), ellipse(0.17 + p + t, 0.14, 0.27, 0.44))
        shape = minus(cap, both(open_, ellipse(t, 0.16, 0.40, 0.60)))
        if style == "bun":
            shape = both(shape, lambda x, y: y - 0.02 + 0 * x)
    elif style == "bob":  # a straight fringe
        shape = minus(cap, box(t, 0.32, 0.315, 0.46, 0.10))
    elif style == "curly":
        hole = ellipse(t, 0.17, 0.345, 0.43)
        curls = _curls(v * 0.90)
        shape = both(minus(curls, hole), lambda x, y: y - 0.05 + 0 * x)
    elif style == "swept":  # a wave to one side
        side = 1 if g.parting > 0 else -1
        hole = ellipse(side * 0.16 + t, 0.22, 0.43, 0.45)
        low = lambda x, y: y - (0.02 + side * 0.0 * x)  # noqa: E731
        shape = both(minus(union(cap, ellipse(-side * 0.10, -0.42 * v, 0.38, 0.17)), hole), low)
    else:  # short
        hole = box(t, 0.30, 0.345, 0.50, 0.17)
        shape = both(minus(cap, hole), lambda x, y: y - 0.04 + 0 * x)
    canvas.paint("hair", shape, paint, near, head)


def _eyewear(canvas: Canvas, person: Person, head: Frame) -> None:
    g = person.geometry
    t = 0.06 * g.turn
    dark = person.sunglasses
    frame = (
        ((0.08, 0.08, 0.10), (0.45, 0.16, 0.10), (0.16, 0.20, 0.42))[int(g.frame * 3)]
        if not dark
        else (0.05, 0.05, 0.07)
    )
    part = "sunglasses" if dark else "glasses"
    y = 0.035 if not dark else 0.045
    for side in (-1, 1):
        x = side * (g.eye_gap + 0.012) + t
        arm = segment(x + side * 0.13, y - 0.01, side * 0.41, y - 0.02, 0.016)
        canvas.paint(part, arm, frame, (x + side * 0.2, y, 0.2, 0.06), head)
        if dark:
            lens = box(x, y + 0.01, 0.158, 0.118, 0.075)
            glow = np.asarray(frame, np.float32)

            def tint(u: FloatArray, w: FloatArray, glow: FloatArray = glow, y: float = y) -> FloatArray:
                return (
                    glow + np.clip(0.20 - 0.9 * (w - y + 0.12), 0, 0.2)[..., None].astype(np.float32) + 0 * u[..., None]
                )

            canvas.paint(part, lens, tint, (x, y, 0.18, 0.15), head)
        else:
            lens = ellipse(x, y, 0.140, 0.128) if g.frame * 6 % 2 < 1 else box(x, y, 0.142, 0.112, 0.045)
            canvas.paint(None, lens, (1.0, 1.0, 1.0), (x, y, 0.18, 0.16), head, 0.16)
            canvas.paint(part, outline(lens, 0.019), frame, (x, y, 0.18, 0.16), head)
    bridge = arc(t, y - 0.005, 0.05, -0.02, 0.018)
    canvas.paint(part, bridge, frame, (t, y, 0.08, 0.05), head)


def _hat(canvas: Canvas, person: Person, head: Frame) -> None:
    g = person.geometry
    colour = jittered(HAT_COLOURS[g.hat], g.jitter[12:15])
    crown = union(box(0, -0.56, 0.40, 0.27, 0.16), box(0, -0.42, 0.45, 0.13, 0.05))
    canvas.paint("hat", crown, colour, (0, -0.56, 0.5, 0.32), head)
    canvas.paint("hat", arc(0, -0.40, 0.445, 0.045, 0.05), shade(colour, 0.62), (0, -0.38, 0.5, 0.14), head)
    brim = minus(ellipse(0, -0.335, 0.66, 0.125), ellipse(0, -0.46, 0.60, 0.115))
    canvas.paint("hat", brim, shade(colour, 0.90), (0, -0.33, 0.7, 0.15), head)
