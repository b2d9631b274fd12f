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


def counted(name: str, policy: str) -> float:
    from prometheus_client import REGISTRY

    labels = {"model_name": "counted", "engine": "0", "policy": policy}
    return REGISTRY.get_sample_value(f"vllm:elastic_{name}_total", labels) or 0.0


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
