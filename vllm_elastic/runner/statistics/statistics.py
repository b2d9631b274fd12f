# SPDX-License-Identifier: Apache-2.0
"""A pass's measurements, in the order in which they are made.

``__init__`` chooses what to keep, ``before`` keeps what the pass overwrites, the pass fills the
recorder, ``after`` works out the sums of this rank's heads and adds them up over ranks, ``results``
turns the totals into what the policies asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from vllm_elastic.decoding.measurement import (
    BlockProbe,
    DriftTest,
    Measured,
    MeasuredBlocks,
    MeasuredDrift,
)
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.download import Download, Fetched
from vllm_elastic.runner.row_order import RowOrder
from vllm_elastic.runner.statistics.attention import AttentionReader
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.statistics.memory import NUMBERS_AT_ONCE_ON_GPU, SUMS_AT_ONCE
from vllm_elastic.runner.statistics.reading import Reading, ReadingPlanner
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import OwnRows, SavedRows
from vllm_elastic.runner.upload import Upload

_NUMBERS_AT_ONCE = (NUMBERS_AT_ONCE_ON_GPU, 1 << 19)
"""Keys and attention rows that are at hand at a time, in numbers: on a GPU, on a CPU."""


class Statistics:
    """Of one pass.

    Attributes:
        saved: which rows are kept.
        recorder: filled by the pass; None: no plan measures anything.
    """

    def __init__(
        self, plans: Sequence[PassPlan], order: RowOrder, cache: CacheView, upload: Upload
    ) -> None:
        self.saved = SavedRows(plans, order, upload)
        self.recorder: PassRecorder | None = None
        self._cache = cache
        owners, at_once = self.saved.owners, _NUMBERS_AT_ONCE[cache.keys.is_cpu]
        self._readings = ReadingPlanner(owners, cache, upload, at_once).readings()
        self._drift = DriftTotals(_of_kind(owners, DriftTest), cache, upload)
        self._blocks = BlockTotals(_of_kind(owners, BlockProbe), cache, upload)

    def before(self, dtype: torch.dtype) -> None:
        """Once the upload was sent: read what the pass is going to overwrite."""
        if self.saved.owners:
            read_layers = {layer for reading in self._readings for layer in reading.layers}
            self.recorder = PassRecorder(self.saved, self._cache, dtype, read_layers)

    def after(self) -> None:
        """Once the pass is over, on every rank: sums over its heads, then over all ranks."""
        if self.recorder is None:
            return
        reader = AttentionReader(self._cache, self.recorder)
        for reading in self._readings:
            self._read(reader, reading)
        if self.recorder.old_probes is not None:
            self._blocks.add_probes(*self._probe_sums(self.recorder.old_probes))
        _add_up(self._drift.parts() + self._blocks.parts())
        self._drift.take_similarities()

    def results(self, download: Download) -> dict[int, Fetched[Measured]]:
        """What each plan that measures asked for, once the download has arrived."""
        fetched: dict[int, Fetched[Measured]] = {}
        similarities = self._drift.similarities()
        for index, best in self._drift.most_attended().items():
            fetched[index] = download.of(MeasuredDrift, best, similarities.get(index))
        probe_drift = self._blocks.probe_drift()
        for index, (mass, best) in self._blocks.blocks().items():
            fetched[index] = download.of(MeasuredBlocks, mass, best, probe_drift.get(index))
        return fetched

    def _read(self, reader: AttentionReader, reading: Reading) -> None:
        """Work out some plans' attention and add it to the totals."""
        mass = torch.cat([self._mass(reader, reading, layers) for layers in reading.layer_parts()])
        if isinstance(reading.pieces[0].owners[0].measure, BlockProbe):
            self._blocks.add_mass(reading.places, mass)
        else:
            self._drift.add_mass(reading.places, reading.layers, mass)

    def _mass(self, reader: AttentionReader, reading: Reading, layers: range) -> torch.Tensor:
        """The attention [layers, plans, longest T] that windows pay; drift goes to its total."""
        masses = []
        for piece in reading.pieces:
            mass, *drift = reader.sums(reading, piece, layers)
            masses.append(mass)
            if drift:  # of a plan that is alone
                num_rows = piece.owners[0].tested.size
                self._drift.add_drift(reading.indices[0], layers, num_rows, drift)
            if self._drift.num_pending > SUMS_AT_ONCE:
                _add_up(self._drift.pending())
                self._drift.take_similarities()
        return functools.reduce(torch.add, masses)

    def _probe_sums(self, old_probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms of the change of stored hidden states, and of them: [stored, probes]."""
        sums = []
        at_once = max(1, NUMBERS_AT_ONCE_ON_GPU // max(1, old_probes[:1].numel()))
        # Once for a model that stores none.
        for first in range(0, max(1, len(old_probes)), at_once):
            some = slice(first, first + at_once)
            old = old_probes[some].float()
            new = self._cache.hidden[some, self.saved.probe_slots].float()
            # The square of a rounded norm has that norm for its root: one rank's numbers are
            # unchanged.
            sums.append(((new - old).norm(dim=-1).square(), old.norm(dim=-1).square()))
        change, before = (torch.cat(part) for part in zip(*sums, strict=True))
        return change, before


def _add_up(parts: list[torch.Tensor]) -> None:
    """Sum over all ranks, in place."""
    if ranks.count() > 1:
        for part, total in zip(parts, ranks.add_up(parts), strict=True):
            part.copy_(total)


def _of_kind(owners: dict[int, OwnRows], kind: type) -> dict[int, OwnRows]:
    return {index: own for index, own in owners.items() if isinstance(own.measure, kind)}
