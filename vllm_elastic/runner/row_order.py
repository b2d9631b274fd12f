# SPDX-License-Identifier: Apache-2.0
"""Where the rows of each plan go in a pass: by join layer, then plan, then position. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.runner.ragged import bounds

IntArray = npt.NDArray[np.int64]

NO_ROWS: IntArray = np.empty(0, dtype=np.int64)


def slots_of(block_ids: IntArray, positions: IntArray, block_size: int) -> IntArray:
    """int64 [R]: where canvas positions [R] are in the paged cache."""
    blocks, within = np.divmod(positions, block_size)
    slots: IntArray = block_ids[blocks] * block_size + within
    return slots


class Span(NamedTuple):
    """Rows [start, stop) of one plan, which are neighbours.

    Attributes:
        join_layer: of rows of a pass, where one segment is a span.
    """

    plan: int
    start: int
    stop: int
    join_layer: int = 0


@dataclass(slots=True)
class RowOrder:
    """The rows of a pass.

    Attributes:
        positions, slots: int64 [R], canvas position and slot of the paged cache.
        tokens: int64 [R0], of the rows that join at layer 0.
        stored: bool [R0], of these, whose input is stored and no token's embedding.
        spans: in row order.
    """

    positions: IntArray
    slots: IntArray
    tokens: IntArray
    stored: npt.NDArray[np.bool_]
    spans: list[Span]
    _row_of: IntArray  # of a canvas position or -1; the canvases one behind the other
    _starts: list[int]  # where each plan's canvas begins there

    @classmethod
    def of(cls, plans: Sequence[PassPlan], block_size: int) -> RowOrder:
        """Args:
        block_size: positions a block of ``plan.block_ids`` has.
        """
        segments = [
            (segment.join_layer, index, segment.positions)
            for index, plan in enumerate(plans)
            for segment in plan.segments
        ]
        segments.sort(key=itemgetter(0))  # stable: plan by plan
        join_layers, owners, parts = zip(*segments, strict=True)
        lengths = list(map(len, parts))
        ends = bounds(lengths)
        positions = np.concatenate(parts, dtype=np.int64)
        # All at once, as if the canvases of all plans, and their blocks, were one.
        starts = bounds(len(plan.tokens) for plan in plans)
        places = positions + np.repeat([starts[owner] for owner in owners], lengths)
        row_of = np.full(starts[-1], -1, dtype=np.int64)
        row_of[places] = np.arange(len(positions))
        first_blocks = bounds(len(plan.block_ids) for plan in plans)
        blocked = positions + np.repeat([first_blocks[o] * block_size for o in owners], lengths)
        block_ids = np.concatenate([plan.block_ids for plan in plans], dtype=np.int64)
        embedded = places[: ends[join_layers.count(0)]]
        stored = np.zeros(len(embedded), dtype=np.bool_)
        for plan, start in zip(plans, starts[:-1], strict=True):
            if plan.stored_inputs.size:
                stored |= np.isin(embedded, plan.stored_inputs + start)
        return cls(
            positions=positions,
            slots=slots_of(block_ids, blocked, block_size),
            tokens=np.concatenate([plan.tokens for plan in plans], dtype=np.int64)[embedded],
            stored=stored,
            spans=list(map(Span, owners, ends, ends[1:], join_layers)),
            _row_of=row_of,
            _starts=starts,
        )

    def rows_of(self, positions: Mapping[int, npt.NDArray[np.integer]]) -> IntArray:
        """Rows of canvas positions, by the plan's index: int64, one plan's behind another's."""
        if not positions:
            return NO_ROWS
        parts = list(positions.values())
        starts = np.repeat([self._starts[index] for index in positions], list(map(len, parts)))
        rows: IntArray = self._row_of[np.concatenate(parts) + starts]
        return rows
