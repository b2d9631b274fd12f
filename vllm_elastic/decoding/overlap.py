# SPDX-License-Identifier: Apache-2.0
"""Where two passes are in flight: who may be planned next, and how many share a pass.

While the device works on one pass, the host takes the results of another and plans the next. A
request is in one pass at a time, so the running ones fall into two groups. The scheduler and the
simulator (``bench simulate``) form them by this very code.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.decoding.round_robin import HasRows

GROUP_ROWS = 256
"""Rows below which a pass is not worth its own reading of the weights.

With so many rows an H100's products take as long as its weights' reading: 989 TFLOP/s in bfloat16
over 3.35 TB/s are 295 operations a byte, so about 295 rows (by the data sheet; cards of other makes
have 150 to 300). Two passes of fewer rows take longer than one of both together, which a host that
plans in the meantime does not make good.
"""


class PlansInFlight:
    """The plans whose results are still to come: at most one of a request."""

    def __init__(self) -> None:
        self._plans: dict[str, PassPlan] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._plans

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, plan: PassPlan) -> None:
        assert plan.request_id not in self._plans
        self._plans[plan.request_id] = plan

    def take(self, plan: PassPlan) -> bool:
        """A plan's result is there: is it still wanted?

        Not where the request has gone or started over since, be it that another one of its name
        or another pass of its own is in flight by now.
        """
        if self._plans.get(plan.request_id) is not plan:
            return False
        del self._plans[plan.request_id]
        return True

    def drop(self, request_id: str) -> None:
        """Whatever comes of this request's pass is not wanted; without one that is fine."""
        self._plans.pop(request_id, None)


def next_group_size(free: Sequence[HasRows], num_in_flight: int) -> int:
    """How many of the requests that are in no pass may be in the next one.

    Half of all that run, rounded up, so that groups that arrivals and ends have made unequal
    grow equal again. But where either group might have few rows the next pass takes everyone, once
    the one that is in flight is back. A group may be those with the fewest rows, so these are
    asked: of canvases that are computed as a whole and windows, one may get the windows alone.

    Args:
        free: what those in no pass would do next.
        num_in_flight: requests that are in one.
    """
    rows = sorted(plan.num_rows for plan in free)
    half = -(-(len(rows) + num_in_flight) // 2)
    if num_in_flight:
        return half if sum(rows[:half]) >= GROUP_ROWS else 0
    return half if sum(rows[: len(rows) // 2]) >= GROUP_ROWS else len(rows)
