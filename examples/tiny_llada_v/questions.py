# SPDX-License-Identifier: Apache-2.0
"""Questions about a board, with their answers as text. All are judged by the whole answer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pictures import COLORS, SHAPES, SIDE, SQUARES, Board, board, draw
from PIL import Image

HELD_OUT = 16
"""One board in so many is never trained on."""
LISTED = (11, 16)
"""Things or squares that a question lists."""
SMALL = (1, 5)
"""The same of a warm-up question."""


def read(things: Board, rng: random.Random, small: bool) -> tuple[str, str]:
    """What is on every square, in reading order; small: of a row."""
    named = [f"{square} {' '.join(thing)}" for square, thing in zip(SQUARES, things, strict=True)]
    if not small:
        return "Read the picture .", " ".join(named)
    row = rng.randrange(SIDE)
    return f"Read row {row + 1} .", " ".join(named[row * SIDE : (row + 1) * SIDE])


def count(things: Board, rng: random.Random, small: bool) -> tuple[str, str]:
    """How many things have a colour or a shape, counted square by square; small: in a row."""
    kind = rng.choice([*COLORS, *SHAPES])
    part = 0 if kind in COLORS else 1
    row = rng.randrange(SIDE)
    chosen = range(row * SIDE, (row + 1) * SIDE) if small else range(len(SQUARES))
    total, steps = 0, []
    for index in chosen:
        found = things[index][part]
        total += found == kind
        steps.append(f"{SQUARES[index]} {found} {total}")
    where = f" in row {row + 1}" if small else ""
    return f"Count {kind}{where} .", f"{' '.join(steps)} #### {total}"


def locate(things: Board, rng: random.Random, small: bool) -> tuple[str, str]:
    """On which squares some things are."""
    chosen = rng.sample(range(len(SQUARES)), rng.randint(*(SMALL if small else LISTED)))
    names = [" ".join(things[index]) for index in chosen]
    answer = [f"{name} {SQUARES[index]}" for name, index in zip(names, chosen, strict=True)]
    return f"Where are {' , '.join(names)} ?", " ".join(answer)


def name(things: Board, rng: random.Random, small: bool) -> tuple[str, str]:
    """What is on some squares, in any order."""
    chosen = rng.sample(range(len(SQUARES)), rng.randint(*(SMALL if small else LISTED)))
    answer = [f"{SQUARES[index]} {' '.join(things[index])}" for index in chosen]
    return f"What is at {' , '.join(SQUARES[i] for i in chosen)} ?", " ".join(answer)


QUESTIONS: dict[str, Callable[[Board, random.Random, bool], tuple[str, str]]] = {
    "read": read,
    "count": count,
    "locate": locate,
    "name": name,
}


@dataclass(frozen=True)
class Problem:
    """A picture, a question about it and the answer."""

    kind: str
    image: Image.Image
    question: str
    answer: str

    def check(self, text: str) -> bool:
        """Whether a text is the answer, word for word."""
        return text.split() == self.answer.split()


def is_held_out(things: Board) -> bool:
    """Whether a board is for measurements: a hash of what is on it says so."""
    text = " ".join(" ".join(thing) for thing in things)
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT == 0


def some_board(rng: random.Random, held_out: bool) -> Board:
    """A board of the one kind or the other."""
    while is_held_out(things := board(rng)) != held_out:
        pass
    return things


def problems(seed: int, number: int) -> Iterator[Problem]:
    """Held-out problems of all kinds in turn."""
    rng = random.Random(f"problems/{seed}")
    kinds = list(QUESTIONS)
    for index in range(number):
        things = some_board(rng, held_out=True)
        kind = kinds[index % len(kinds)]
        question, answer = QUESTIONS[kind](things, rng, False)
        yield Problem(kind, draw(things, rng), question, answer)
