# SPDX-License-Identifier: Apache-2.0
"""A pass's measurements, in the order in which they are made.

``statistics_of`` chooses what to keep, ``before`` keeps what the pass overwrites, the pass fills
the recorder, ``after`` works out the sums of this rank's heads and adds them up over ranks,
``results`` turns the totals into what the policies asked for.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from vllm_elastic.decoding.measurement import (
    BlockProbe,
    DriftTest,
    Measured,
    MeasuredDrift,
)
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.download import Download, Fetched
from vllm_elastic.runner.ragged import joined
from vllm_elastic.runner.row_order import NO_ROWS, IntArray, RowOrder
from vllm_elastic.runner.statistics.attention_sums import attention_sums
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.statistics.memory import MOST_NUMBERS_AT_ONCE
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import OwnRows, SavedRows
from vllm_elastic.runner.upload import Upload


def statistics_of(
    plans: Sequence[PassPlan], order: RowOrder, cache: CacheView, upload: Upload
) -> PassStatistics:
    """The statistics of a pass over these plans."""
    if all(plan.measure is None for plan in plans):
        return PassStatistics()
    return MeasuringStatistics(SavedRows(plans, order, upload), cache, upload)


class PassStatistics:
    """Statistics of a pass that measures nothing: most passes of most policies, which pay nothing.

    Attributes:
        query_rows, tested_positions: as of ``SavedRows``.
        read_layers: those whose attention is going to be read.
        recorder: filled by the pass; None: it has nothing to keep.
    """

    query_rows: IntArray = NO_ROWS
    tested_positions: IntArray = NO_ROWS
    read_layers: Set[int] = frozenset()
    recorder: PassRecorder | None = None

    def before(self, dtype: torch.dtype) -> None:
        """Once the upload was sent: read what the pass is going to overwrite."""

    def after(self) -> None:
        """Once the pass is over, on every rank: sums over its heads, then over all ranks."""

    def results(self, download: Download) -> dict[int, Fetched[Measured]]:
        """What each plan that measures asked for, once the download has arrived."""
        return {}


class MeasuringStatistics(PassStatistics):
    """Statistics of a pass in which at least one plan measures."""

    def __init__(self, saved: SavedRows, cache: CacheView, upload: Upload) -> None:
        self.query_rows, self.tested_positions = saved.query_rows, saved.tested_positions
        self._saved, self._cache = saved, cache
        owners = saved.owners
        self._drift = DriftTotals(_of_kind(owners, DriftTest), cache, upload)
        self._blocks = BlockTotals(_of_kind(owners, BlockProbe), cache, upload.device)
        self._attention = attention_sums(saved, cache, self._drift, self._blocks, upload)
        self.read_layers = self._attention.read_layers

    def before(self, dtype: torch.dtype) -> None:
        self.recorder = PassRecorder(self._saved, self._cache, dtype, self.read_layers)

    def after(self) -> None:
        assert self.recorder is not None
        self._attention.add_to_totals(self.recorder)
        if self.recorder.old_probes is not None:
            self._blocks.add_probes(*self._probe_sums(self.recorder.old_probes))
        ranks.add_up_in_place(self._drift.parts() + self._blocks.parts())
        self._drift.take_similarities()

    def results(self, download: Download) -> dict[int, Fetched[Measured]]:
        fetched: dict[int, Fetched[Measured]] = {}
        similarities = self._drift.similarities()
        for index, best in self._drift.most_attended().items():
            fetched[index] = download.of(MeasuredDrift, best, similarities.get(index))
        fetched.update(self._blocks.results(download))
        return fetched

    def _probe_sums(self, old_probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms of the change of stored hidden states, and of them: [stored, probes]."""
        sums = []
        at_once = max(1, MOST_NUMBERS_AT_ONCE // max(1, old_probes[:1].numel()))
        # Once for a model that stores none.
        for first in range(0, max(1, len(old_probes)), at_once):
            layers = slice(first, first + at_once)
            old = old_probes[layers].float()
            new = self._cache.hidden[layers, self._saved.probe_slots].float()
            # The square of a rounded norm has that norm for its root: one rank's numbers are
            # unchanged.
            sums.append(((new - old).norm(dim=-1).square(), old.norm(dim=-1).square()))
        change, before = (joined(part) for part in zip(*sums, strict=True))
        return change, before


def _of_kind(owners: dict[int, OwnRows], kind: type) -> dict[int, OwnRows]:
    return {index: own for index, own in owners.items() if isinstance(own.measure, kind)}
