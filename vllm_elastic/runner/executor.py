# SPDX-License-Identifier: Apache-2.0
"""How a pass is run on the device. The numbers are the same, whichever executor runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from tqdm import tqdm

from vllm_elastic.models.rows import PassRows, Recorder
from vllm_elastic.runner.graphed_block import GraphedBlock, Graphs, StaticRows

GRAPH_ROWS = "elastic_graph_rows"
"""Where vLLM's ``additional_config`` has the numbers of rows that graphs are captured for."""


class PassExecutor(Protocol):
    """Runs the model's forward over the rows of a pass."""

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        """Final normed hidden states [W, d] of the window's rows; fills the recorder."""
        ...


class EagerExecutor:
    """Operator by operator, as the model is written.

    Args:
        model: a ``DiffusionTransformer``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        hidden: torch.Tensor = self._model.run(rows, recorder)
        return hidden


class GraphExecutor:
    """Each layer's two parts by graphs; what is between them, attention above all, as written.

    What is between them depends on the batch: whose rows attend to which keys, how many requests
    there are, which rows join. The parts depend on the number of rows alone.

    Args:
        model: a ``DiffusionTransformer``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._static: StaticRows | None = None
        self._blocks: list[GraphedBlock] = []

    def capture(self, graphs: Graphs, counts: Iterable[int]) -> None:
        """All layers for each number of rows; until then, and for others, a pass is eager.

        Args:
            counts: numbers that ``models.rows.bucket`` gives.
        """
        largest_first = sorted(counts, reverse=True)
        self._static = static = StaticRows(largest_first[0], self._model)
        self._blocks = [GraphedBlock(block, static) for block in self._model.blocks]
        for count in tqdm(largest_first, desc="Capturing CUDA graphs"):
            with self._model.pass_context():
                for block in self._blocks:
                    block.capture(graphs, count)

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        blocks = None
        # Row chunks of one layer would overwrite each other's results.
        if self._static is not None and not rows.in_chunks:
            self._static.start()
            blocks = self._blocks
        hidden: torch.Tensor = self._model.run(rows, recorder, blocks)
        return hidden
