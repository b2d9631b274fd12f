# SPDX-License-Identifier: Apache-2.0
"""From the order of a pass's rows to what the model's forward is given: ``PassRows``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models.rows import (
    AttentionCall,
    CandidateRows,
    LayerRows,
    PassRows,
    RowAdapters,
    bucket,
)
from vllm_elastic.runner.adapters import PassAdapters
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.row_order import IntArray, RowOrder
from vllm_elastic.runner.upload import Upload

ONE_BATCH_AT_A_TIME = ("FLASHINFER", "FLEX_ATTENTION")
"""vLLM's attention backends whose metadata is lost when the next is built: they keep it in buffers
of their own, FLASHINFER in a wrapper with one plan. A pass needs one for each set of rows that some
layers work on, and one for the window, all at once."""

Piece = tuple[int, int, int]
"""Plan, first and end row of neighbours that attend to the same canvas."""


class BatchBuilder:
    """Builds the rows of one pass.

    Args:
        cache: whose blocks the plans name.
        adapters: of the plans; None: they have none.
        max_chunk_rows: rows that are worked on at a time; more go chunk by chunk.
    """

    def __init__(
        self,
        plans: Sequence[PassPlan],
        order: RowOrder,
        upload: Upload,
        attention_group: AttentionGroup,
        cache: CacheView,
        max_chunk_rows: int,
        adapters: PassAdapters | None = None,
    ) -> None:
        self._plans, self._order, self._upload = plans, order, upload
        self._attention_group = attention_group
        self._null_slots = cache.block_size  # vLLM's null block is the first one
        self._max_chunk_rows = max_chunk_rows
        self._adapters = adapters
        self._calls: list[tuple[AttentionCall, CommonAttentionMetadata]] = []
        blocks = [cache.kernel_blocks(plan.block_ids) for plan in plans]
        # int32 [plans, most blocks], filled up with the null block to a width that is a multiple of
        # 16: vLLM's Triton kernel is compiled once more for rows of other widths, when they come.
        self._block_table = filled_up(blocks, -(-max(map(len, blocks)) // 16) * 16, np.int32)
        self._lengths = np.array([len(plan.tokens) for plan in plans], dtype=np.int32)

    def lay_out(
        self, num_layers: int, tested_positions: IntArray, query_rows: IntArray
    ) -> PassRows:
        """Put everything into the upload; the rows are of use after ``finish``.

        Args:
            tested_positions: int64 [M], projected once more in every layer.
            query_rows: int64 [S] ascending, rows whose queries the recorder keeps.
        """
        order = self._order
        layers: list[LayerRows | None] = [None] * num_layers
        for join_layer in sorted({span.join_layer for span in order.spans}):
            active = self._layer_rows(join_layer, tested_positions, query_rows)
            layers[join_layer:] = [active] * (num_layers - join_layer)
        num_embedded = len(order.tokens)
        tokens = np.zeros(bucket(num_embedded), dtype=np.int64)
        tokens[:num_embedded] = order.tokens
        stored = None
        if order.stored.any():
            stored = np.zeros(len(tokens), dtype=np.bool_)
            stored[:num_embedded] = order.stored
        window_rows = [order.row_of[i][plan.window_rows] for i, plan in enumerate(self._plans)]
        return PassRows(
            tokens=self._upload.put(tokens),
            stored=None if stored is None else self._upload.put(stored),
            layers=layers,
            window=self._window(window_rows),
        )

    def finish(self) -> None:
        """After the upload was sent: build the attention metadata, which may read it."""
        for call, common in self._calls:
            # By the builder itself: the group maps block tables in a buffer of one row a request.
            builder = self._attention_group.get_metadata_builder()
            call.metadata = builder.build(common_prefix_len=0, common_attn_metadata=common)

    def _layer_rows(
        self, join_layer: int, tested_positions: IntArray, query_rows: IntArray
    ) -> LayerRows:
        order = self._order
        spans = [span for span in order.spans if span.join_layer <= join_layer]
        num_rows = spans[-1].stop
        num_projected = bucket(num_rows + len(tested_positions))
        positions = np.zeros(num_projected, dtype=np.int64)
        positions[:num_rows] = order.positions[:num_rows]
        positions[num_rows : num_rows + len(tested_positions)] = tested_positions
        # What is not written for good goes to the null block.
        slots = np.arange(num_projected, dtype=np.int64) % self._null_slots
        slots[:num_rows] = order.slots[:num_rows]
        return LayerRows(
            num_rows=num_rows,
            num_finished=bucket(num_rows),
            positions=self._upload.put(positions),
            slots=self._upload.put(slots),
            num_queries=int(np.searchsorted(query_rows, num_rows)),
            calls=self._chunked([(span.plan, span.start, span.stop) for span in spans]),
            adapters=self._adapters_of(
                [span.plan for span in spans] + list(range(len(self._plans))),
                [span.stop - span.start for span in spans]
                + [plan.tested.size for plan in self._plans],
                num_projected,
            ),
        )

    def _window(self, window_rows: list[IntArray]) -> CandidateRows:
        ends = np.cumsum([len(rows) for rows in window_rows]).tolist()
        starts = [0, *ends[:-1]]
        rows = np.zeros(bucket(ends[-1]), dtype=np.int64)
        rows[: ends[-1]] = np.concatenate(window_rows)
        return CandidateRows(
            rows=self._upload.put(rows),
            calls=self._chunked(list(zip(range(len(ends)), starts, ends, strict=True))),
            adapters=self._adapters_of(range(len(ends)), list(map(len, window_rows)), len(rows)),
        )

    def _adapters_of(
        self, owners: Sequence[int], lengths: Sequence[int], num_rows: int
    ) -> RowAdapters | None:
        """Args:
        owners: plan of each piece of rows; lengths: its rows; num_rows: all, filled up.
        """
        if self._adapters is None:
            return None
        return self._adapters.of_rows(np.repeat(np.array(owners, np.int64), lengths), num_rows)

    def _chunked(self, pieces: list[Piece]) -> list[AttentionCall]:
        """Cut rows into calls of at most the row budget."""
        calls = []
        num_rows = pieces[-1][2]
        for start in range(0, num_rows, self._max_chunk_rows):
            stop = min(start + self._max_chunk_rows, num_rows)
            owners = [index for index, first, last in pieces if first < stop and last > start]
            lengths = [
                min(last, stop) - max(first, start)
                for _, first, last in pieces
                if first < stop and last > start
            ]
            call = AttentionCall(start, stop, None)
            self._calls.append((call, self._common_metadata(owners, lengths)))
            calls.append(call)
        return calls

    def _common_metadata(self, owners: list[int], lengths: list[int]) -> CommonAttentionMetadata:
        """Each piece is one sequence of T keys, not causal.

        Args:
            owners: plan of each piece; lengths: its rows.
        """
        put = self._upload.put
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        keys = self._lengths[owners]
        return CommonAttentionMetadata(
            query_start_loc=put(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=put(keys),
            seq_lens_cpu_upper_bound=torch.from_numpy(keys),
            num_reqs=len(owners),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(lengths),
            max_seq_len=int(keys.max()),
            block_table_tensor=put(self._block_table[owners]),
            # Writes go by the slots of the pass's own rows.
            slot_mapping=put(np.empty(0, dtype=np.int64)),
            causal=False,
        )
