# SPDX-License-Identifier: Apache-2.0
"""Where the rows of each plan go in a pass: by join layer, then plan, then position. Numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

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
        parts = [plans[index].segments[number].positions for _, index, number in segments]
        spans, row = [], 0
        for (join_layer, index, _), part in zip(segments, parts, strict=True):
            spans.append(Span(join_layer, index, row, row + len(part)))
            row += len(part)
        positions = np.concatenate(parts).astype(np.int64)
        # All at once, as if the canvases of all plans, and their blocks, were one.
        owner = np.repeat([span.plan for span in spans], [len(part) for part in parts])
        starts = _starts(len(plan.tokens) for plan in plans)
        places = positions + starts[owner]
        row_of = np.full(starts[-1], -1, dtype=np.int64)
        row_of[places] = np.arange(row)
        first_blocks = _starts(len(plan.block_ids) for plan in plans)
        block_ids = np.fromiter(chain.from_iterable(p.block_ids for p in plans), np.int64)
        embedded = places[: sum(span.stop - span.start for span in spans if not span.join_layer)]
        stored = np.zeros(len(embedded), dtype=np.bool_)
        for plan, start in zip(plans, starts[:-1], strict=True):
            if plan.stored_inputs.size:
                stored |= np.isin(embedded, plan.stored_inputs + start)
        return cls(
            positions=positions,
            slots=slots_of(block_ids, positions + first_blocks[owner] * block_size, block_size),
            tokens=np.concatenate([plan.tokens for plan in plans])[embedded].astype(np.int64),
            stored=stored,
            row_of=[row_of[start:stop] for start, stop in pairwise(starts.tolist())],
            spans=spans,
        )


def _starts(lengths: Iterable[int]) -> IntArray:
    """int64 [N + 1]: where each of N begins, one behind the other, and where the last one ends."""
    return np.array(list(accumulate(lengths, initial=0)), dtype=np.int64)
