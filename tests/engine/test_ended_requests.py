# SPDX-License-Identifier: Apache-2.0
"""Every request that ends is counted once, soon, and in whatever way it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Served, make_engine
from .driver import Driver, prompt_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def driver(serve: Callable[[str], Served]) -> Driver:
    """An engine whose statistics are on."""
    served = serve("gqa-tied")
    options: dict[str, Any] = {"disable_log_stats": False, "served_model_name": "counted"}
    engine = make_engine(served.directory, **options)
    return Driver(Served("counted", served.directory, served.oracle, engine))


def counted(name: str, policy: str, suffix: str = "total") -> float:
    from prometheus_client import REGISTRY

    labels = {"model_name": "counted", "engine": "0", "policy": policy}
    return REGISTRY.get_sample_value(f"vllm:elastic_{name}_{suffix}", labels) or 0.0


def test_ended_by_the_front_end(driver: Driver) -> None:
    """As after a stop string or a client that left: no other request ends, or is there at all."""
    before = counted("requests", "none"), counted("denoising_steps", "none")
    names = [driver.add(prompt_of(9, i), 24, policy="none") for i in range(3)]
    driver.step()
    driver.llm_engine.abort_request(names)
    driver.step()
    assert counted("requests", "none") - before[0] == 3
    assert counted("denoising_steps", "none") - before[1] == 3
    assert not driver.engine.scheduler._ended


def test_ended_by_itself(driver: Driver) -> None:
    before = counted("requests", "elastic"), counted("denoising_steps", "elastic")
    name = driver.add(prompt_of(9, 1), 24, policy="elastic")
    driver.run()
    record = driver.take_records()[name]
    assert counted("requests", "elastic") - before[0] == 1
    assert counted("denoising_steps", "elastic") - before[1] == record.denoising_steps


def test_times_are_those_of_the_record(driver: Driver) -> None:
    """vLLM's own say when tokens were shown, not when there was something to show."""

    def times() -> list[float]:
        names = ("request_first_commit_seconds", "request_seconds_per_token")
        return [counted(n, "elastic", s) for n in names for s in ("sum", "count")]

    before = times()
    name = driver.add(prompt_of(9, 1), 24, policy="elastic")
    driver.run()
    record = driver.take_records()[name]
    first, firsts, per_token, answers = (b - a for a, b in zip(before, times(), strict=True))
    assert (firsts, answers) == (1, 1)
    assert per_token == pytest.approx(record.seconds / len(driver.tokens[name]))
    assert 0 < first < record.seconds, "the first of several steps"
    names = [driver.add(prompt_of(9, 1), 24, policy="elastic")]
    driver.step()
    driver.llm_engine.abort_request(names)
    driver.step()
    assert times()[1::2] == [before[1] + 2, before[3] + 1], "an aborted one has no answer"


def test_never_admitted_is_not_counted(driver: Driver) -> None:
    """It cost nothing, and has no policy yet."""
    before = counted("requests", "none")
    names = [driver.add(prompt_of(9, i), 24, policy="none") for i in range(17)]  # 16 places
    driver.step()
    driver.llm_engine.abort_request(names)
    driver.step()
    assert counted("requests", "none") - before == 16


def test_nothing_is_kept_without_statistics(serve: Callable[[str], Served]) -> None:
    driver = Driver(serve("gqa-tied"))
    names = [driver.add(prompt_of(9, i), 24, policy="none") for i in range(5)]
    driver.step()
    driver.llm_engine.abort_request(names)
    driver.step()
    assert not driver.engine.scheduler._ended
    driver.take_records()
