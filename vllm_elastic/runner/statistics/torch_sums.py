# SPDX-License-Identifier: Apache-2.0
"""Attention of all plans by torch's operators, as much at a time as a CPU's cache has room for."""

from __future__ import annotations

import functools

import torch

from vllm_elastic.decoding.measurement import BlockProbe
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import joined
from vllm_elastic.runner.statistics.attention import AttentionReader
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.statistics.reading import Reading, ReadingPlanner
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import SavedRows
from vllm_elastic.runner.upload import Upload

_NUMBERS_AT_ONCE = 1 << 19
"""Keys and attention rows that are at hand at a time, in numbers."""


class TorchSums:
    """Sums of one pass by torch's operators (``attention_sums.AttentionSums``)."""

    def __init__(
        self,
        saved: SavedRows,
        cache: CacheView,
        drift: DriftTotals,
        blocks: BlockTotals,
        upload: Upload,
    ) -> None:
        self._cache, self._drift, self._blocks = cache, drift, blocks
        planner = ReadingPlanner(saved.owners, cache, upload, _NUMBERS_AT_ONCE)
        self._readings = planner.readings()
        self.read_layers = {layer for reading in self._readings for layer in reading.layers}

    def add_to_totals(self, recorder: PassRecorder) -> None:
        """Reading by reading."""
        reader = AttentionReader(self._cache, recorder)
        for reading in self._readings:
            parts = [self._mass(reader, reading, layers) for layers in reading.layer_parts()]
            mass = joined(parts)
            if isinstance(reading.tiles[0].owners[0].measure, BlockProbe):
                self._blocks.add_mass(reading.places, mass)
            else:
                self._drift.add_mass(reading.places, reading.layers, mass)

    def _mass(self, reader: AttentionReader, reading: Reading, layers: range) -> torch.Tensor:
        """The attention [layers, plans, longest T] that windows pay; drift goes to its total."""
        masses = []
        for tile in reading.tiles:
            mass, *drift = reader.sums(reading, tile, layers)
            masses.append(mass)
            if drift:  # of a plan that is alone
                num_rows = tile.owners[0].tested.size
                self._drift.add_drift(reading.indices[0], layers, num_rows, drift)
        return functools.reduce(torch.add, masses)
