"""Training batches: conversations as token ids, masked as LLaDA's SFT masks them.

Knows nothing about the model. A pool (one optimiser step) depends on the seed and the step only,
so every worker makes the same one and takes micro-batches from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tokenizer as tokenizers
import torch
from tasks import TASKS, conversation
from torch import Tensor

CANVAS = 256
SMALLEST_T = 0.05  # bounds the weight 1/t
PAD_WEIGHT = 0.1  # of every EOS after the first
NUMBER_WEIGHT = 2.0  # of every number in a numbers-only mask, whose t is halved
WINDOW = 16
HORIZON = 24  # supervised masked positions of a left-to-right mask
VOCABULARY = tokenizers.vocabulary()
EOS, MASK = VOCABULARY[tokenizers.EOS], VOCABULARY[tokenizers.MASK]
NUMBERS = [VOCABULARY[str(number)] for number in range(100)]
TURN_END = VOCABULARY[tokenizers.TURN_END]

Converse = Callable[[random.Random, float, float, float], tuple[str, list[tuple[str, str]]]]


def header(role: str) -> list[int]:
    """Ids of the header of a turn."""
    return [VOCABULARY[t] for t in (tokenizers.HEADER, role, tokenizers.HEADER_END)]


@dataclass
class Sequence:
    """Ids, and where the answers are: [start, end) of every turn, its terminator included."""

    task: int
    ids: list[int]
    answers: list[tuple[int, int]]


@dataclass
class MicroBatch:
    """Inputs [batch, positions]; targets, weights and tasks of the supervised positions.

    `positions` indexes the flattened batch; `frontier` marks, among the supervised positions, the
    first masked one of a left-to-right mask.
    """

    inputs: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor
    frontier: Tensor


@dataclass(frozen=True)
class Mix:
    """Shares of the training sequences (see `tasks.conversation` and `mask`).

    `small`: single warm-up problems; `packed`: packed conversations; `long`: as long as the long
    prompts, among the packed; `canvas`: EOS tail up to the whole canvas; `ordered`: left-to-right
    masks; `numbers`: masks that hide nothing but numbers.
    """

    small: float
    packed: float
    long: float
    canvas: float
    ordered: float
    numbers: float


def sequence(rng: random.Random, mix: Mix, converse: Converse = conversation) -> Sequence:
    """One conversation with its EOS tail: short mostly, up to the whole canvas at times."""
    task, turns = converse(rng, mix.small, mix.packed, mix.long)
    ids, answers = [VOCABULARY[tokenizers.START]], []
    for question, answer in turns:
        ids += header("user") + [VOCABULARY[w] for w in question.split()] + [TURN_END]
        ids += header("assistant")
        start = len(ids)
        ids += [VOCABULARY[w] for w in answer.split()] + [TURN_END]
        answers.append((start, len(ids)))
    ids[-1] = EOS
    room = CANVAS - (len(ids) - answers[-1][0])
    tail = room if rng.random() < mix.canvas else rng.randint(0, 12)
    ids += [EOS] * max(0, min(tail, room))
    return Sequence(list(TASKS).index(task), ids, answers)


def mask(rng: np.random.Generator, item: Sequence, length: int, t: float, mix: Mix):
    """Masked positions and weights [length] of one sequence, and its frontier (or -1).

    By default every answer is masked as LLaDA does: each token with probability t, weighted 1/t.
    With probability `mix.numbers` only numbers are masked so (arithmetic with its operands in
    sight). With probability `mix.ordered` the last answer is masked as window decoding meets it:
    everything from a random cut on, but for some holes in the window behind the cut.
    """
    kind = rng.random()
    ordered, numeric = kind < mix.ordered, kind > 1 - mix.numbers
    numbers = np.zeros(length, bool)
    numbers[: len(item.ids)] = np.isin(item.ids, NUMBERS)
    numeric = numeric and bool(numbers[item.answers[-1][0] :].any())
    masked, weights = np.zeros(length, bool), np.zeros(length, np.float32)
    frontier = -1
    for index, (start, end) in enumerate(item.answers):
        last = index == len(item.answers) - 1
        end = length if last else end
        if last and ordered:
            cut = int(rng.integers(start, item.answers[-1][1]))
            masked[cut:] = True
            if rng.random() < 0.5:
                holes = rng.random(WINDOW) < rng.random() * 0.7
                masked[cut : cut + WINDOW] = ~holes[: length - cut]
                masked[cut] = True
            supervised = np.flatnonzero(masked[cut:])[:HORIZON] + cut
            weights[supervised] = min((item.answers[-1][1] - start) / HORIZON, 6.0)
            frontier = cut
        else:
            level = SMALLEST_T + (1 - SMALLEST_T) * (t if last else rng.random())
            if numeric:
                level = max(SMALLEST_T, level / 2)
            masked[start:end] = rng.random(end - start) < level
            if numeric:
                masked[start:end] &= numbers[start:end]
            weights[start:end] = masked[start:end] / level * (NUMBER_WEIGHT if numeric else 1)
    weights[item.answers[-1][1] :] *= PAD_WEIGHT
    return masked, weights, frontier


def pool(
    seed: int,
    step: int,
    tokens: int,
    mix: Mix,
    largest: int,
    converse: Converse = conversation,
) -> tuple[list[MicroBatch], float]:
    """The micro-batches of one step, longest first, and the number of answer tokens in it."""
    rng = random.Random(f"{seed}/{step}")
    items, total = [], 0
    while total < tokens:
        items.append(sequence(rng, mix, converse))
        total += len(items[-1].ids)
    items.sort(key=lambda item: -len(item.ids))
    noise = np.random.default_rng([seed, step])
    levels = (noise.permutation(len(items)) + noise.random()) / len(items)
    batches, answer_tokens, first = [], 0.0, 0
    while first < len(items):
        length = len(items[first].ids)
        # Attention makes long rows dear: about as much again at 600 positions.
        rows = max(1, int(largest / (length * (1 + length / 600))))
        chosen = items[first : first + rows]
        ids = np.full((len(chosen), length), EOS)
        masked = np.zeros((len(chosen), length), bool)
        weights = np.zeros((len(chosen), length), np.float32)
        frontier = np.zeros((len(chosen), length), bool)
        for row, item in enumerate(chosen):
            ids[row, : len(item.ids)] = item.ids
            answer_tokens += sum(end - start for start, end in item.answers)
            masked[row], weights[row], cut = mask(
                noise, item, length, float(levels[first + row]), mix
            )
            if cut >= 0:
                frontier[row, cut] = True
        at = np.flatnonzero(weights.reshape(-1))
        batches.append(
            MicroBatch(
                inputs=torch.from_numpy(np.where(masked, MASK, ids)),
                positions=torch.from_numpy(at),
                targets=torch.from_numpy(ids.reshape(-1)[at]),
                weights=torch.from_numpy(weights.reshape(-1)[at]),
                tasks=torch.from_numpy(np.repeat([i.task for i in chosen], length)[at]),
                frontier=torch.from_numpy(frontier.reshape(-1)[at]),
            )
        )
        first += rows
    return batches, answer_tokens
