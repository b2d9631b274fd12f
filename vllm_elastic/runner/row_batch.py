# SPDX-License-Identifier: Apache-2.0
"""A step plan as tensors: rows sorted by join layer, their slots, and attention metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.decoding.plan import PassPlan

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class Chunk:
    """Rows [start, stop) of a stage and the backend's attention metadata for them."""

    start: int
    stop: int
    metadata: Any


@dataclass(slots=True)
class Stage:
    """The layers between two join layers: the same rows are active in all of them.

    Attributes:
        num_rows: rows [0, num_rows) of the batch are active.
        positions: int64 [num_rows + M], canvas positions; the M tested rows' once more behind.
        num_queries: how many of the statistics' query rows are active.
    """

    join_layer: int
    num_rows: int
    positions: torch.Tensor
    num_queries: int
    chunks: list[Chunk]

    def spans(self, total: int) -> list[tuple[int, int]]:
        """The chunks' rows, the last span stretched to ``total`` rows."""
        bounds = [chunk.start for chunk in self.chunks] + [total]
        return list(pairwise(bounds))


@dataclass(slots=True)
class WindowRows:
    """The rows whose candidates are wanted, all that the last layer has to finish.

    Attributes:
        rows: int64 [W], plan by plan; chunks: over these W rows.
    """

    rows: torch.Tensor
    chunks: list[Chunk]


@dataclass(slots=True)
class RowLayout:
    """Where the rows of each plan went, in numpy: what the tensors are made from.

    Attributes:
        positions, slots: int64 [R], rows sorted by join layer, then plan, then position.
        tokens: int64 [R0], tokens of the rows that join at layer 0.
        row_of: per plan int64 [T], row of a canvas position or -1.
        spans: (join layer, plan index, first row, end row) of every segment, in row order.
    """

    positions: IntArray
    slots: IntArray
    tokens: IntArray
    row_of: list[IntArray]
    spans: list[tuple[int, int, int, int]]

    @classmethod
    def of(cls, plans: Sequence[PassPlan], block_size: int) -> RowLayout:
        segments = sorted(
            (segment.join_layer, index, number)
            for index, plan in enumerate(plans)
            for number, segment in enumerate(plan.segments)
        )
        row_of = [np.full(len(plan.tokens), -1, dtype=np.int64) for plan in plans]
        blocks = [np.asarray(plan.block_ids, dtype=np.int64) for plan in plans]
        positions, slots, tokens, spans = [], [], [], []
        row = 0
        for join_layer, index, number in segments:
            own = plans[index].segments[number].positions.astype(np.int64)
            row_of[index][own] = np.arange(row, row + len(own))
            positions.append(own)
            slots.append(blocks[index][own // block_size] * block_size + own % block_size)
            if join_layer == 0:
                tokens.append(plans[index].tokens[own].astype(np.int64))
            spans.append((join_layer, index, row, row + len(own)))
            row += len(own)
        empty = np.empty(0, dtype=np.int64)
        return cls(
            positions=np.concatenate(positions),
            slots=np.concatenate(slots),
            tokens=np.concatenate([empty, *tokens]),
            row_of=row_of,
            spans=spans,
        )


BuildMetadata = Callable[[list[tuple[int, int]]], Any]
"""(plan index, number of query rows) of each piece of a chunk -> attention metadata."""


@dataclass(slots=True)
class RowBatch:
    """A step plan on the device.

    Attributes:
        tokens: int64 [R0]; positions, slots: int64 [R].
        window: rows whose candidates are wanted.
        stages: ascending join layer.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    window: WindowRows
    stages: list[Stage]

    def stage_of(self, layer: int) -> Stage:
        """The stage that layer works on; an empty one before the first join layer."""
        active = [stage for stage in self.stages if stage.join_layer <= layer]
        return active[-1] if active else Stage(0, 0, self.positions[:0], 0, [])

    @classmethod
    def build(
        cls,
        plans: Sequence[PassPlan],
        layout: RowLayout,
        tested_positions: IntArray,
        query_rows: IntArray,
        max_chunk_rows: int,
        build_metadata: BuildMetadata,
        device: torch.device,
    ) -> RowBatch:
        """Put a layout on the device.

        Args:
            tested_positions: int64 [M], appended to every stage's positions.
            query_rows: int64 [S] ascending, rows whose queries the statistics keep.
            max_chunk_rows: rows a chunk may have; more are worked on chunk by chunk.
            build_metadata: makes the attention backend's metadata of one chunk.
        """

        def put(array: IntArray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        def chunked(spans: list[tuple[int, int, int]]) -> list[Chunk]:
            """Cut (plan index, first row, end row) spans into chunks of at most the budget."""
            chunks = []
            num_rows = spans[-1][2]
            for start in range(0, num_rows, max_chunk_rows):
                stop = min(start + max_chunk_rows, num_rows)
                pieces = [
                    (index, min(last, stop) - max(first, start))
                    for index, first, last in spans
                    if first < stop and last > start
                ]
                chunks.append(Chunk(start, stop, build_metadata(pieces)))
            return chunks

        stages = []
        for join_layer in sorted({span[0] for span in layout.spans}):
            spans = [span for span in layout.spans if span[0] <= join_layer]
            num_rows = spans[-1][3]
            stages.append(
                Stage(
                    join_layer=join_layer,
                    num_rows=num_rows,
                    positions=put(np.concatenate([layout.positions[:num_rows], tested_positions])),
                    num_queries=int(np.searchsorted(query_rows, num_rows)),
                    chunks=chunked([span[1:] for span in spans]),
                )
            )
        ends = np.cumsum([len(plan.window) for plan in plans]).tolist()
        starts = [0, *ends[:-1]]
        window = WindowRows(
            rows=put(np.concatenate([layout.row_of[i][p.window] for i, p in enumerate(plans)])),
            chunks=chunked(list(zip(range(len(plans)), starts, ends, strict=True))),
        )
        return cls(
            tokens=put(layout.tokens),
            positions=put(layout.positions),
            slots=put(layout.slots),
            window=window,
            stages=stages,
        )
