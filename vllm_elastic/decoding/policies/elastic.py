# SPDX-License-Identifier: Apache-2.0
"""Elastic-Cache (arXiv 2510.14973): one verdict for the whole canvas, by attention drift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions, merged
from vllm_elastic.decoding.measurement import DriftTest, Measured, MeasuredDrift
from vllm_elastic.decoding.plan import PassPlan, Segment
from vllm_elastic.decoding.policies.base import RefreshPolicy, Stale

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest


class Elastic(RefreshPolicy):
    """Recompute the window, what was just committed and what is tracked; watch the drift.

    The first layer l* whose similarity is below gamma makes every block stale from l* + 1: the
    drift grows with depth. A trigger in the last layer leaves nothing to recompute.

    Attributes:
        tracked: positions whose attention this step's drift test watches, ascending.
    """

    name = "elastic"

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self.tracked: Positions = NO_POSITIONS
        self._most_attended: npt.NDArray[np.int32] = np.empty((0, 0), dtype=np.int32)

    def begin_step(self, request: DenoisingRequest) -> None:
        """Track the union over layers of what the last step attended to most."""
        union = np.unique(self._most_attended)
        self.tracked = union[union >= 0].astype(np.int32)

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        return merged(request.canvas.length, window_rows, self.tracked, *request.near_commits())

    def measure(
        self,
        request: DenoisingRequest,
        segments: list[Segment],
        window_rows: Positions,
        rows: Positions,
    ) -> DriftTest:
        # Where the canvas has grown there were no keys before, and so no attention to compare.
        comparable = not request.validity.all_stale and not request.appended.size
        compared = comparable and not request.replays
        return DriftTest(
            tested=self.tracked if compared else NO_POSITIONS,
            tested_layers=request.validity.first_stale_layer,
            trackable=~request.canvas.masked,
            track_num=self.config.track_num,
            statistic=self.config.statistic,
        )

    def most_saved_rows(self, canvas: int, num_layers: int) -> int:
        window = self.config.most_predicted
        reach = self.reach if self.config.reach is None else self.config.reach
        tracked = min(canvas, num_layers * self.config.track_num)
        queries = min(canvas, window + tracked)
        # Rows from layer 0 on: the window, what it committed with the neighbours, what is tracked.
        written = min(canvas, window + window * (1 + 2 * reach) + tracked)
        return queries + 2 * tracked + written

    def judge(self, request: DenoisingRequest, plan: PassPlan, measured: Measured) -> Stale | None:
        assert isinstance(measured, MeasuredDrift)
        if measured.similarities is None:
            return None
        similarities = measured.similarities[: request.num_layers - 1]
        drifted = np.flatnonzero(similarities < self.config.gamma)
        return int(drifted[0]) + 1 if drifted.size else None

    def pass_done(
        self, request: DenoisingRequest, plan: PassPlan, measured: Measured | None
    ) -> None:
        assert isinstance(measured, MeasuredDrift)
        # A replay measures the layers that it recomputes; the others are as they were.
        own = measured.most_attended
        if plan.start_layer:
            own = np.concatenate([self._most_attended[: plan.start_layer], own])
        self._most_attended = own
