# SPDX-License-Identifier: Apache-2.0
"""Elastic-Cache (arXiv 2510.14973): one verdict for the whole canvas, by attention drift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions, merged
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.decoding.policies.base import RefreshPolicy

if TYPE_CHECKING:
    from vllm_elastic.decoding.request import DenoisingRequest


class Elastic(RefreshPolicy):
    """Recompute the window, what was just committed and what is tracked; watch the drift.

    The first layer l* whose similarity is below gamma makes every block stale from l* + 1: the
    drift grows with depth. A trigger in the last layer leaves nothing to recompute.
    """

    name = "elastic"
    measures = True

    def rows(self, request: DenoisingRequest, window: Positions) -> Positions:
        return merged(request.canvas.length, window, request.near_commits(), request.tracked)

    def judge(
        self, request: DenoisingRequest, plan: PassPlan, result: PassResult
    ) -> npt.NDArray[np.int16] | int | None:
        if result.similarities is None:
            return None
        similarities = result.similarities[: request.num_layers - 1]
        drifted = np.flatnonzero(similarities < self.config.gamma)
        return int(drifted[0]) + 1 if drifted.size else None
