# SPDX-License-Identifier: Apache-2.0
"""How a pass is run on the device. The numbers are the same, whichever executor runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from vllm_elastic.models.layer_pass import Layer, LayerAsWritten
from vllm_elastic.models.rows import PassRows, Recorder
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.compiled_layer import compile_layers
from vllm_elastic.runner.graphed_block import GraphedBlock, Graphs, StaticRows
from vllm_elastic.runner.graphed_pass import GraphedPasses
from vllm_elastic.runner.statistics.pass_statistics import PassStatistics


class PassExecutor(Protocol):
    """Runs passes.

    Attributes:
        name: for people.
    """

    name: str

    def prepare(self, layout: PassLayout, statistics: PassStatistics) -> Callable[[], torch.Tensor]:
        """Put what a pass reads into its upload.

        Returns:
            what runs the pass, once the upload was sent and the statistics have kept what is going
            to be overwritten: it fills their recorder, and gives final normed hidden states
            [W filled up, d] of the window's rows.
        """
        ...


class LayerByLayer:
    """Executors that are given a pass's rows in each layer.

    Args:
        model: a ``DiffusionTransformer``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def prepare(self, layout: PassLayout, statistics: PassStatistics) -> Callable[[], torch.Tensor]:
        rows = layout.put_rows(
            self._model.num_layers, statistics.tested_positions, statistics.query_rows
        )
        return lambda: self.run(rows, statistics.recorder)

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        """The pass: hidden states, as above; fills the recorder."""
        hidden: torch.Tensor = self._model.run(rows, recorder, self._layers_for(rows))
        return hidden

    def _layers_for(self, rows: PassRows) -> Sequence[Layer] | None:
        """Stand-ins for the model's own layers; None: none."""
        return None


class EagerExecutor(LayerByLayer):
    """Operator by operator, as the model is written."""

    name = "eager"


class GraphExecutor(LayerByLayer):
    """Each layer's two parts by graphs; what is between them, attention above all, as written.

    What is between them depends on the batch: whose rows attend to which keys, how many requests
    there are, which rows join. The parts depend on the number of rows alone.
    """

    name = "graphs"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._static: StaticRows | None = None
        self._layers: list[Layer] = []

    def capture(self, graphs: Graphs, counts: Iterable[int]) -> None:
        """Capture all layers for each number of rows; until then, and for others, a pass is eager.

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

    def _layers_for(self, rows: PassRows) -> Sequence[Layer] | None:
        # Row chunks of one layer would overwrite each other's results.
        if self._static is None or rows.in_chunks:
            return None
        self._static.start()
        return self._layers


class WholePassExecutor:
    """Passes whose rows all join at layer 0 by one graph each.

    Attributes:
        others: runs all other passes.
    """

    name = "whole passes"

    def __init__(self, passes: GraphedPasses, others: PassExecutor) -> None:
        self._passes, self.others = passes, others

    def prepare(self, layout: PassLayout, statistics: PassStatistics) -> Callable[[], torch.Tensor]:
        run = self._passes.prepare(layout, statistics)
        return self.others.prepare(layout, statistics) if run is None else run


class CompiledExecutor(LayerByLayer):
    """Each layer by one compiled function, on CPUs.

    Args:
        most_rows: rows that a pass works on at a time; beyond them it is eager.

    Raises:
        Exception: whatever a compiler may raise; the model is as it was.
    """

    name = "compiled"

    def __init__(self, model: Any, most_rows: int) -> None:
        super().__init__(model)
        self._layers = compile_layers(model, most_rows)

    def _layers_for(self, rows: PassRows) -> Sequence[Layer] | None:
        return None if rows.in_chunks else self._layers
