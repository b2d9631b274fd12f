# SPDX-License-Identifier: Apache-2.0
"""In float32 an answer does not depend on the batch, on admission, or on the order of arrival.

Every request of a random schedule is compared with itself run alone: tokens, and the record of
every pass (kind, start layer, rows, committed positions). Nothing is compared with a tolerance, so
two predictions that are equally likely to a float32 rounding (1e-6) could part the two runs on
another machine; such a tie shows in the probabilities at the pass where they part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from .conftest import EOS, Served, poison
from .driver import Driver, assert_nothing_left
from .schedules import Arrival, Ask, Outcome, Schedule, play, schedules, the_same_always

pytestmark = pytest.mark.engine

# `long` looks for new ones and shrinks.
QUICK = the_same_always(30)
LONG = settings(max_examples=300, deadline=None)

_alone: dict[tuple[str, Ask], Outcome] = {}


def alone(driver: Driver, model: str, ask: Ask) -> Outcome:
    if (model, ask) not in _alone:
        poison(driver.engine)
        schedule = Schedule(model, (Arrival(ask, 0),), 8192, 16, frozenset())
        (_alone[model, ask],) = play(driver, schedule)
    return _alone[model, ask]


def passes(outcome: Outcome) -> list[dict[str, object]]:
    """The record of every pass; similarities are checked with a tolerance."""
    if outcome.record is None:
        return []
    return [{k: v for k, v in s.items() if k != "similarities"} for s in outcome.record.steps]


def assert_same(arrival: Arrival, outcome: Outcome, expected: Outcome) -> None:
    """Equal where it was served to its end, a beginning where it was aborted."""
    seen, wanted = passes(outcome), passes(expected)
    if outcome.reason is None:
        assert arrival.patience is not None, "lost"
        wanted = wanted[: len(seen)]
    assert seen == wanted, arrival
    assert outcome.tokens == expected.tokens[: len(outcome.tokens)], arrival
    if outcome.reason is not None:
        assert (len(outcome.tokens), outcome.reason) == (len(expected.tokens), expected.reason)
        assert replace(outcome.record, steps=[], seconds=0) == replace(
            expected.record, steps=[], seconds=0
        )
    for step, other in zip(
        outcome.record.steps if seen else [], expected.record.steps, strict=False
    ):
        assert step.get("similarities") == pytest.approx(other.get("similarities"), abs=1e-4)


def assert_valid(arrival: Arrival, outcome: Outcome) -> None:
    """Every position was committed once, and what was shown is what the canvas holds."""
    ask, record = arrival.ask, outcome.record
    if record is None:
        assert arrival.patience is not None and not outcome.tokens
        return
    committed = [position for step in record.steps for position in step["committed"]]
    assert len(set(committed)) == len(committed), "committed twice"
    answer = range(ask.prompt_length, ask.prompt_length + ask.max_tokens)
    assert set(committed) <= set(answer)
    canvas = outcome.canvas.canvas
    finished = canvas.tokens[answer.start : answer.stop].tolist()
    if outcome.reason is None:
        assert arrival.patience is not None, "lost"
        assert outcome.tokens == finished[: len(outcome.tokens)]
    elif outcome.reason == "length":
        assert outcome.tokens == finished and set(committed) == set(answer)
    else:
        assert outcome.reason == "stop"
        # Whether the end token itself is shown is not this test's business.
        length = finished.index(EOS)
        assert outcome.tokens in (finished[:length], finished[: length + 1])


def check(driver: Driver, plain: Driver, schedule: Schedule) -> None:
    """What becomes of a schedule's requests, against each alone in ``plain``.

    A restart makes a step a full one, which may change the answer of a cached policy. Without a
    cache every step is a full one anyway, and the answer has to be the same.
    """
    poison(driver.engine)
    outcomes = play(driver, schedule)
    assert_nothing_left(driver)
    for arrival, outcome in zip(schedule.arrivals, outcomes, strict=True):
        assert_valid(arrival, outcome)
        if not schedule.resets or arrival.ask.policy == "none":
            assert_same(arrival, outcome, alone(plain, schedule.model, arrival.ask))


def in_depth(quick: Callable[..., None], strategy: SearchStrategy[Schedule]) -> Any:
    """The same test over ever new schedules: ``make test-long``."""
    test = given(schedule=strategy)(quick.hypothesis.inner_test)  # type: ignore[attr-defined]
    return pytest.mark.long(pytest.mark.timeout(3600)(LONG(test)))


@QUICK
@given(schedule=schedules())
def test_answer_does_not_depend_on_the_batch(
    serve: Callable[[str], Served], schedule: Schedule
) -> None:
    driver = Driver(serve(schedule.model))
    check(driver, driver, schedule)


@QUICK
@given(schedule=schedules(resets=True))
@pytest.mark.slow
def test_restarts_lose_and_double_nothing(
    serve: Callable[[str], Served], schedule: Schedule
) -> None:
    """All KV blocks are taken from running requests, now and then."""
    driver = Driver(serve(schedule.model))
    check(driver, driver, schedule)


test_answer_does_not_depend_on_the_batch_long = in_depth(
    test_answer_does_not_depend_on_the_batch, schedules()
)
test_restarts_lose_and_double_nothing_long = in_depth(
    test_restarts_lose_and_double_nothing, schedules(resets=True)
)
