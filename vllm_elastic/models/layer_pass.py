# SPDX-License-Identifier: Apache-2.0
"""One layer's part in a pass: its block's two functions of rows, and attention between them.

The two functions depend on the number of rows alone. What is between them depends on the batch:
whose rows attend to which keys, how many requests there are, what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from vllm.model_executor.layers.attention import Attention

from vllm_elastic.models.layers import Block
from vllm_elastic.models.rows import (
    AttentionCall,
    CandidateRows,
    LayerRows,
    Recorder,
    RowAdapters,
    chunks,
)


@dataclass(slots=True)
class LayerAttention:
    """A layer's attention in a pass: what is between its block's two functions.

    Attributes:
        layer: its number; attn: vLLM's attention layer.
        rows: what is active in the layer.
        window: of them those that the last layer has to finish; None: another layer, all of them.
    """

    layer: int
    attn: Attention
    rows: LayerRows
    window: CandidateRows | None
    recorder: Recorder | None

    def record(self, q: torch.Tensor) -> None:
        """Keep of the queries [P, Hq, D] what the recorder wants."""
        if self.recorder is not None:
            self.recorder.save_queries(self.layer, self.rows, q)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put keys and values [P, Hkv, D] into the paged cache."""
        slots = leading(self.rows.slots, k.shape[0])
        self.attn.impl.do_kv_cache_update(self.attn, k, v, self.attn.kv_cache, slots)

    def finished(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that the layer has to finish, of a tensor with one entry a row."""
        return rows if self.window is None else rows.index_select(0, self.window.rows)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attention output [R, Hq, D] of the queries [R, Hq, D]; rows of no call stay as they are.

        The backends attend to the paged keys; of the rows' own they take the number.
        """
        attn, calls = self.attn, (self.rows if self.window is None else self.window).calls
        if len(calls) == 1:  # as many rows as its metadata has
            attn.impl.forward(attn, q, k, v, attn.kv_cache, calls[0].metadata, output)
            return
        for call in calls:
            rows = slice(call.start, call.stop)
            attn.impl.forward(
                attn, q[rows], k[rows], v[rows], attn.kv_cache, call.metadata, output[rows]
            )


class NoCache(LayerAttention):
    """Where there is nothing to attend to yet: of queries, keys and values nothing is kept."""

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None: ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
    ) -> None:
        output.copy_(q)


class Layer(Protocol):
    """A way to compute a layer's part in a pass."""

    def __call__(
        self, x: torch.Tensor, projected: torch.Tensor, attention: LayerAttention
    ) -> torch.Tensor:
        """The output [R filled up, d] of the rows that the layer has to finish.

        Args:
            x: [R filled up, d], the layer's input; is written over.
            projected: [P, d], the same rows, and behind the active ones others that are projected
                for the recorder only; ``x`` itself where there are none.
        """
        ...


class LayerAsWritten:
    """Calls the block's functions as they are (``Layer``)."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __call__(
        self, x: torch.Tensor, projected: torch.Tensor, attention: LayerAttention
    ) -> torch.Tensor:
        block, now = self._block, attention.rows
        positions = leading(now.positions, projected.shape[0])
        q, k, v = project(block, projected, positions, now.calls, now.adapters)
        del projected
        attention.record(q)
        attention.write(k, v)
        calls, adapters = now.calls, now.adapters
        if attention.window is not None:
            x, q = attention.finished(x), attention.finished(q)
            calls, adapters = attention.window.calls, attention.window.adapters
        count = x.shape[0]
        q, k, v = leading(q, count), leading(k, count), leading(v, count)
        attended = block.attention_buffer(q)
        attention.attend(q, k, v, attended)
        del q, k, v  # the MLP needs the room
        return finish(block, x, attended.view(count, -1), calls, adapters)


def project(
    block: Block,
    x: torch.Tensor,
    positions: torch.Tensor,
    calls: list[AttentionCall],
    adapters: RowAdapters | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [P, Hq, D], k and v [P, Hkv, D] of all chunks: every chunk attends to all of them."""
    if len(calls) == 1:
        _use(adapters, 0, x.shape[0])
        return block.project(x, positions)
    each_chunk = _chunk_by_chunk(calls, len(x), adapters)
    parts = [block.project(x[rows], positions[rows]) for rows in each_chunk]
    q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
    return q, k, v


def finish(
    block: Block,
    x: torch.Tensor,
    attended: torch.Tensor,
    calls: list[AttentionCall],
    adapters: RowAdapters | None,
) -> torch.Tensor:
    """The layer's output [R filled up, d]."""
    if len(calls) == 1:
        _use(adapters, 0, x.shape[0])
        return block.finish(x, attended)
    each_chunk = _chunk_by_chunk(calls, len(x), adapters)
    return torch.cat([block.finish(x[rows], attended[rows]) for rows in each_chunk])


def leading(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The first so many rows; no operator where they are all."""
    # Not by len(), which is several calls of Python's for a tensor.
    return rows if rows.shape[0] == count else rows[:count]


def _chunk_by_chunk(
    calls: list[AttentionCall], total: int, adapters: RowAdapters | None
) -> Iterator[slice]:
    """Each chunk's rows; while it is at hand, layers work on them."""
    for start, stop in chunks(calls, total):
        _use(adapters, start, stop)
        yield slice(start, stop)


def _use(adapters: RowAdapters | None, start: int, stop: int) -> None:
    if adapters is not None:
        adapters.use(start, stop)
