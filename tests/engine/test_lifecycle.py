# SPDX-License-Identifier: Apache-2.0
"""Requests that come, go, and are thrown back, step by step: nothing is lost, doubled or leaked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from vllm_elastic.runner.batch import PassLayout

from .conftest import EOS, Served, poison
from .driver import Driver, assert_nothing_left, prompt_of
from .test_oracle import compare, request

pytestmark = pytest.mark.engine


@pytest.fixture
def driver(serve: Callable[[str], Served]) -> Driver:
    return Driver(serve("gqa-tied"))


def test_streamed_deltas_make_the_whole_answer(driver: Driver) -> None:
    prompts = [(prompt_of(3 + 11 * i, i), 5 + 7 * i) for i in range(6)]
    whole = driver.engine.run(
        [{"prompt_token_ids": p, "max_tokens": n, "elastic_gamma": 0.9} for p, n in prompts]
    )
    names = [driver.add(p, n, gamma=0.9) for p, n in prompts]
    driver.run()
    for name, result in zip(names, whole, strict=True):
        streamed = driver.tokens[name]
        assert [t for t in streamed if t != EOS] == result["token_ids"]
        assert driver.finished[name] == ("stop" if EOS in streamed else "length")
    assert_nothing_left(driver)


def test_a_watched_request_is_recorded_too(driver: Driver) -> None:
    """Handing its passes on left nothing of them for a benchmark."""
    name = driver.add(prompt_of(9, 1), 12, watch=1)
    driver.run()
    record = driver.take_records()[name]
    assert len(record.steps) == record.passes
    assert not any("request" in entry for entry in record.steps), "that is for who watches"
    assert_nothing_left(driver)


@pytest.mark.parametrize("policy", ["none", "dual-cache", "elastic"])
def test_preempted_request_emits_no_token_twice(policy: str, driver: Driver) -> None:
    """reset_prefix_cache(reset_running_requests=True) takes the blocks of running requests."""
    sizes = [(prompt_of(20, 1), 40), (prompt_of(7, 2), 33), (prompt_of(50, 3), 12)]
    names = [driver.add(p, n, policy=policy, gamma=0.9, tokens_per_step=2) for p, n in sizes]
    committed: dict[str, dict[int, int]] = {}
    canvases = driver.engine.scheduler._denoising
    for number in range(30):
        driver.step()
        if number % 5 == 3:
            for canvas in canvases.values():
                done = (~canvas.canvas.masked).nonzero()[0]
                committed[canvas.request_id] = {int(p): int(canvas.canvas.tokens[p]) for p in done}
            driver.llm_engine.reset_prefix_cache(reset_running_requests=True)
            for canvas in canvases.values():
                for position, token in committed[canvas.request_id].items():
                    assert canvas.canvas.tokens[position] == token, "a commit was undone"
    driver.run()
    for name, (_, max_tokens) in zip(names, sizes, strict=True):
        tokens = driver.tokens[name]
        assert (
            len(tokens) == max_tokens if EOS not in tokens else tokens.index(EOS) + 1 == len(tokens)
        )
    assert_nothing_left(driver)


def test_abort_at_every_stage_frees_everything(driver: Driver) -> None:
    """Before the first step, after it, around a replay, and while waiting for a place."""
    for stop_after in range(6):
        kept = driver.add(prompt_of(9, 7), 16, gamma=0.9)
        gone = [driver.add(prompt_of(30 + i, i), 25, gamma=1.1) for i in range(20)]  # 16 places
        for _ in range(stop_after):
            driver.step()
        driver.llm_engine.abort_request(gone)
        driver.run()
        assert kept in driver.finished
        assert_nothing_left(driver)
    answers = {tuple(driver.tokens[name]) for name in driver.finished}
    assert len(answers) == 1, "neighbours that were aborted changed an answer"


def test_row_budget_and_waiting_bound(driver: Driver) -> None:
    """No step exceeds the budget but with one request alone; nobody waits longer than promised."""
    scheduler = driver.engine.scheduler
    limits, scheduler.limits = scheduler.limits, dataclasses.replace(scheduler.limits, rows=96)
    try:
        for i in range(12):
            driver.add(prompt_of(10 + 9 * i, i), 20, policy=("none", "elastic")[i % 2])
        waited: dict[str, int] = {}
        while driver.llm_engine.has_unfinished_requests():
            plan_step, plans = scheduler._plan_step, []
            scheduler._plan_step = lambda: plans.extend(plan_step()) or plans  # noqa: B023
            driver.step()
            del scheduler._plan_step
            rows = sum(plan.num_rows for plan in plans)
            assert rows <= 96 or len(plans) == 1
            served = {plan.request_id for plan in plans}
            for request in scheduler.running:
                name = request.request_id
                waited[name] = 0 if name in served else waited.get(name, 0) + 1
                assert waited[name] <= 12
    finally:
        scheduler.limits = limits
    assert_nothing_left(driver)


def test_queue_over_a_small_cache_drains(driver: Driver) -> None:
    """More canvases than blocks: admission waits for blocks, and all of them come back."""
    scheduler = driver.engine.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 12)
    try:
        names = [driver.add(prompt_of(40 + i, i), 30, tokens_per_step=6) for i in range(20)]
        driver.run()
        assert set(names) <= set(driver.finished)
    finally:
        pool.free_blocks(taken)
    assert_nothing_left(driver)


@pytest.mark.parametrize("policy", ["elastic", "elastic-block"])
def test_not_finite_request_fails_alone(policy: str, driver: Driver) -> None:
    """NaN in one request's keys ends that request with an error and no other.

    The statistics of both are worked out together: the healthy one has fewer rows and positions.
    """
    knobs = {"policy": policy, "gamma": 0.9}
    sick = driver.add(prompt_of(33, 2), 24, **knobs)
    healthy = driver.add(prompt_of(12, 1), 24, **knobs, window=5)
    driver.step()
    runner, scheduler = driver.engine.runner, driver.engine.scheduler
    request = next(r for r in scheduler.running if r.request_id.startswith(sick))
    (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    runner.cache.keys[:, blocks[0]] = float("nan")
    driver.run()
    assert driver.finished[sick] == "error"
    alone = driver.add(prompt_of(12, 1), 24, **knobs, window=5)
    later = driver.add(prompt_of(33, 2), 24, **knobs)  # into the blocks that hold the NaN
    driver.run()
    assert driver.tokens[healthy] == driver.tokens[alone]
    records = driver.take_records()
    assert records[healthy].row_layers == records[alone].row_layers
    assert driver.finished[later] in ("length", "stop")
    assert_nothing_left(driver)


def test_a_request_that_cannot_begin_ends_alone(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission went by other knobs than the engine has: no reason to end the engine."""
    scheduler = driver.engine.scheduler
    narrow = dataclasses.replace(scheduler.elastic_config, max_window=32)
    monkeypatch.setattr(scheduler, "elastic_config", narrow)
    healthy = driver.add(prompt_of(12, 1), 24)
    driver.step()
    wide = driver.add(prompt_of(9, 2), 24, window=64)
    late = driver.add(prompt_of(7, 3), 8)
    driver.run()
    assert driver.finished[wide] == "error" and not driver.tokens[wide]
    assert {driver.finished[healthy], driver.finished[late]} <= {"stop", "length"}
    assert_nothing_left(driver)


def test_profile_run_needs_no_cache(driver: Driver) -> None:
    """What vLLM's GPU worker calls before there is a KV cache."""
    caches, driver.engine.runner.kv_caches = driver.engine.runner.kv_caches, {}
    try:
        driver.engine.runner.profile_run()
    finally:
        driver.engine.runner.kv_caches = caches


@pytest.mark.parametrize("model", ["gqa-tied", "dream"])
def test_warm_up_owns_nothing(
    model: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU at start: batches of all kinds, over blocks that no request has."""
    served = serve(model)
    runner: Any = served.engine.runner  # type: ignore[attr-defined]
    poison(served.engine)
    asked: set[tuple[int, int, int]] = set()
    metadata = PassLayout._metadata

    def seen(self: PassLayout, common: Any) -> Any:
        asked.add((common.num_reqs, common.max_query_len, common.max_seq_len))
        return metadata(self, common)

    monkeypatch.setattr(PassLayout, "_metadata", seen)
    runner.warm_up()
    monkeypatch.undo()
    assert asked == set(product((1, 2, 16), (1, 2, 32), (32,))) | set(
        product((1, 2, 16), (1, 2, 192), (256,))
    )
    for cache in runner.kv_caches.values():
        assert cache[1:].isnan().all(), "only vLLM's null block is written"
    cases = [(6, name) for name in ("none", "block")]
    compare(served, cases, served.engine.run([request(*case) for case in cases]))  # type: ignore[attr-defined]
