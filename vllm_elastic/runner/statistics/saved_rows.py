# SPDX-License-Identifier: Apache-2.0
"""Which rows' queries and old states a pass keeps for its measurements, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.decoding.canvas import Positions
from vllm_elastic.decoding.measurement import Measure
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.runner.ragged import bounds
from vllm_elastic.runner.row_order import NO_ROWS, IntArray, RowOrder
from vllm_elastic.runner.upload import Upload


@dataclass(slots=True)
class OwnRows:
    """One plan's places in what is saved.

    Invariant: the window's and the tested rows join with the plan's first segment, so in the pass
    they are neighbours, and so are their saved queries.

    Attributes:
        queries: into the saved queries, by ascending position.
        in_window: bool, of these queries.
        tested: into these queries.
        old_queries, old_keys: into the saved old queries and old keys.
        written: canvas positions of these keys.
        tested_on_device, written_on_device: the same, in the upload.
    """

    plan: PassPlan
    measure: Measure
    queries: slice
    in_window: npt.NDArray[np.bool_]
    tested: IntArray
    old_queries: slice
    old_keys: slice
    written: IntArray
    tested_on_device: torch.Tensor
    written_on_device: torch.Tensor

    def layers(self, num_layers: int) -> range:
        """The model's layers whose attention is read: from the last one down to the start layer."""
        start, stride = self.plan.start_layer, self.plan.attention_stride
        return range(start + (num_layers - 1 - start) % stride, num_layers, stride)

    def tiles(self, count: int) -> list[OwnRows]:
        """The plan's places by at most ``count`` queries at a time; itself where it has no more."""
        total = len(self.in_window)
        if total <= count:
            return [self]
        return [self._tile(start, min(start + count, total)) for start in range(0, total, count)]

    def _tile(self, start: int, stop: int) -> OwnRows:
        first, last = np.searchsorted(self.tested, (start, stop)).tolist()
        queries, old = self.queries.start, self.old_queries.start
        return replace(
            self,
            queries=slice(queries + start, queries + stop),
            in_window=self.in_window[start:stop],
            tested=self.tested[first:last] - start,
            old_queries=slice(old + first, old + last),
            tested_on_device=self.tested_on_device[first:last] - start,
        )


class SavedRows:
    """Everything that is saved, of all plans that measure; indices are put into the upload.

    Attributes:
        owners: by the plan's index.
        query_rows: int64 [S] ascending, rows whose queries are kept.
        tested_positions: int64 [M], canvas positions of the tested rows, plan by plan.
        num_old_keys: K, rows whose keys are kept as they were before the pass.
        num_probes: rows whose stored inputs are kept as they were.
    """

    def __init__(self, plans: Sequence[PassPlan], order: RowOrder, upload: Upload) -> None:
        measuring = {i: plan for i, plan in enumerate(plans) if plan.measure is not None}
        queries = {index: plan.queries for index, plan in measuring.items()}
        tested = {index: plan.tested for index, plan in measuring.items() if plan.tested.size}
        written = {i: plans[i].segments[0].positions.astype(np.int64) for i in tested}
        probes = {index: plan.probes for index, plan in measuring.items() if plan.probes.size}
        query_rows, tested_rows = order.rows_of(queries), order.rows_of(tested)
        old_key_rows, probe_rows = order.rows_of(written), order.rows_of(probes)
        self.query_rows: IntArray = np.sort(query_rows)
        self.tested_positions: IntArray = order.positions[tested_rows]
        self.num_old_keys, self.num_probes = len(old_key_rows), len(probe_rows)
        # Whose they are.
        starts = bounds(map(len, queries.values()))[:-1]
        firsts = self.query_rows.searchsorted(query_rows[starts]).tolist()
        self.owners: dict[int, OwnRows] = {}
        old_queries = old_keys = 0
        for (index, plan), first in zip(measuring.items(), firsts, strict=True):
            overwritten = written.get(index, NO_ROWS)
            places = first, old_queries, old_keys
            own = _own_rows(plan, queries[index], overwritten, places, upload)
            self.owners[index] = own
            old_queries, old_keys = own.old_queries.stop, own.old_keys.stop
        # On the device, by row and by slot.
        self.queries_on_device = upload.put(self.query_rows)
        self.tested_on_device = upload.put(tested_rows)
        self.tested_slots = upload.put(order.slots[tested_rows])
        self.old_key_slots = upload.put(order.slots[old_key_rows])
        self.probe_slots = upload.put(order.slots[probe_rows])


def _own_rows(
    plan: PassPlan,
    positions: Positions,
    written: IntArray,
    firsts: tuple[int, int, int],
    upload: Upload,
) -> OwnRows:
    """Args:
    positions: of its queries; written: of the keys that the pass overwrites.
    firsts: its first place in the saved queries, old queries and old keys.
    """
    assert plan.measure is not None
    in_window, tested = np.ones(len(positions), dtype=np.bool_), NO_ROWS
    if plan.tested.size:
        in_window = np.isin(positions, plan.window_rows)
        tested = positions.searchsorted(plan.tested)
    first_query, first_old_query, first_old_key = firsts
    return OwnRows(
        plan=plan,
        measure=plan.measure,
        queries=slice(first_query, first_query + len(positions)),
        in_window=in_window,
        tested=tested,
        old_queries=slice(first_old_query, first_old_query + len(tested)),
        old_keys=slice(first_old_key, first_old_key + len(written)),
        written=written,
        tested_on_device=upload.put(tested),
        written_on_device=upload.put(written),
    )
