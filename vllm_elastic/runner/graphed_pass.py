# SPDX-License-Identifier: Apache-2.0
"""A whole pass replayed from one graph, attention in it: one whose rows all join at layer 0.

All its rows start from the embedding, and each request's attend to one canvas. So for a number of
rows there is one sequence of operators, and passes differ in numbers: tokens, positions, slots,
which rows' candidates are wanted, which rows attend to which canvas. They are copied to where the
graph reads them. What is measured is worked out of queries, of which the graph keeps all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

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
)
from vllm_elastic.runner.graphed_block import Graph, Graphs, Tensors

MOST_REQUESTS = 16
"""Of one pass. Of more, some refresh at nearly every step, so that rows join later."""


class GraphedPasses:
    """A graph for each number of rows.

    Invariant: hidden states are of use until any graph of the same ``Graphs`` is replayed.

    Args:
        model: a ``DiffusionTransformer`` whose caches are bound: graphs keep their addresses.
        inputs: what the graphs read.
        read_layers: whose queries are kept; a pass that reads others is of another kind.
    """

    def __init__(self, model: Any, inputs: PassInputs, read_layers: Iterable[int]) -> None:
        self._model, self._inputs = model, inputs
        self._queries = AllQueries(model, inputs.most_rows, read_layers)
        self._graphs: dict[int, Graph] = {}
        self._read: list[Any] = []  # by graphs, which keep addresses only

    def capture(
        self,
        graphs: Graphs,
        counts: Iterable[int],
        builder: AttentionMetadataBuilder[Any],
        canvas: int,
    ) -> None:
        """For each number of rows, all of the pass.

        Args:
            builder: the attention backend's.
            canvas: positions of the longest one.
        """
        inputs = self._inputs
        for count in tqdm(sorted(counts, reverse=True), desc="Capturing whole passes"):
            metadata = [
                _metadata(builder, inputs.pieces(starts, count, canvas))
                for starts in (inputs.starts, inputs.window_starts)
            ]
            self._read.append(metadata)
            rows = inputs.rows(count, self._model.num_layers, *metadata)
            self._graphs[count] = graphs.capture(functools.partial(self._run, rows))

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor | None:
        """Final normed hidden states [W, d] of the window's rows; None: another kind of pass."""
        layer = rows.layers[0]
        if layer is None or layer is not rows.layers[-1] or rows.stored is not None:
            return None  # rows join later, or start from something else
        graph = self._graphs.get(layer.num_finished)
        if graph is None or not self._queries.suffice(recorder) or not self._inputs.take(rows):
            return None
        graph.replay()
        if recorder is not None:
            self._queries.hand_over(recorder, layer)
        return graph.outputs[0][: len(rows.window.rows)]

    def _run(self, rows: PassRows) -> Tensors:
        return (self._model.run(rows, self._queries),)


class PassInputs:
    """What the graphs of all numbers of rows read.

    Rows that fill up attend too, to the last request's canvas, so that a graph always has as many
    queries. No other row sees them: they write the null block.

    Attributes:
        most_rows: of a pass; most_requests: likewise.
        starts, window_starts: int32 [most_requests + 1], where each request's rows begin, and
            theirs among the window's rows; behind them requests without any.
    """

    def __init__(
        self, device: torch.device, most_rows: int, most_requests: int, most_blocks: int
    ) -> None:
        """Args:
        most_blocks: of the attention kernel's, of a canvas; as wide as any block table is filled.
        """

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.most_rows, self.most_requests = most_rows, most_requests
        self.starts, self.window_starts = zeros(most_requests + 1), zeros(most_requests + 1)
        self._lengths, self._blocks = zeros(most_requests) + 1, zeros(most_requests, most_blocks)
        self._tokens, self._positions, self._slots, self._window = torch.zeros(
            4, most_rows, dtype=torch.int64, device=device
        )

    def take(self, rows: PassRows) -> bool:
        """Copy a pass whose rows all join at layer 0; False: there is no room for it."""
        layer, window = rows.layers[0], rows.window
        assert layer is not None
        if len(layer.calls) > 1 or layer.calls[0].pieces is None:
            return False
        pieces, windows = layer.calls[0].pieces, window.calls[0].pieces
        requests, count = pieces.num_reqs, layer.num_finished
        if requests > self.most_requests or windows.num_reqs != requests:
            return False
        self._tokens[:count].copy_(rows.tokens)
        self._positions[:count].copy_(layer.positions)
        self._slots[:count].copy_(layer.slots)
        chosen = len(window.rows)
        self._window[:chosen].copy_(window.rows)
        self._window[chosen:count].zero_()
        table = pieces.block_table_tensor
        self._blocks[:requests, : table.shape[1]].copy_(table)
        self._lengths[:requests].copy_(pieces.seq_lens)
        for starts, given in ((self.starts, pieces), (self.window_starts, windows)):
            starts[:requests].copy_(given.query_start_loc[:requests])
            starts[requests:].fill_(count)
        return True

    def rows(self, count: int, num_layers: int, metadata: Any, window_metadata: Any) -> PassRows:
        """What a pass of so many rows is given, at the addresses that stay."""
        layer = LayerRows(
            num_rows=count,
            num_finished=count,
            positions=self._positions[:count],
            slots=self._slots[:count],
            num_queries=0,
            calls=[AttentionCall(0, count, lambda: metadata)],
        )
        window = CandidateRows(
            self._window[:count], [AttentionCall(0, count, lambda: window_metadata)]
        )
        return PassRows(self._tokens[:count], None, [layer] * num_layers, window)

    def pieces(self, starts: torch.Tensor, count: int, canvas: int) -> CommonAttentionMetadata:
        """One sequence a request. What the host is told is the most that a pass may have, of rows
        and of a canvas's positions."""
        starts[1:].fill_(count)
        lengths = torch.full((self.most_requests,), canvas, dtype=torch.int32, device="cpu")
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=self._lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=self.most_requests,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=canvas,
            block_table_tensor=self._blocks,
            slot_mapping=self._slots[:0],
            causal=False,
        )


class AllQueries:
    """Those of all rows, kept by the graph (``models.rows.Recorder``) for the pass's own recorder.

    Attributes:
        read_layers: whose.
    """

    old_inputs = None

    def __init__(self, model: Any, most_rows: int, read_layers: Iterable[int]) -> None:
        attention, weight = model.attention_layers[0], model.embed_tokens.weight
        self.read_layers = set(read_layers)
        self.tested_rows = weight.new_empty(0, dtype=torch.int64)
        heads = attention.num_heads, attention.head_size
        self._kept = {layer: weight.new_zeros(most_rows, *heads) for layer in self.read_layers}

    def save_queries(self, layer: int, rows: LayerRows, q: torch.Tensor) -> None:
        if layer in self.read_layers:
            self._kept[layer][: len(q)].copy_(q)

    def suffice(self, recorder: Recorder | None) -> bool:
        """Whether a recorder wants nothing else."""
        if recorder is None:
            return True
        return recorder.old_inputs is None and recorder.read_layers <= self.read_layers

    def hand_over(self, recorder: Recorder, rows: LayerRows) -> None:
        """What the layers would have given it."""
        for layer in recorder.read_layers:
            recorder.save_queries(layer, rows, self._kept[layer][: rows.num_finished])


def most_requests(
    builder: AttentionMetadataBuilder[Any], vllm_config: VllmConfig, kv_cache_spec: Any
) -> int:
    """Of how many requests an attention backend lets a graph's rows be; 0: it takes no part."""
    support = builder.get_cudagraph_support(vllm_config, kv_cache_spec)
    if support is AttentionCGSupport.ALWAYS:
        return min(MOST_REQUESTS, vllm_config.scheduler_config.max_num_seqs)
    # Several have different numbers of rows.
    return int(support is AttentionCGSupport.UNIFORM_BATCH)


def _metadata(builder: AttentionMetadataBuilder[Any], pieces: CommonAttentionMetadata) -> Any:
    """The backend's own, of which nothing was worked out from canvases' present lengths."""
    # So FlashAttention 3 makes its schedule in the kernel and not here.
    metadata = builder.build(0, pieces, fast_build=True)
    if getattr(builder, "aot_schedule", False) and not metadata.max_num_splits:
        # It is left to cut keys as it likes, which in a graph takes a bound. vLLM's own has one.
        attention = builder.vllm_config.attention_config
        metadata.max_num_splits = attention.flash_attn_max_num_splits_for_cuda_graph
    return metadata
