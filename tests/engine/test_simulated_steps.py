# SPDX-License-Identifier: Apache-2.0
"""The simulator batches as the engine does: the same steps, row for row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from vllm_elastic.bench.simulation.calibration import Timed, capacity_of, replay, time_setting
from vllm_elastic.bench.simulation.device import Device
from vllm_elastic.bench.simulation.model_shape import ModelShape

from .conftest import Served
from .driver import prompt_of

pytestmark = pytest.mark.engine

DEVICE = Device("test", 1e9, 1e9, 1e9, 0)


@pytest.fixture
def engine(serve: Callable[[str], Served]) -> Iterator[Any]:
    """An engine that records rows; its limits are put back."""
    engine: Any = serve("gqa-tied").engine
    scheduler = engine.scheduler
    names = ("elastic_config", "max_num_active_reqs", "limits")
    saved = {name: getattr(scheduler, name) for name in names}
    scheduler.elastic_config = replace(scheduler.elastic_config, record_rows=True)
    yield engine
    for name, value in saved.items():
        setattr(scheduler, name, value)


@pytest.mark.parametrize("policy", ["elastic, paper", "elastic-block"])
@pytest.mark.parametrize(
    ("seats", "row_budget", "blocks"),
    [(1, 4096, 100), (16, 4096, 100), (16, 90, 100), (16, 4096, 6)],
    ids=["one-by-one", "all", "few-rows", "few-blocks"],
)
def test_steps_are_the_engines(
    policy: str, seats: int, row_budget: int, blocks: int, engine: Any
) -> None:
    scheduler = engine.scheduler
    scheduler.limits = replace(scheduler.limits, rows=row_budget)
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(max(0, pool.get_num_free_blocks() - blocks))
    capacity = replace(capacity_of(engine), blocks=pool.get_num_free_blocks())
    requests = [
        {"prompt_token_ids": prompt_of(8 + 11 * i, i), "max_tokens": 12 + 5 * (i % 4)}
        for i in range(14)
    ]
    setting = Timed(policy, seats)
    try:
        time_setting(engine, requests, setting)
    finally:
        pool.free_blocks(taken)
    shape = ModelShape(layers=engine.num_layers)
    replica = replay(shape, DEVICE, setting, capacity)
    last_layer = replica.cost.columns.rows.stop - 1
    assert [int(work[last_layer]) for work in replica.steps] == setting.rows
    assert len(setting.seconds) == 1 and len(setting.seconds[0]) == len(setting.rows)
    assert all(seconds > 0 for seconds in setting.seconds[0])
