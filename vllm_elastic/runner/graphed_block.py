# SPDX-License-Identifier: Apache-2.0
"""A layer whose two parts are replayed from graphs. Knows nothing of passes, plans or caches.

A graph has read and written the same addresses ever since it was captured. So what a part takes
is copied to where its graph reads it, unless it is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from vllm_elastic.models.layers import PreNormBlock

Tensors = tuple[torch.Tensor, ...]


class Graph(Protocol):
    """Work that was captured once.

    Attributes:
        outputs: what the work returned, at addresses that stay. Of those that it made itself, the
            numbers are lost when any graph is replayed that was captured by the same ``Graphs``.
    """

    @property
    def outputs(self) -> Tensors: ...

    def replay(self) -> None:
        """Do the work again, on what its inputs' addresses hold now."""
        ...


class Graphs(Protocol):
    """Captures graphs. The largest first: smaller ones then fit into its memory."""

    def capture(self, work: Callable[[], Tensors]) -> Graph:
        """The work runs at least once, on what its inputs hold at the moment."""
        ...


class StaticRows:
    """What the graphs of all layers and numbers of rows read, and what goes from part to part.

    Attributes:
        x: [N, d], a layer's input, and its output in the same place.
        positions: int64 [N].
        attended: [N, Hq, D], the attention output.
        cleared: rows of it that the graph which ran last has set to 0.
    """

    def __init__(self, count: int, model: Any) -> None:
        """Args:
        count: N, the most rows that a graph works on; model: a ``DiffusionTransformer``.
        """
        attention, weight = model.attention_layers[0], model.embed_tokens.weight
        heads = attention.num_heads, attention.head_size
        self.x = weight.new_zeros(count, model.width)
        self.positions = weight.new_zeros(count, dtype=torch.int64)
        self.attended = weight.new_zeros(count, *heads)
        self.cleared = 0
        self._positions_here: tuple[int, int] | None = None

    def start(self) -> None:
        """A new pass: its positions may lie where those of the pass before lay."""
        self._positions_here = None

    def take(self, x: torch.Tensor) -> None:
        """A layer's input [R, d]."""
        _copy(x, self.x)

    def take_positions(self, positions: torch.Tensor) -> None:
        """int64 [R]: the same for many layers of a pass, and copied for the first."""
        given = positions.data_ptr(), len(positions)
        if given != self._positions_here:
            _copy(positions, self.positions)
            self._positions_here = given

    def take_attended(self, attended: torch.Tensor) -> None:
        """The attention output [R, Hq * D]."""
        _copy(attended, self.attended.flatten(1))


class GraphedBlock:
    """Computes what a block computes (``models.layers.Block``).

    Invariant: q, k and v are of use until the next part of any layer is replayed, a layer's output
    until the next layer's. ``DiffusionTransformer.run`` needs them no longer.
    """

    def __init__(self, block: PreNormBlock, static: StaticRows) -> None:
        self._block, self._static = block, static
        self._project: dict[int, Graph] = {}
        self._finish: dict[int, Graph] = {}

    def capture(self, graphs: Graphs, count: int) -> None:
        """Capture both parts for so many rows."""
        block, static = self._block, self._static
        x, positions = static.x[:count], static.positions[:count]
        buffer = static.attended[:count]

        def project() -> Tensors:
            buffer.zero_()
            return block.project(x, positions)

        self._project[count] = graphs.capture(project)
        self._finish[count] = graphs.capture(lambda: (block.finish(x, buffer.flatten(1)),))

    # What was not captured for so many rows runs operator by operator.

    def project(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        graph = self._project.get(len(x))
        if graph is None:
            self._static.cleared = 0
            return self._block.project(x, positions)
        self._static.take(x)
        self._static.take_positions(positions)
        graph.replay()
        self._static.cleared = len(x)
        q, k, v = graph.outputs
        return q, k, v

    def attention_buffer(self, q: torch.Tensor) -> torch.Tensor:
        if len(q) not in self._finish:
            return self._block.attention_buffer(q)
        buffer = self._static.attended[: len(q)]
        return buffer if len(q) <= self._static.cleared else buffer.zero_()

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        graph = self._finish.get(len(x))
        if graph is None:
            return self._block.finish(x, attended)
        self._static.take(x)
        self._static.take_attended(attended)
        graph.replay()
        return graph.outputs[0]


def _copy(rows: torch.Tensor, place: torch.Tensor) -> None:
    if rows.data_ptr() != place.data_ptr():
        place[: len(rows)].copy_(rows)
