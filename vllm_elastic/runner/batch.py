# SPDX-License-Identifier: Apache-2.0
"""From the order of a pass's rows to what the model's forward is given: ``PassRows``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

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
from vllm_elastic.runner.adapter_products import PassAdapters
from vllm_elastic.runner.cache_view import CacheView, table_width
from vllm_elastic.runner.ragged import bounds, filled_up
from vllm_elastic.runner.row_order import NO_ROWS, IntArray, RowOrder, Span
from vllm_elastic.runner.upload import Upload

ONE_BATCH_AT_A_TIME = ("FLASHINFER", "FLEX_ATTENTION")
"""vLLM's attention backends whose metadata is lost when the next is built: they keep it in buffers
of their own, FLASHINFER in a wrapper with one plan. A canvas in row chunks needs one a chunk in
every layer, over and over."""


class PassLayout:
    """Where the rows of a pass are, and what they attend to.

    Args:
        cache: whose blocks the plans name.
        adapters: of the plans; None: they have none.
        max_chunk_rows: rows that are worked on at a time; more go chunk by chunk.

    Attributes:
        lengths: int32 [plans], T of each plan's canvas.
        block_table: int32 [plans, most blocks], the attention kernel's, filled up with vLLM's null
            block.
        window_rows: int64 [W], plan by plan; window_ends: where each plan's begin among them, and
            the last one's end.
        window_adapters: of the W rows filled up; None: they have none.
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
        self.plans, self.order, self.upload = plans, order, upload
        self.adapters = adapters
        self._attention_group = attention_group
        self._null_slots = cache.block_size  # vLLM's null block is the first one
        self._max_chunk_rows = max_chunk_rows
        blocks = [cache.kernel_blocks(plan.block_ids) for plan in plans]
        self.lengths = np.array([len(plan.tokens) for plan in plans], dtype=np.int32)
        self.block_table = filled_up(blocks, table_width(max(map(len, blocks))), np.int32)
        self.window_ends = bounds(len(plan.window) for plan in plans)
        windows = {index: plan.window_rows for index, plan in enumerate(plans)}
        self.window_rows = order.rows_of(windows)
        ends = self.window_ends
        self._window_spans = list(map(Span, range(len(plans)), ends, ends[1:]))
        self.window_adapters = self._adapters_of(self._window_spans, bucket(ends[-1]))

    def put_rows(
        self, num_layers: int, tested_positions: IntArray, query_rows: IntArray
    ) -> PassRows:
        """Put everything into the upload; the rows are of use once it was sent.

        Args:
            tested_positions: int64 [M], projected once more in every layer.
            query_rows: int64 [S] ascending, rows whose queries the recorder keeps.
        """
        order = self.order
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
        return PassRows(
            tokens=self.upload.put(tokens),
            stored=None if stored is None else self.upload.put(stored),
            layers=layers,
            window=self._window(),
        )

    def _layer_rows(
        self, join_layer: int, tested_positions: IntArray, query_rows: IntArray
    ) -> LayerRows:
        order = self.order
        spans = [span for span in order.spans if span.join_layer <= join_layer]
        num_rows, num_tested = spans[-1].stop, len(tested_positions)
        num_projected = bucket(num_rows + num_tested)
        both = np.zeros((2, num_projected), dtype=np.int64)
        positions, slots = both
        positions[:num_rows] = order.positions[:num_rows]
        positions[num_rows : num_rows + num_tested] = tested_positions
        slots[:num_rows] = order.slots[:num_rows]
        slots[num_rows:] = self.null_slots(num_projected - num_rows)
        positions_on_device, slots_on_device = self.upload.put(both).unbind()
        tested = (Span(index, 0, plan.tested.size) for index, plan in enumerate(self.plans))
        return LayerRows(
            num_rows=num_rows,
            num_finished=bucket(num_rows),
            positions=positions_on_device,
            slots=slots_on_device,
            num_queries=int(query_rows.searchsorted(num_rows)),
            calls=self._chunked(spans),
            adapters=self._adapters_of(chain(spans, tested), num_projected),
        )

    def _window(self) -> CandidateRows:
        rows = np.zeros(bucket(self.window_ends[-1]), dtype=np.int64)
        rows[: self.window_ends[-1]] = self.window_rows
        return CandidateRows(
            rows=self.upload.put(rows),
            calls=self._chunked(self._window_spans),
            adapters=self.window_adapters,
        )

    def null_slots(self, count: int) -> IntArray:
        """int64 [count]: where rows write that nobody is going to read: vLLM's null block."""
        slots: IntArray = np.arange(count) % self._null_slots
        return slots

    def _adapters_of(self, spans: Iterable[Span], num_rows: int) -> RowAdapters | None:
        """The adapters of the spans' rows, one behind the other, filled up to so many."""
        if self.adapters is None:
            return None
        owners, lengths = zip(*((span.plan, span.stop - span.start) for span in spans), strict=True)
        return self.adapters.of_rows(np.repeat(np.array(owners, np.int64), lengths), num_rows)

    def _chunked(self, spans: list[Span]) -> list[AttentionCall]:
        """Cut rows into calls of at most the row budget."""
        num_rows, most = spans[-1].stop, self._max_chunk_rows
        if num_rows <= most:
            return [self._call(0, spans)]
        return [
            self._call(
                start,
                [
                    Span(span.plan, max(span.start, start), min(span.stop, start + most))
                    for span in spans
                    if span.start < start + most and span.stop > start
                ],
            )
            for start in range(0, num_rows, most)
        ]

    def _call(self, start: int, spans: list[Span]) -> AttentionCall:
        build = functools.partial(self._metadata, self._common_metadata(spans))
        return AttentionCall(start, spans[-1].stop, build)

    def _metadata(self, common: CommonAttentionMetadata) -> Any:
        """The backend's own metadata."""
        # By the builder itself: the group maps block tables in a buffer of one row a request.
        builder = self._attention_group.get_metadata_builder()
        return builder.build(common_prefix_len=0, common_attn_metadata=common)

    def _common_metadata(self, spans: list[Span]) -> CommonAttentionMetadata:
        """Each span is one sequence of T keys, not causal."""
        put = self.upload.put
        owners = [span.plan for span in spans]
        lengths = [span.stop - span.start for span in spans]
        starts = np.array(bounds(lengths), dtype=np.int32)
        keys = self.lengths[owners]
        return CommonAttentionMetadata(
            query_start_loc=put(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=put(keys),
            seq_lens_cpu_upper_bound=torch.from_numpy(keys),
            num_reqs=len(owners),
            num_actual_tokens=sum(lengths),
            max_query_len=max(lengths),
            max_seq_len=int(keys.max()),
            block_table_tensor=put(self.block_table[owners]),
            # Writes go by the slots of the pass's own rows.
            slot_mapping=put(NO_ROWS),
            causal=False,
        )
