# SPDX-License-Identifier: Apache-2.0
"""Shows the model where to look, by losses on attention, and on what a middle layer would say.

A square's name is looked up by one word, which the tiny LLaDA can from the start. It cannot find a
thing by its color and shape at once, nor tell whether two words far apart are the same; and while
no head does, no other loss says what to look at.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from lessons import CANVAS, MASK, TURN_END, VOCABULARY, prompt_ids
from pictures import COLORS, SIDE, SQUARES, draw
from questions import count, locate, some_board
from seeing import TinyLLaDAV, tile
from torch import Tensor

HIDDEN = 0.7
"""Share of an answer's squares, or of its earlier numbers, that are masked."""


@dataclass
class Shown:
    """Canvases, and where the heads are to look on them.

    Attributes:
        heads: (layer, head) that are to look; behind: the layer that is asked what it would say.
        ids, tiles: of each canvas.
        slots: (canvas, position) of what looks; at: two positions each, either of which will do;
            weights: of each.
        told: (canvas, position, token id) that the layer behind is to tell.
    """

    heads: tuple[tuple[int, int], ...]
    behind: int
    ids: list[list[int]] = field(default_factory=list)
    tiles: list[Tensor] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    at: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    told: list[tuple[int, int, int]] = field(default_factory=list)


def things_to_find(model: TinyLLaDAV, rng: random.Random, number: int) -> Shown:
    """The squares of asked things: at the patch, which is on the canvas twice."""
    shown = Shown(heads=((2, 5), (3, 4), (3, 5)), behind=3)
    squares = {VOCABULARY[square]: index for index, square in enumerate(SQUARES)}
    for canvas in range(number):
        things = some_board(rng, held_out=False)
        question, answer = locate(things, rng, rng.random() < 0.5)
        ids = prompt_ids(question, model.positions)
        first, start = ids.index(model.image_token), len(ids)
        ids += [VOCABULARY[word] for word in answer.split()]
        for position in range(start, len(ids)):
            last = position == len(ids) - 1  # a square
            if ids[position] in squares and (last or rng.random() < HIDDEN):
                at = squares[ids[position]]
                again = SIDE**2 + at // SIDE * (SIDE + 1) + at % SIDE
                shown.slots.append((canvas, position))
                shown.at.append((first + at, first + again))
                shown.weights.append(1.0)
                shown.told.append((canvas, position, ids[position]))
                ids[position] = MASK
        shown.ids.append(ids)
        shown.tiles.append(tile(draw(things, rng), model.tower_shape.image_size))
    return shown


def words_to_compare(model: TinyLLaDAV, rng: random.Random, number: int) -> Shown:
    """The numbers of a count: at the asked word where it is what was found, else at the start."""
    shown = Shown(heads=((3, 0), (3, 1)), behind=5)
    for canvas in range(number):
        things = some_board(rng, held_out=False)
        question, answer = count(things, rng, False)
        asked = question.split()[1]
        ids = prompt_ids(question, model.positions)
        start = len(ids)
        word = ids.index(VOCABULARY[asked])
        ids += [VOCABULARY[text] for text in answer.split()]
        same = [thing[0 if asked in COLORS else 1] == asked for thing in things]
        wanted = rng.random() < 0.5
        told = rng.choice([i for i, s in enumerate(same) if s == wanted] or [0])
        for index in range(told + 1):
            position = start + 3 * index + 2
            shown.slots.append((canvas, position))
            shown.at.append((word, word + 1) if same[index] else (0, 1))
            shown.weights.append(7.0 if same[index] else 1.0)
            if index == told:
                shown.told.append((canvas, position, ids[position]))
                ids[position:] = [MASK] * (CANVAS - (position - start))
            elif rng.random() < HIDDEN / 2:
                ids[position] = MASK
        shown.ids.append(ids)
        shown.tiles.append(tile(draw(things, rng), model.tower_shape.image_size))
    return shown


def loss_of_looking(model: TinyLLaDAV, shown: Shown) -> tuple[Tensor, Tensor]:
    """How badly is looked and told; and the share that is told right.

    Minus the log of the attention to the right place, and the cross-entropy of what the layer
    behind would say if it were the last.
    """
    length = max(map(len, shown.ids))
    token_ids = torch.tensor([ids + [TURN_END] * (length - len(ids)) for ids in shown.ids])
    x = model.embedded(token_ids, torch.stack(shown.tiles).to(model.newline.dtype))
    row, position = torch.tensor(shown.slots).T
    at, weights = torch.tensor(shown.at), torch.tensor(shown.weights)
    cos, sin = model.language.cos[:length], model.language.sin[:length]
    parts = model.language.model["transformer"]
    losses = []
    for layer in range(shown.behind + 1):
        block = parts["blocks"][layer]
        q, k, v = block.before(x, cos, sin)
        attention = (q @ k.transpose(2, 3)).softmax(-1)
        for _, head in (pair for pair in shown.heads if pair[0] == layer):
            seen = attention[row, head, position].float().gather(1, at).sum(1)
            losses.append(-((seen + 1e-6).log() * weights).sum() / weights.sum())
        x = block.after(x, attention @ v)
    row, position, targets = torch.tensor(shown.told).T
    logits = model.language.head(parts["ln_f"](x[row, position])).float()
    right = (logits.argmax(-1) == targets).float().mean()
    return torch.stack(losses).mean() + F.cross_entropy(logits, targets), right
