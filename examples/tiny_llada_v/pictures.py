# SPDX-License-Identifier: Apache-2.0
"""Pictures: a board of six by six coloured things, no two alike, drawn a little unevenly."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

SIDE = 6
"""Squares of a board's side. Columns are named a to f from the left, rows 1 to 6 from the top."""
SQUARE = 64
"""Pixels of a square as drawn. The model's tile is smaller; its processor scales the picture."""
SQUARES = tuple(f"{column}{row}" for row in range(1, SIDE + 1) for column in "abcdef")
"""Their names, in reading order."""
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "orange": (245, 135, 25),
    "yellow": (245, 225, 60),
    "green": (45, 165, 70),
    "blue": (45, 95, 220),
    "purple": (140, 60, 185),
    "pink": (250, 160, 200),
    "white": (240, 240, 240),
}
BACKGROUND = (32, 34, 40)

Pen = ImageDraw.ImageDraw
Thing = tuple[str, str]
"""A colour and a shape."""
Board = list[Thing]
"""The thing on each of ``SQUARES``."""


def _around(x: float, y: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    """Corners at these distances from a centre, at even angles; the first points up."""
    step = 2 * math.pi / len(radii)
    return [
        (x + r * math.sin(turn + i * step), y - r * math.cos(turn + i * step))
        for i, r in enumerate(radii)
    ]


def _circle(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)


def _ring(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=round(r * 0.38))


def _square(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.polygon(_around(x, y, [r * 1.2] * 4, turn + math.pi / 4), fill=ink)


def _diamond(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.polygon(_around(x, y, [r * 1.2, r * 0.75] * 2, turn), fill=ink)


def _triangle(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.polygon(_around(x, y + r * 0.2, [r * 1.2] * 3, turn), fill=ink)


def _star(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    pen.polygon(_around(x, y, [r * 1.2, r * 0.45] * 5, turn), fill=ink)


def _cross(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    for quarter in (0, math.pi / 2):
        (ax, ay), (bx, by) = _around(x, y, [r * 1.1] * 2, turn + quarter)
        pen.line((ax, ay, bx, by), fill=ink, width=round(r * 0.55))


def _bar(pen: Pen, x: float, y: float, r: float, turn: float, ink: str) -> None:
    (ax, ay), (bx, by) = _around(x, y, [r * 1.15] * 2, turn + math.pi / 2)
    pen.line((ax, ay, bx, by), fill=ink, width=round(r * 0.7))


SHAPES: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "bar": _bar,
}


def board(rng: random.Random) -> Board:
    """36 of the 64 things in any order."""
    return rng.sample([(color, shape) for color in COLORS for shape in SHAPES], len(SQUARES))


def _shade(rng: random.Random, color: tuple[int, int, int], by: int) -> str:
    channels = (min(255, max(0, channel + rng.randint(-by, by))) for channel in color)
    return "#{:02x}{:02x}{:02x}".format(*channels)


def draw(things: Board, rng: random.Random) -> Image.Image:
    """The picture of a board: 384 x 384 pixels. Places, sizes, angles and shades vary a little."""
    image = Image.new("RGB", (SIDE * SQUARE, SIDE * SQUARE), _shade(rng, BACKGROUND, 12))
    pen = ImageDraw.Draw(image)
    for index, (color, shape) in enumerate(things):
        row, column = divmod(index, SIDE)
        x = (column + 0.5 + rng.uniform(-0.07, 0.07)) * SQUARE
        y = (row + 0.5 + rng.uniform(-0.07, 0.07)) * SQUARE
        radius = rng.uniform(0.29, 0.36) * SQUARE
        SHAPES[shape](pen, x, y, radius, rng.uniform(-0.15, 0.15), _shade(rng, COLORS[color], 14))
    return image
