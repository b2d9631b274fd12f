# SPDX-License-Identifier: Apache-2.0
"""A whole pass replayed from one graph, attention in it: of a request that is alone and predicts.

All rows of such a pass start from the embedding, attend to one canvas, and nothing is measured. So
for a number of rows there is one sequence of operators, and passes differ in numbers: tokens,
positions, slots, rows whose candidates are wanted, the canvas's length and its blocks. They are
copied to where the graph reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_elastic.models.rows import (
    AttentionCall,
    CandidateRows,
    LayerRows,
    PassRows,
    Recorder,
)
from vllm_elastic.runner.graphed_block import Graph, Graphs, Tensors


class GraphedPasses:
    """Invariant: hidden states are of use until any graph of the same ``Graphs`` is replayed.

    Rows that fill up attend here too, so that a graph always has the same queries. No other row
    sees them: they write the null block.
    """

    def __init__(self, model: Any, most_rows: int, most_blocks: int) -> None:
        """Args:
        model: a ``DiffusionTransformer`` whose caches are bound: graphs keep their addresses.
        most_blocks: of the attention kernel's, of a canvas; as wide as any block table is filled.
        """
        weight = model.embed_tokens.weight
        self._model = model
        self._tokens, self._positions, self._slots, self._window = weight.new_zeros(
            4, most_rows, dtype=torch.int64
        )
        self._length = weight.new_ones(1, dtype=torch.int32)
        self._blocks = weight.new_zeros(1, most_blocks, dtype=torch.int32)
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
        for count in tqdm(sorted(counts, reverse=True), desc="Capturing whole passes"):
            metadata = _metadata(builder, self._piece(count, canvas))
            self._read.append(metadata)
            rows = self._rows(count, metadata)
            self._graphs[count] = graphs.capture(functools.partial(self._run, rows))

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor | None:
        """Final normed hidden states [W, d] of the window's rows; None: another kind of pass."""
        layer, window = rows.layers[0], rows.window.rows
        if layer is None or layer is not rows.layers[-1]:
            return None  # rows join later
        graph = self._graphs.get(layer.num_finished)
        if graph is None or recorder is not None or rows.stored is not None:
            return None
        pieces = layer.calls[0].pieces
        if len(layer.calls) > 1 or pieces is None or pieces.num_reqs > 1:
            return None
        count, table = layer.num_finished, pieces.block_table_tensor
        self._tokens[:count].copy_(rows.tokens)
        self._positions[:count].copy_(layer.positions)
        self._slots[:count].copy_(layer.slots)
        self._window[len(window) : count].zero_()
        self._window[: len(window)].copy_(window)
        self._length.copy_(pieces.seq_lens)
        self._blocks[:, : table.shape[1]].copy_(table)
        graph.replay()
        return graph.outputs[0][: len(window)]

    def _run(self, rows: PassRows) -> Tensors:
        return (self._model.run(rows),)

    def _rows(self, count: int, metadata: Any) -> PassRows:
        """What a pass of so many rows is given, at the addresses that stay."""
        call = AttentionCall(0, count, lambda: metadata)
        layer = LayerRows(
            num_rows=count,
            num_finished=count,
            positions=self._positions[:count],
            slots=self._slots[:count],
            num_queries=0,
            calls=[call],
        )
        return PassRows(
            tokens=self._tokens[:count],
            stored=None,
            layers=[layer] * self._model.num_layers,
            window=CandidateRows(self._window[:count], [call]),
        )

    def _piece(self, count: int, canvas: int) -> CommonAttentionMetadata:
        """All rows are one sequence. What the host is told is the most that a pass may have."""
        starts = torch.tensor([0, count], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self._length.device),
            query_start_loc_cpu=starts,
            seq_lens=self._length,
            seq_lens_cpu_upper_bound=torch.tensor([canvas], dtype=torch.int32),
            num_reqs=1,
            num_actual_tokens=count,
            max_query_len=count,
            max_seq_len=canvas,
            block_table_tensor=self._blocks,
            slot_mapping=self._slots[:0],
            causal=False,
        )


def _metadata(builder: AttentionMetadataBuilder[Any], piece: CommonAttentionMetadata) -> Any:
    """The backend's own, of which nothing was worked out from the canvas's present length."""
    # So FlashAttention 3 makes its schedule in the kernel and not here.
    metadata = builder.build(0, piece, fast_build=True)
    if getattr(builder, "aot_schedule", False) and not metadata.max_num_splits:
        # It is left to cut keys as it likes, which in a graph takes a bound. vLLM's own has one.
        attention = builder.vllm_config.attention_config
        metadata.max_num_splits = attention.flash_attn_max_num_splits_for_cuda_graph
    return metadata
