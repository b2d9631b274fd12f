# SPDX-License-Identifier: Apache-2.0
"""A whole pass replayed from one graph, attention in it: one whose rows all join at layer 0.

All its rows start from the embedding, and each request's attend to one canvas. So for a number of
rows there is one sequence of operators, and passes differ in numbers: tokens, positions, slots,
which rows' candidates are wanted, which rows attend to which canvas. They are laid out in one
buffer, which is copied to where the graph reads it. What is measured is worked out of queries, of
which the graph keeps all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_elastic.models.rows import (
    AttentionCall,
    CandidateRows,
    LayerRows,
    PassRows,
    Recorder,
    bucket,
)
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.graphed_block import Graph, Graphs, Tensors
from vllm_elastic.runner.row_order import IntArray
from vllm_elastic.runner.statistics.pass_statistics import PassStatistics

MOST_REQUESTS = 16
"""Requests of one pass, at most. Of more, some refresh at nearly every step: rows join later."""

_ALIGNMENT = 4
"""Numbers of int32: kernels may read 16 bytes at a time."""


class GraphedPasses:
    """A graph for each number of rows.

    Invariant: hidden states are of use until any graph of the same ``Graphs`` is replayed.

    Args:
        model: a ``DiffusionTransformer`` whose caches are bound: graphs keep their addresses.
        inputs: what the graphs read.
        queries: what they keep; a pass that reads other layers' is of another kind.
    """

    def __init__(self, model: Any, inputs: PassInputs, queries: AllQueries) -> None:
        self._model, self._inputs, self._queries = model, inputs, queries
        self._graphs: dict[int, Graph] = {}
        self._rows: dict[int, PassRows] = {}  # graphs keep addresses only

    def capture(
        self,
        graphs: Graphs,
        counts: Iterable[int],
        builder: AttentionMetadataBuilder[Any],
        canvas: int,
    ) -> None:
        """Capture the whole pass for each number of rows.

        Args:
            builder: the attention backend's.
            canvas: positions of the longest one.
        """
        inputs = self._inputs
        for count in tqdm(sorted(counts, reverse=True), desc="Capturing whole passes"):
            numbers = inputs.of_one_request(count)
            metadata = [
                _metadata(builder, inputs.common_metadata(numbers, starts, canvas))
                for starts in (numbers.starts, numbers.window_starts)
            ]
            self._rows[count] = rows = _rows(numbers, self._model.num_layers, *metadata)
            self._graphs[count] = graphs.capture(functools.partial(self._run, rows))
        inputs.clear()

    def prepare(
        self, layout: PassLayout, statistics: PassStatistics
    ) -> Callable[[], torch.Tensor] | None:
        """Put a pass into the upload; None, and nothing was: it is of another kind."""
        order = layout.order
        count = bucket(len(order.positions))
        if (
            count not in self._graphs
            or len(order.tokens) < len(order.positions)  # rows join later
            or order.stored.any()  # or start from something else
            or layout.adapters is not None
            or not self._inputs.have_room_for(layout)
            or not self._queries.suffice(statistics)
        ):
            return None
        buffer = layout.upload.put(self._inputs.lay_out(layout, count))
        num_candidates = bucket(len(layout.window_rows))
        return functools.partial(self._replay, count, buffer, num_candidates, statistics)

    def _replay(
        self, count: int, buffer: torch.Tensor, num_candidates: int, statistics: PassStatistics
    ) -> torch.Tensor:
        self._inputs.take(buffer)
        graph = self._graphs[count]
        graph.replay()
        if statistics.recorder is not None:
            self._queries.hand_over(
                statistics.recorder, self._rows[count], len(statistics.query_rows)
            )
        return graph.outputs[0][:num_candidates]

    def _run(self, rows: PassRows) -> Tensors:
        return (self._model.run(rows, self._queries),)


class PassNumbers:
    """A pass's numbers in one buffer, and where each kind of them is in it.

    Rows that fill up attend too, to the last request's canvas, so that a graph always has as many
    queries. No other row sees them: they write the null block.

    Attributes:
        buffer: int64, all of it, on the host (numpy) or the device.
        tokens, positions, slots: int64 [count].
        window: int64 [count], the rows whose candidates are wanted, then row 0.
        lengths: int32 [most requests], T of each request's canvas; 1 where there is no request.
        starts, window_starts: int32 [most requests + 1], where each request's rows begin, and
            theirs among the window's rows; behind them ``count``: requests without any.
        blocks: int32 [requests, most blocks], the attention kernel's. Last, so that a buffer of
            few requests is short.
    """

    def __init__(self, buffer: Any, int32: Any, count: int, most_requests: int, width: int) -> None:
        """Args:
        int32: the type's name in numpy or torch. width: most blocks.
        """
        self.buffer = buffer
        self.tokens, self.positions, self.slots, self.window = buffer[: 4 * count].reshape(4, count)
        rest, ends = buffer[4 * count :].view(int32), _ends(most_requests)
        self.lengths = rest[:most_requests]
        self.starts = rest[ends[0] : ends[0] + most_requests + 1]
        self.window_starts = rest[ends[1] : ends[1] + most_requests + 1]
        self.blocks = rest[ends[2] :].reshape(-1, width)

    @staticmethod
    def size(count: int, most_requests: int, requests: int, width: int) -> int:
        """Numbers of int64 in a buffer of so many requests."""
        return 4 * count + (_ends(most_requests)[2] + requests * width) // 2


def _ends(most_requests: int) -> list[int]:
    """Where lengths, starts and the window's end, in numbers of int32."""
    sizes = most_requests, most_requests + 1, most_requests + 1
    return list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))


class PassInputs:
    """The buffer that the graphs of all numbers of rows read.

    Args:
        most_rows: of a pass; most_requests: likewise.
        most_blocks: of the attention kernel's, of a canvas; even, and as wide as any block table
            is filled.
    """

    def __init__(
        self, device: torch.device, most_rows: int, most_requests: int, most_blocks: int
    ) -> None:
        self._most_requests, self._width = most_requests, most_blocks
        size = PassNumbers.size(most_rows, most_requests, most_requests, most_blocks)
        self._buffer = torch.zeros(size, dtype=torch.int64, device=device)

    def of_one_request(self, count: int) -> PassNumbers:
        """Where the graph for so many rows reads: its rows are one request's, of one position."""
        self.take(torch.from_numpy(self._host_numbers(count, self._most_requests).buffer))
        size = PassNumbers.size(count, self._most_requests, self._most_requests, self._width)
        return self._numbers(self._buffer[:size], torch.int32, count)

    def have_room_for(self, layout: PassLayout) -> bool:
        """Whether there are as few requests, and each one's rows are neighbours."""
        requests = len(layout.plans)
        return requests <= self._most_requests and len(layout.order.spans) == requests

    def lay_out(self, layout: PassLayout, count: int) -> IntArray:
        """The buffer of a pass whose rows all join at layer 0, filled up to ``count``."""
        order, requests = layout.order, len(layout.plans)
        numbers = self._host_numbers(count, requests)
        num_rows, num_candidates = len(order.positions), len(layout.window_rows)
        numbers.tokens[:num_rows] = order.tokens
        numbers.positions[:num_rows] = order.positions
        numbers.slots[:num_rows] = order.slots
        numbers.slots[num_rows:] = layout.null_slots(count - num_rows)
        numbers.window[:num_candidates] = layout.window_rows
        numbers.lengths[:requests] = layout.lengths
        numbers.starts[:requests] = [span.start for span in order.spans]
        numbers.window_starts[:requests] = layout.window_ends[:-1]
        numbers.blocks[:, : layout.block_table.shape[1]] = layout.block_table
        buffer: IntArray = numbers.buffer
        return buffer

    def clear(self) -> None:
        """Numbers that any of the graphs may be launched on: no request has rows. One number of
        rows' are elsewhere than another's, which would take them for something else."""
        self._buffer.zero_()

    def take(self, buffer: torch.Tensor) -> None:
        """Copy a pass's numbers to where the graphs read them."""
        self._buffer[: len(buffer)].copy_(buffer)

    def common_metadata(
        self, numbers: PassNumbers, starts: torch.Tensor, canvas: int
    ) -> CommonAttentionMetadata:
        """One sequence a request. What the host is told is the most that a pass may have, of rows
        and of a canvas's positions."""
        count = len(numbers.tokens)
        lengths = torch.full((self._most_requests,), canvas, dtype=torch.int32, device="cpu")
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=numbers.lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=self._most_requests,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=canvas,
            block_table_tensor=numbers.blocks,
            slot_mapping=numbers.slots[:0],
            causal=False,
        )

    def _host_numbers(self, count: int, requests: int) -> PassNumbers:
        """All rows are the first request's."""
        size = PassNumbers.size(count, self._most_requests, requests, self._width)
        numbers = self._numbers(np.zeros(size, np.int64), np.int32, count)
        numbers.lengths[:] = 1
        numbers.starts[1:] = numbers.window_starts[1:] = count
        return numbers

    def _numbers(self, buffer: Any, int32: Any, count: int) -> PassNumbers:
        return PassNumbers(buffer, int32, count, self._most_requests, self._width)


def _rows(numbers: PassNumbers, num_layers: int, metadata: Any, window_metadata: Any) -> PassRows:
    """What the model's forward is given, at the addresses that stay."""
    count = len(numbers.tokens)
    layer = LayerRows(
        num_rows=count,
        num_finished=count,
        positions=numbers.positions,
        slots=numbers.slots,
        num_queries=0,
        calls=[AttentionCall(0, count, lambda: metadata)],
    )
    window = CandidateRows(numbers.window, [AttentionCall(0, count, lambda: window_metadata)])
    return PassRows(numbers.tokens, None, [layer] * num_layers, window)


class AllQueries:
    """Queries of all rows, kept by the graph (``models.rows.Recorder``) for the pass's recorder.

    Attributes:
        read_layers: whose.
    """

    old_inputs = None

    def __init__(self, model: Any, most_rows: int, read_layers: Iterable[int]) -> None:
        attention, weight = model.attention_layers[0], model.embed_tokens.weight
        self.read_layers: Set[int] = set(read_layers)
        self.tested_rows = weight.new_empty(0, dtype=torch.int64)
        heads = attention.num_heads, attention.head_size
        self._kept = {layer: weight.new_zeros(most_rows, *heads) for layer in self.read_layers}

    def save_queries(self, layer: int, rows: LayerRows, q: torch.Tensor) -> None:
        if layer in self.read_layers:
            self._kept[layer][: len(q)].copy_(q)

    def suffice(self, statistics: PassStatistics) -> bool:
        """Whether a pass's measurements want nothing else of it."""
        return not statistics.tested_positions.size and statistics.read_layers <= self.read_layers

    def hand_over(self, recorder: Recorder, rows: PassRows, num_queries: int) -> None:
        """What the layers would have given it.

        Args:
            rows: the graph's. num_queries: of them, that the recorder keeps.
        """
        layer = rows.layers[0]
        assert layer is not None
        active = replace(layer, num_queries=num_queries)
        for number in recorder.read_layers:
            recorder.save_queries(number, active, self._kept[number][: active.num_finished])


def bytes_of_passes(of_layers: int, layer_counts: int, counts: int) -> int:
    """About as many as CUDA keeps of graphs of whole passes.

    A whole pass has the launches of its layers' graphs, and between them attention's, the cache's
    writes and those of hidden states: some 20 a layer instead of 14.

    Args:
        of_layers: what it keeps of layers' graphs, for ``layer_counts`` numbers of rows.
        counts: numbers of rows that whole passes are for.
    """
    return -(-3 * of_layers * counts // (2 * layer_counts))


def most_requests(
    builder: AttentionMetadataBuilder[Any], vllm_config: VllmConfig, kv_cache_spec: Any
) -> int:
    """How many requests' rows an attention backend lets a graph have; 0: it takes no part."""
    support = builder.get_cudagraph_support(vllm_config, kv_cache_spec)
    if support is AttentionCGSupport.ALWAYS:
        return min(MOST_REQUESTS, vllm_config.scheduler_config.max_num_seqs)
    # Several have different numbers of rows.
    return int(support is AttentionCGSupport.UNIFORM_BATCH)


def _metadata(builder: AttentionMetadataBuilder[Any], common: CommonAttentionMetadata) -> Any:
    """The backend's own, of which nothing was worked out from canvases' present lengths."""
    # So FlashAttention 3 makes its schedule in the kernel and not here.
    metadata = builder.build(0, common, fast_build=True)
    if getattr(builder, "aot_schedule", False) and not metadata.max_num_splits:
        # It is left to cut keys as it likes, which in a graph takes a bound. vLLM's own has one.
        attention = builder.vllm_config.attention_config
        metadata.max_num_splits = attention.flash_attn_max_num_splits_for_cuda_graph
    return metadata
