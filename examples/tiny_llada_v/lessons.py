# SPDX-License-Identifier: Apache-2.0
"""Training batches: pictures and questions as token ids, masked as the tiny LLaDA's are."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pictures import COLORS, SHAPES, SQUARES, draw
from questions import QUESTIONS, some_board
from seeing import tile
from torch import Tensor
from vocabulary import IMAGE, vocabulary

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
import tokenizer as text
from batches import MASK, Mix, Sequence, header, mask

CANVAS = 128
VOCABULARY = vocabulary()
_THINGS = {VOCABULARY[word] for word in (*COLORS, *SHAPES)}
TOLD = {
    "read": _THINGS,
    "count": {VOCABULARY[str(number)] for number in range(len(SQUARES))},
    "locate": {VOCABULARY[square] for square in SQUARES},
    "name": _THINGS,
}
"""Of each kind of question: ids that have to be looked up or counted."""
TURN_END, PICTURE = VOCABULARY[text.TURN_END], VOCABULARY[IMAGE]


@dataclass
class Lesson:
    """A picture's tile, the conversation about it, and which of its tokens are told by kind."""

    sequence: Sequence
    tile: Tensor
    told: list[int]


@dataclass
class MicroBatch:
    """Inputs [batch, positions], tiles [batch, 3, side, side], and what is supervised.

    `positions` indexes the flattened batch; targets, weights and `told` (the kind of question
    whose answer it is, where it is the first masked token of one and has to be looked up or
    counted, rather than copied; else -1) are of those.
    """

    inputs: Tensor
    tiles: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    told: Tensor


@dataclass(frozen=True)
class Share:
    """Of the lessons: `small` are made of warm-up questions, `several` of two or three of any."""

    small: float
    several: float
    kinds: dict[str, float]


def prompt_ids(question: str, positions: int) -> list[int]:
    """Ids of the chat template's prompt, with the picture's positions in it."""
    words = [VOCABULARY[word] for word in question.split()]
    start = [VOCABULARY[text.START], *header("user")]
    return [*start, *[PICTURE] * positions, *words, TURN_END, *header("assistant")]


def lesson(rng: random.Random, share: Share, mix: Mix, positions: int, side: int) -> Lesson:
    """One picture, its questions, and a tail of ends of turn."""
    things = some_board(rng, held_out=False)
    small = rng.random() < share.small
    several = (3, 6) if small else (2, 3) if rng.random() < share.several else (1, 1)
    turns = rng.randint(*several)
    ids: list[int] = []
    told: list[int] = []
    answers = []
    for turn in range(turns):
        (kind,) = rng.choices(list(share.kinds), list(share.kinds.values()))
        question, answer = QUESTIONS[kind](things, rng, small or (turn > 0 and rng.random() < 0.5))
        # A later turn is a prompt without start and picture.
        ids += prompt_ids(question, 0 if turn else positions)[turn > 0 :]
        start = len(ids)
        ids += [VOCABULARY[word] for word in answer.split()] + [TURN_END]
        answers.append((start, len(ids)))
        index = list(QUESTIONS).index(kind)
        told += [-1] * (start - len(told))
        told += [index if token in TOLD[kind] else -1 for token in ids[start:]]
    room = CANVAS - (len(ids) - answers[-1][0])
    tail = room if rng.random() < mix.canvas else rng.randint(0, 12)
    ids += [TURN_END] * max(0, min(tail, room))
    told += [-1] * (len(ids) - len(told))
    return Lesson(Sequence(0, ids, answers), tile(draw(things, rng), side), told)


def pool(
    seed: int, step: int, tokens: int, share: Share, mix: Mix, largest: int, sizes: tuple[int, int]
) -> tuple[list[MicroBatch], float]:
    """The micro-batches of one step, and the number of answer tokens in it."""
    rng = random.Random(f"pictures/{seed}/{step}")
    lessons: list[Lesson] = []
    while sum(len(item.sequence.ids) for item in lessons) < tokens:
        lessons.append(lesson(rng, share, mix, *sizes))
    lessons.sort(key=lambda item: -len(item.sequence.ids))
    noise = np.random.default_rng([seed, step])
    levels = (noise.permutation(len(lessons)) + noise.random()) / len(lessons)
    batches, answer_tokens, first = [], 0.0, 0
    while first < len(lessons):
        length = len(lessons[first].sequence.ids)
        chosen = lessons[first : first + max(1, largest // length)]
        shape = (len(chosen), length)
        ids = np.full(shape, TURN_END)
        masked, told = np.zeros(shape, bool), np.full(shape, -1)
        weights = np.zeros(shape, np.float32)
        for row, item in enumerate(chosen):
            sequence = item.sequence
            ids[row, : len(sequence.ids)] = sequence.ids
            answer_tokens += sum(end - start for start, end in sequence.answers)
            level = float(levels[first + row])
            masked[row], weights[row], _ = mask(noise, sequence, length, level, mix)
            for start, end in sequence.answers:
                first_masked = start + int(masked[row, start:end].argmax())
                told[row, first_masked] = item.told[first_masked]
        at = np.flatnonzero(weights.reshape(-1))
        batches.append(
            MicroBatch(
                inputs=torch.from_numpy(np.where(masked, MASK, ids)),
                tiles=torch.stack([item.tile for item in chosen]),
                positions=torch.from_numpy(at),
                targets=torch.from_numpy(ids.reshape(-1)[at]),
                weights=torch.from_numpy(weights.reshape(-1)[at]),
                told=torch.from_numpy(told.reshape(-1)[at]),
            )
        )
        first += len(chosen)
    return batches, answer_tokens
