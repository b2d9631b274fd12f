# SPDX-License-Identifier: Apache-2.0
"""Requests share the row budget in turns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.decoding.round_robin import RoundRobin


@dataclass
class Rows:
    num_rows: int
    num_saved_rows: int = 0


def rows_only(count: int) -> StepLimits:
    return StepLimits(count, 1 << 30)


def names(taken: list[tuple[str, Rows]]) -> str:
    return "".join(request_id for request_id, _ in taken)


def test_first_that_does_not_fit_ends_the_step_and_is_first_in_the_next() -> None:
    """Skipping it for smaller ones behind it would let a large canvas wait for ever."""
    turns, rows = RoundRobin(), {"a": 4, "b": 8, "c": 1}
    for name in rows:
        turns.add(name)
    seen = [names(turns.take(rows, lambda name: Rows(rows[name]), rows_only(10))) for _ in range(4)]
    assert seen == ["a", "bc", "a", "bc"]


def test_more_rows_than_the_budget_run_alone() -> None:
    turns, rows = RoundRobin(), {"a": 1, "b": 50}
    for name in rows:
        turns.add(name)
    seen = [names(turns.take(rows, lambda name: Rows(rows[name]), rows_only(10))) for _ in range(3)]
    assert seen == ["a", "b", "a"]


def test_who_starts_over_goes_first_and_who_left_is_forgotten() -> None:
    turns = RoundRobin()
    for name in "abc":
        turns.add(name)
    assert names(turns.take("abc", lambda _: Rows(1), rows_only(2))) == "ab"
    turns.add("b")
    assert names(turns.take("abc", lambda _: Rows(1), rows_only(2))) == "bc"
    turns.remove("c")
    turns.remove("never added")
    assert len(turns) == 2
    with pytest.raises(KeyError):
        turns.take("c", lambda _: Rows(1), rows_only(2))


@given(
    rows=st.lists(st.lists(st.integers(1, 30), min_size=1), min_size=1, max_size=8),
    budget=st.integers(1, 40),
)
def test_budget_and_waiting_bound(rows: list[list[int]], budget: int) -> None:
    """Each request has the same passes again and again; nobody waits longer than promised."""
    turns = RoundRobin()
    running = [str(index) for index in range(len(rows))]
    served = dict.fromkeys(running, 0)
    waited = dict.fromkeys(running, 0)
    for name in running:
        turns.add(name)
    for _ in range(40):
        taken = turns.take(
            running,
            lambda name: Rows(rows[int(name)][served[name] % len(rows[int(name)])]),
            rows_only(budget),
        )
        assert taken
        assert len(taken) == 1 or sum(plan.num_rows for _, plan in taken) <= budget
        for name in running:
            waited[name] += 1
        for name, _ in taken:
            served[name] += 1
            waited[name] = 0
        assert max(waited.values()) < len(running)


def test_saved_rows_fill_a_step_too() -> None:
    """Many requests that measure would together keep more than the trial run has allowed for."""
    turns = RoundRobin()
    for name in "abcd":
        turns.add(name)
    saved = {"a": 3, "b": 3, "c": 9, "d": 1}
    limits = StepLimits(100, 6)
    seen = [names(turns.take("abcd", lambda name: Rows(1, saved[name]), limits)) for _ in range(4)]
    assert seen == ["ab", "c", "da", "b"]
