# SPDX-License-Identifier: Apache-2.0
"""Where the rows of each plan go in a pass: by join layer, then plan, then position. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.plan import PassPlan

IntArray = npt.NDArray[np.int64]

NO_ROWS: IntArray = np.empty(0, dtype=np.int64)


def slots_of(block_ids: IntArray, positions: IntArray, block_size: int) -> IntArray:
    """int64 [R]: where canvas positions [R] are in the paged cache."""
    return block_ids[positions // block_size] * block_size + positions % block_size


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a pass: one segment of a plan."""

    join_layer: int
    plan: int
    start: int
    stop: int


@dataclass(slots=True)
class RowOrder:
    """The rows of a pass.

    Attributes:
        positions, slots: int64 [R], canvas position and slot of the paged cache.
        tokens: int64 [R0], of the rows that join at layer 0.
        stored: bool [R0], of these, whose input is stored and no token's embedding.
        row_of: per plan int64 [T], row of a canvas position or -1.
        spans: in row order.
    """

    positions: IntArray
    slots: IntArray
    tokens: IntArray
    stored: npt.NDArray[np.bool_]
    row_of: list[IntArray]
    spans: list[Span]

    @classmethod
    def of(cls, plans: Sequence[PassPlan], block_size: int) -> RowOrder:
        """Args:
        block_size: positions a block of ``plan.block_ids`` has.
        """
        segments = sorted(
            (segment.join_layer, index, number)
            for index, plan in enumerate(plans)
            for number, segment in enumerate(plan.segments)
        )
        row_of = [np.full(len(plan.tokens), -1, dtype=np.int64) for plan in plans]
        blocks = [np.asarray(plan.block_ids, dtype=np.int64) for plan in plans]
        positions, slots, tokens, spans = [], [], [NO_ROWS], []
        stored = [np.empty(0, dtype=np.bool_)]
        row = 0
        for join_layer, index, number in segments:
            own = plans[index].segments[number].positions.astype(np.int64)
            row_of[index][own] = np.arange(row, row + len(own))
            positions.append(own)
            slots.append(slots_of(blocks[index], own, block_size))
            if join_layer == 0:
                tokens.append(plans[index].tokens[own].astype(np.int64))
                of_images = plans[index].stored_inputs
                none = np.zeros(len(own), dtype=np.bool_)
                stored.append(np.isin(own, of_images) if of_images.size else none)
            spans.append(Span(join_layer, index, row, row + len(own)))
            row += len(own)
        return cls(
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            tokens=np.concatenate(tokens),
            stored=np.concatenate(stored),
            row_of=row_of,
            spans=spans,
        )
