# SPDX-License-Identifier: Apache-2.0
"""Attention of all plans by Triton's kernels: what they read is put together before the pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.attention.paged_statistics import (
    PAPER,
    RELEASED,
    Before,
    PagedKeys,
    PagedReading,
    PagedStatistics,
    PlanEntry,
    Rows,
)
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.row_order import NO_ROWS
from vllm_elastic.runner.statistics import memory
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import OwnRows, SavedRows
from vllm_elastic.runner.upload import Upload

_STATISTICS = {"released": RELEASED, "paper": PAPER}


@dataclass(slots=True)
class _SumsOfMany:
    """``PagedStatistics.drift_sums`` of some layers (``drift.PendingSums``)."""

    statistics: PagedStatistics
    reading: PagedReading
    statistic: int
    num_heads: int
    sums: list[torch.Tensor]

    def add_to(self, similarities: torch.Tensor) -> None:
        (sums,) = self.sums
        self.statistics.similarities(
            self.reading, self.statistic, sums, self.num_heads, similarities
        )


class KernelSums:
    """Sums of one pass by Triton's kernels (``attention_sums.AttentionSums``)."""

    def __init__(
        self,
        saved: SavedRows,
        cache: CacheView,
        drift: DriftTotals,
        blocks: BlockTotals,
        upload: Upload,
    ) -> None:
        self._cache, self._drift, self._upload = cache, drift, upload
        self._num_rows = len(saved.query_rows) + len(saved.tested_positions)
        self._in_window = np.zeros(len(saved.query_rows), dtype=np.float32)
        self._tested, self._written_at = [NO_ROWS], [NO_ROWS]
        self._blocks: list[npt.NDArray[np.int32]] = []
        self._num_blocks = self._num_written = 0
        self.read_layers: set[int] = set()
        entries_of = {
            totals: [self._entry(place, own) for place, own in enumerate(totals.owners.values())]
            for totals in (drift, blocks)
        }
        self._readings = [
            (totals, reading)
            for totals, entries in entries_of.items()
            for group in self._groups(entries)
            for reading in self._readings_of(group)
        ]
        self._shared = (
            upload.put(self._in_window),
            upload.put(np.concatenate(self._blocks)),
            upload.put(np.concatenate(self._tested)),
        )
        self._written_on_device = upload.put(np.concatenate(self._written_at).astype(np.int32))

    def add_to_totals(self, recorder: PassRecorder) -> None:
        """Reading by reading, of which there is one a kind unless memory is short."""
        cache = self._cache
        before = None
        if recorder.old_queries is not None and recorder.old_keys is not None:
            before = Before(recorder.old_queries, recorder.old_keys, self._written_on_device)
        rows = Rows(recorder.queries, *self._shared, before, cache.hidden_stride)
        kernels = PagedStatistics(PagedKeys(cache.keys, cache.key_layout), rows, cache.scale)
        num_heads = cache.num_heads * ranks.count()
        for totals, reading in self._readings:
            attention = kernels.read(reading)
            kernels.add_mass(attention, totals.mass)
            for statistic, count in reading.num_sums.items():
                if count:
                    sums = [kernels.drift_sums(attention, statistic)]
                    self._drift.add_pending(
                        _SumsOfMany(kernels, reading, statistic, num_heads, sums)
                    )

    def _entry(self, place: int, own: OwnRows) -> PlanEntry:
        """A plan, and what it adds to the lists of all plans."""
        cache, measure = self._cache, own.measure
        layers = own.layers(cache.num_layers)
        self.read_layers.update(layers)
        entry = PlanEntry(
            place=place,
            first_layer=layers.start,
            layer_stride=layers.step,
            length=len(own.plan.tokens),
            first_block=self._num_blocks,
            first_query=own.queries.start,
            num_queries=len(own.in_window),
        )
        self._in_window[own.queries] = own.in_window
        self._blocks.append(cache.kernel_blocks(own.plan.block_ids))
        self._num_blocks += len(self._blocks[-1])
        if own.tested.size:
            assert isinstance(measure, DriftTest)
            entry = entry._replace(
                statistic=_STATISTICS[measure.statistic],
                first_tested=own.old_queries.start,
                num_tested=own.tested.size,
                first_written=self._num_written,
                stop_stored=cache.num_stored_layers(measure.tested_layers),
            )
            self._tested.append(own.queries.start + own.tested)
            written_at = np.full(entry.length, -1)
            written_at[own.written] = range(own.old_keys.start, own.old_keys.stop)
            self._written_at.append(written_at)
            self._num_written += entry.length
        return entry

    def _groups(self, entries: list[PlanEntry]) -> Iterator[list[PlanEntry]]:
        """The plans, as many at a time as there is room for in a layer."""
        group: list[PlanEntry] = []
        numbers = self._numbers([])
        for entry in entries:
            more = self._numbers([entry]) - self._numbers([])
            if group and numbers + more > memory.MOST_NUMBERS_AT_ONCE:
                yield group
                group, numbers = [], self._numbers([])
            group.append(entry)
            numbers += more
        if group:
            yield group

    def _readings_of(self, entries: list[PlanEntry]) -> Iterator[PagedReading]:
        """All layers that plans look at, as many at a time as there is room for."""
        num_layers = max(
            len(range(entry.first_layer, self._cache.num_layers, entry.layer_stride))
            for entry in entries
        )
        at_once = max(1, memory.MOST_NUMBERS_AT_ONCE // self._numbers(entries))
        for first in range(0, num_layers, at_once):
            yield self._reading(entries, first, min(first + at_once, num_layers))

    def _reading(self, entries: list[PlanEntry], first: int, stop: int) -> PagedReading:
        placed, num_positions, num_sums = [], 0, {RELEASED: 0, PAPER: 0}
        for entry in entries:
            placed.append(
                entry._replace(
                    first_position=num_positions, first_sum=num_sums.get(entry.statistic, 0)
                )
            )
            num_positions += entry.length
            if entry.statistic:
                num_sums[entry.statistic] += self._num_sums(entry, first, stop)
        return PagedReading(
            plans=self._upload.put(np.array(placed, dtype=np.int32)),
            first=first,
            stop=stop,
            num_positions=num_positions,
            longest=max(entry.length for entry in entries),
            most_tested=max(entry.num_tested for entry in entries),
            num_sums=num_sums,
        )

    def _num_sums(self, entry: PlanEntry, first: int, stop: int) -> int:
        """Numbers that one plan's test sums up in the ``first``-th of its layers to another."""
        stride = self._cache.hidden_stride
        start = -(-(entry.first_layer + first) // stride)
        end = -(-min(entry.first_layer + stop, self._cache.num_layers) // stride)
        of_layer = self._cache.num_kv_heads
        if entry.statistic == RELEASED:
            of_layer = entry.num_tested * entry.length
        return of_layer * max(0, min(end, entry.stop_stored) - start)

    def _numbers(self, entries: list[PlanEntry]) -> int:
        """What the kernels write for a layer: see ``Attention``, which has all rows in any case,
        and ``drift_sums``."""
        cache = self._cache
        return self._num_rows * cache.num_heads + sum(
            entry.length * (cache.num_kv_heads + 3 * entry.num_tested) for entry in entries
        )
