# SPDX-License-Identifier: Apache-2.0
"""`--scheduling-policy priority`: the order of admission. A canvas that was admitted stays so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Served, poison
from .driver import Driver, assert_nothing_left, prompt_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def driver(serve: Callable[[str], Served]) -> Driver:
    """An engine of two seats."""
    from vllm_elastic.bench.engine import BenchEngine

    served = serve("gqa-tied")
    engine = BenchEngine(
        served.directory,
        batch_size=2,
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
        scheduling_policy="priority",
    )
    poison(engine)
    return Driver(Served("two seats", served.directory, served.oracle, engine))


def running(driver: Driver) -> list[str]:
    return [request.request_id.split("-")[0] for request in driver.engine.scheduler.running]


def add(driver: Driver, seed: int, priority: int) -> str:
    return driver.add(prompt_of(9, seed), 16, priority=priority, policy="none")


def test_admitted_by_priority_then_by_age(driver: Driver) -> None:
    first = [add(driver, 0, 9), add(driver, 1, 9)]
    driver.step()
    waiting = [add(driver, 2 + i, priority) for i, priority in enumerate((5, 0, 5, -1, 9))]
    driver.step()
    assert running(driver) == first, "a running canvas keeps its seat"
    admitted = [*first]
    while driver.llm_engine.has_unfinished_requests():
        driver.step()
        admitted += [name for name in running(driver) if name not in admitted]
    assert admitted == [*first, *(waiting[i] for i in (3, 1, 0, 2, 4))]
    assert_nothing_left(driver)


def test_preempted_requests_come_back_by_priority(driver: Driver) -> None:
    """A clear of the cache preempts what runs; no token is lost, and none comes twice."""
    alone = [add(driver, seed, 0) for seed in (20, 21)]
    driver.run()
    names = [add(driver, 20, 9), add(driver, 21, 5)]
    for _ in range(3):
        driver.step()
    urgent = add(driver, 22, 0)
    assert driver.engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.step()
    assert running(driver) == [urgent, names[1]]
    driver.run()
    assert [driver.tokens[name] for name in names] == [driver.tokens[name] for name in alone]
    assert_nothing_left(driver)
