# SPDX-License-Identifier: Apache-2.0
"""A fixed schedule: the whole canvas every so many steps, the window in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_elastic.decoding.canvas import Positions, merged
from vllm_elastic.decoding.policies.base import RefreshPolicy

if TYPE_CHECKING:
    from vllm_elastic.decoding.request import DenoisingRequest


class Interval(RefreshPolicy):
    """What a drift test has to beat: it measures nothing and tracks nothing."""

    name = "interval"

    def begin_step(self, request: DenoisingRequest) -> None:
        if request.record.denoising_steps % self.config.interval == 0:
            request.validity.invalidate(0)

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        return merged(request.canvas.length, window_rows, request.just_committed)
