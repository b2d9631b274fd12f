# SPDX-License-Identifier: Apache-2.0
"""How a pass is run on the device. The numbers are the same, whichever executor runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from tqdm import tqdm

from vllm_elastic.models.layer_pass import Layer, LayerAsWritten
from vllm_elastic.models.rows import PassRows, Recorder
from vllm_elastic.runner.compiled_layer import compile_layers
from vllm_elastic.runner.graphed_block import GraphedBlock, Graphs, StaticRows
from vllm_elastic.runner.graphed_pass import GraphedPasses

GRAPH_ROWS = "elastic_graph_rows"
"""Where vLLM's ``additional_config`` has the numbers of rows that graphs of layers are for."""

GRAPHED_PASSES = "elastic_graphed_passes"
"""Where it has those of them that graphs of whole passes are for, too."""

COMPILES = "elastic_compiles"
"""Where it has whether layers are compiled."""


class PassExecutor(Protocol):
    """Runs the model's forward over the rows of a pass.

    Attributes:
        name: for people.
    """

    name: str

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        """Final normed hidden states [W, d] of the window's rows; fills the recorder."""
        ...


class EagerExecutor:
    """Operator by operator, as the model is written.

    Args:
        model: a ``DiffusionTransformer``.
    """

    name = "eager"

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

    name = "graphs"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._static: StaticRows | None = None
        self._layers: list[Layer] = []

    def capture(self, graphs: Graphs, counts: Iterable[int]) -> None:
        """All layers for each number of rows; until then, and for others, a pass is eager.

        Args:
            counts: numbers that ``models.rows.bucket`` gives.
        """
        largest_first = sorted(counts, reverse=True)
        self._static = static = StaticRows(largest_first[0], self._model)
        blocks = [GraphedBlock(block, static) for block in self._model.blocks]
        for count in tqdm(largest_first, desc="Capturing CUDA graphs"):
            with self._model.pass_context():
                for block in blocks:
                    block.capture(graphs, count)
        self._layers = [LayerAsWritten(block) for block in blocks]

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        layers = None
        # Row chunks of one layer would overwrite each other's results.
        if self._static is not None and not rows.in_chunks:
            self._static.start()
            layers = self._layers
        hidden: torch.Tensor = self._model.run(rows, recorder, layers)
        return hidden


class WholePassExecutor:
    """Passes whose rows all join at layer 0 by one graph each.

    Attributes:
        others: runs all other passes.
    """

    name = "whole passes"

    def __init__(self, passes: GraphedPasses, others: PassExecutor) -> None:
        self._passes, self.others = passes, others

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        hidden = self._passes.run(rows, recorder)
        return self.others.run(rows, recorder) if hidden is None else hidden


class CompiledExecutor:
    """Each layer by one compiled function, on CPUs.

    Args:
        model: a ``DiffusionTransformer``.
        most_rows: rows that a pass works on at a time; beyond them it is eager.

    Raises:
        Exception: whatever a compiler may raise; the model is as it was.
    """

    name = "compiled"

    def __init__(self, model: Any, most_rows: int) -> None:
        self._model = model
        self._layers = compile_layers(model, most_rows)

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        layers = None if rows.in_chunks else self._layers
        hidden: torch.Tensor = self._model.run(rows, recorder, layers)
        return hidden
