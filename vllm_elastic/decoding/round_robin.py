# SPDX-License-Identifier: Apache-2.0
"""Whose passes make up a step: the one rule by which requests share the row budget.

The scheduler and the simulator (``bench simulate``) run this very code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from vllm_elastic.decoding.limits import StepLimits


class HasRows(Protocol):
    """Anything that takes part in a step with so many rows (see ``StepLimits``)."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_saved_rows(self) -> int: ...


Plan = TypeVar("Plan", bound=HasRows)


class RoundRobin:
    """Requests take turns: those that were served longest ago come first.

    A step takes their passes in this order until it is full. The first one that does not fit ends
    the step, so it is first in the next; hence a request waits for at most as many steps as there
    are running requests. A pass that takes more than the limits runs alone.
    """

    def __init__(self) -> None:
        self._step = 0
        self._last_served: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._last_served)

    def add(self, request_id: str) -> None:
        """A request that starts or starts over has not been served: it goes first."""
        self._last_served[request_id] = -1

    def remove(self, request_id: str) -> None:
        """Forget a request; one that was never added is fine."""
        self._last_served.pop(request_id, None)

    def take(
        self,
        running: Iterable[str],
        plan_of: Callable[[str], Plan],
        limits: StepLimits,
        most: int | None = None,
    ) -> list[tuple[str, Plan]]:
        """The next step's requests with their plans, in the order of their turns.

        Args:
            running: requests that were added, all that may be served; equals keep this order.
            plan_of: asked in the order of the turns, up to the first plan that does not fit.
            most: requests that the step may have; None: all.
        """
        self._step += 1
        taken: list[tuple[str, Plan]] = []
        rows, saved_rows = limits.rows, limits.saved_rows
        for request_id in sorted(running, key=self._last_served.__getitem__)[:most]:
            plan = plan_of(request_id)
            rows -= plan.num_rows
            saved_rows -= plan.num_saved_rows
            if taken and min(rows, saved_rows) < 0:
                break
            taken.append((request_id, plan))
            self._last_served[request_id] = self._step
        return taken
