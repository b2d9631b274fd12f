# SPDX-License-Identifier: Apache-2.0
"""Who shares the next pass while one is in flight."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_elastic.decoding.overlap import GROUP_ROWS, PlansInFlight, next_group_size
from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment

NOTHING = np.empty(0, dtype=np.int32)


def plan(request_id: str, rows: int = 1) -> PassPlan:
    segment = Segment(0, np.arange(rows, dtype=np.int32))
    return PassPlan(request_id, PassKind.WINDOW, 0, [segment], NOTHING, NOTHING)


def plans(count: int, rows: int, first: int = 0) -> list[PassPlan]:
    return [plan(str(first + nth), rows) for nth in range(count)]


@pytest.mark.parametrize(
    ("flying", "free", "rows", "most"),
    [
        # Nothing in flight: halves, where each has rows enough.
        (0, 0, 1, 0),
        (0, 1, GROUP_ROWS, 1),
        (0, 2, GROUP_ROWS, 1),
        (0, 3, GROUP_ROWS, 2),
        (0, 16, 32, 8),
        (0, 16, 31, 16),
        # Another group is: half of all, or wait for it.
        (8, 8, 32, 8),
        (8, 8, 31, 0),
        (13, 3, GROUP_ROWS, 3 + 5),
        (3, 13, 32, 8),
        (1, 0, 1, 0),
    ],
)
def test_groups(flying: int, free: int, rows: int, most: int) -> None:
    assert next_group_size(plans(free, rows), flying) == most


@pytest.mark.parametrize(
    ("flying", "rows", "most"),
    [
        # Of a whole canvas and windows, either group may be windows alone.
        (0, [1100, 32, 32, 32], 4),
        (0, [1100, 1100, 1100, 32, 32], 5),
        (0, [1100, 1100, 128, 128], 2),
        # Three of the four that are left over may be in the next.
        (2, [1100, 32, 32, 32], 0),
        (2, [1100, 192, 32, 32], 3),
        (2, [1100], 2),
    ],
)
def test_groups_of_unequal_passes(flying: int, rows: list[int], most: int) -> None:
    free = [plan(str(number), count) for number, count in enumerate(rows)]
    assert next_group_size(free, flying) == most


def test_unequal_groups_grow_equal() -> None:
    """After one was left with 3 of 16 it would stay so, and the host have 13 to do at a time."""
    in_flight, groups = PlansInFlight(), [plans(13, GROUP_ROWS)]
    for each in groups[0]:
        in_flight.add(each)
    free = plans(3, GROUP_ROWS, 13)
    for _ in range(3):
        groups.append(free[: next_group_size(free, len(in_flight))])
        free = free[len(groups[-1]) :]
        for each in groups[-1]:
            in_flight.add(each)
        for each in groups.pop(0):
            assert in_flight.take(each)
            free.append(each)
    assert len(groups[-1]) == len(free) == 8


def test_a_result_counts_once_and_for_its_own_plan() -> None:
    """A pass over KV blocks that were taken away since would be committed."""
    in_flight = PlansInFlight()
    old, new, other = plan("a"), plan("a"), plan("b")
    in_flight.add(old)
    in_flight.add(other)
    assert "a" in in_flight and len(in_flight) == 2
    in_flight.drop("a")
    in_flight.drop("a")
    assert not in_flight.take(old)
    in_flight.add(new)
    assert not in_flight.take(old) and in_flight.take(new) and not in_flight.take(new)
    assert in_flight.take(other) and not len(in_flight)
