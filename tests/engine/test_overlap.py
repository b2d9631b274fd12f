# SPDX-License-Identifier: Apache-2.0
"""Two passes in flight (``--async-scheduling``): the same answers, passes and records as with one.

vLLM's own engine loop queues the steps. On a CPU a pass is over when it is queued, but its results
are read only when vLLM asks, after the next pass has written every buffer that stays.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from vllm_elastic.decoding import overlap
from vllm_elastic.runner.in_flight import PassInFlight

from .asynchronous import on_cpus
from .conftest import Served, make_engine, poison
from .driver import Driver, assert_nothing_left, prompt_of
from .schedules import Schedule, schedules
from .test_batch_invariance import QUICK, check, in_depth
from .test_oracle import CONFIGS, compare, request

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def _on_cpus() -> Iterator[None]:
    with on_cpus():
        yield


@pytest.fixture(scope="module")
def overlapped(serve: Callable[[str], Served]) -> Callable[[str], Served]:
    """The models of ``serve`` in engines that overlap."""
    loaded: dict[str, Served] = {}

    def load(name: str) -> Served:
        if name not in loaded:
            plain = serve(name)
            engine = make_engine(plain.directory, async_scheduling=True)
            loaded[name] = replace(plain, engine=engine)
        return loaded[name]

    return load


class Watched:
    """Who is in flight, from queueing a pass to vLLM's reading of its results.

    Attributes:
        most: passes at a time.
        pairs: sizes of the two groups, each time that two were in flight.
    """

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self.passes = 0
        self.pairs: list[tuple[int, ...]] = []
        self._groups: dict[int, list[str]] = {}
        runner, results = driver.engine.runner, PassInFlight.results
        start = runner.start

        def started(plans: Any) -> Any:
            in_flight = start(plans)
            names = [plan.request_id for plan in plans]
            for group in self._groups.values():
                assert not set(names) & set(group), "in two passes at a time"
            self._groups[id(in_flight)] = names
            self.passes += 1
            self.most = max(self.most, len(self._groups))
            if len(self._groups) == 2:
                self.pairs.append(tuple(map(len, self._groups.values())))
            return in_flight

        def read(in_flight: PassInFlight) -> Any:
            del self._groups[id(in_flight)]
            return results(in_flight)

        monkeypatch.setattr(runner, "start", started)
        monkeypatch.setattr(PassInFlight, "results", read)


@pytest.mark.slow
def test_batch_of_16_equals_oracle(
    overlapped: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All configurations mixed, joining and leaving as they come and finish."""
    served = overlapped("gqa-tied")
    seen = Watched(Driver(served), monkeypatch)
    cases = list(itertools.product(range(0, 32, 8), CONFIGS))
    engine: Any = served.engine
    compare(served, cases, engine.run([request(*case) for case in cases]))
    assert seen.most == 2
    assert len(seen.pairs) > 0.9 * seen.passes, "the queue ran empty"
    # Groups part by one where the number is odd, by more where requests have just come or gone.
    near = [pair for pair in seen.pairs if abs(pair[0] - pair[1]) <= 2]
    assert len(near) > 0.8 * len(seen.pairs)


def test_few_rows_stay_together(
    overlapped: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group would read the weights for next to nothing."""
    monkeypatch.setattr(overlap, "GROUP_ROWS", 10_000)
    driver = Driver(overlapped("gqa-tied"))
    seen = Watched(driver, monkeypatch)
    names = [driver.add(prompt_of(20, 1), 12, tokens_per_step=1) for _ in range(6)]
    driver.run()
    assert len({tuple(driver.tokens[name]) for name in names}) == 1
    passes = {record.passes for record in driver.take_records().values()}
    assert seen.most == 1 and passes == {seen.passes}
    assert_nothing_left(driver)


@QUICK
@given(schedule=schedules())
@pytest.mark.slow
def test_answer_does_not_depend_on_the_batch(
    overlapped: Callable[[str], Served], serve: Callable[[str], Served], schedule: Schedule
) -> None:
    """Random requests, arrivals, limits and aborts, against each alone in an engine without."""
    check(Driver(overlapped(schedule.model)), Driver(serve(schedule.model)), schedule)


@QUICK
@given(schedule=schedules(resets=True))
@pytest.mark.slow
def test_restarts_lose_and_double_nothing(
    overlapped: Callable[[str], Served], serve: Callable[[str], Served], schedule: Schedule
) -> None:
    """All KV blocks are taken away, also those of passes in flight."""
    check(Driver(overlapped(schedule.model)), Driver(serve(schedule.model)), schedule)


test_answer_does_not_depend_on_the_batch_long = in_depth(
    test_answer_does_not_depend_on_the_batch, schedules()
)
test_restarts_lose_and_double_nothing_long = in_depth(
    test_restarts_lose_and_double_nothing, schedules(resets=True)
)


@pytest.mark.slow
def test_blocks_of_an_aborted_pass_are_used_again(serve: Callable[[str], Served]) -> None:
    """Few blocks: whoever is aborted in flight leaves its own to the next one at once."""
    plain = serve("gqa-tied")
    blocks = 4 * 3 + 1  # of four requests, and the null block
    engine = make_engine(plain.directory, async_scheduling=True, num_gpu_blocks_override=blocks)
    driver, single = Driver(replace(plain, engine=engine)), Driver(plain)
    policies: list[dict[str, Any]] = [
        {"policy": "none"},
        {"policy": "elastic-block"},
        {"policy": "elastic", "refresh": "next", "gamma": 0.9},
    ]
    asks = [(prompt_of(51 + n, n), 40, policies[n % 3]) for n in range(5)]
    expected = []
    for prompt, size, knobs in asks:
        name = single.add(prompt, size, **knobs)
        single.run()
        expected.append(single.tokens[name])
    single.take_records()
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    kept: dict[str, list[int]] = {}
    reused = 0
    for number in range(80):
        prompt, size, knobs = asks[number % 5]
        name = driver.add(prompt, size, **knobs)
        if number % 8 == 0:
            kept[name] = expected[number % 5]
        driver.step()
        gone = [
            request_id
            for request_id in scheduler._denoising
            if request_id in scheduler._in_flight and request_id.split("-")[0] not in kept
        ][:1]
        if gone:
            freed = set(manager.get_block_ids(gone[0])[0])
            driver.llm_engine.abort_request([gone[0].split("-")[0]])
            driver.step()
            owned = {b for each in scheduler._denoising for b in manager.get_block_ids(each)[0]}
            reused += freed <= owned
    driver.run()
    assert reused > 10
    assert {name: driver.tokens[name] for name in kept} == kept
    assert_nothing_left(driver)


@pytest.mark.parametrize("clear", [False, True], ids=["kept", "cleared"])
@pytest.mark.slow
def test_pause(
    clear: bool, overlapped: Callable[[str], Served], serve: Callable[[str], Served]
) -> None:
    """What is in flight comes back, nothing else runs, and all goes on."""
    asks = [(prompt_of(30 + n, n), 40) for n in range(5)]
    plain, expected = Driver(serve("gqa-tied")), []
    for ask in asks:
        name = plain.add(*ask, policy="none", tokens_per_step=1)
        plain.run()
        expected.append(plain.tokens[name])
    assert_nothing_left(plain)
    driver = Driver(overlapped("gqa-tied"))
    core: Any = driver.llm_engine.engine_core.engine_core
    names = [driver.add(*ask, policy="none", tokens_per_step=1) for ask in asks]
    for _ in range(6):
        driver.step()
    assert len(driver.engine.scheduler._in_flight)
    core.pause_scheduler("keep", clear_cache=clear)
    driver.drain()
    assert not len(driver.engine.scheduler._in_flight)
    shown = {name: list(driver.tokens[name]) for name in names}
    for _ in range(3):
        driver.step()
    assert shown == {name: driver.tokens[name] for name in names}
    if clear:
        poison(driver.engine)
    core.resume_scheduler()
    driver.run()
    assert [driver.tokens[name] for name in names] == expected
    assert_nothing_left(driver)


def test_logits_that_are_not_finite_end_their_request_alone(
    overlapped: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(overlapped("gqa-tied"))
    results = PassInFlight.results
    names = [driver.add(prompt_of(30, n), 20, tokens_per_step=1) for n in range(4)]

    def broken(in_flight: PassInFlight) -> Any:
        found = results(in_flight)
        for plan, result in zip(in_flight._plans, found, strict=True):
            if plan.request_id.startswith(names[1]) and plan.denoising_step == 3:
                result.probabilities[:] = float("nan")
        return found

    monkeypatch.setattr(PassInFlight, "results", broken)
    driver.run()
    assert [driver.finished[name] for name in names] == ["length", "error", "length", "length"]
    assert [len(driver.tokens[name]) for name in names[2:]] == [20, 20]
    assert_nothing_left(driver)


@pytest.mark.long
def test_an_engine_of_its_own_process(serve: Callable[[str], Served]) -> None:
    """As under vLLM's server: the core's busy loop, requests that come and hang up, a pause."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    plain = serve("gqa-tied")
    args = AsyncEngineArgs(
        model=str(plain.directory),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
        skip_tokenizer_init=True,
        async_scheduling=True,
    )
    # With no cache, each step computes whole canvases: above the bound, which is the real one here.
    knobs = {"policy": "none", "tokens_per_step": 1}
    asks = [(prompt_of(190 + n, n), 50) for n in range(6)]
    driver, expected = Driver(plain), []
    for ask in asks:
        name = driver.add(*ask, **knobs)
        driver.run()
        expected.append(driver.tokens[name])
    assert_nothing_left(driver)

    async def serve_all() -> None:
        engine = AsyncLLM.from_engine_args(args)

        async def answer(number: int, patience: int | None = None) -> list[int]:
            prompt, size = asks[number]
            params = SamplingParams(
                max_tokens=size,
                temperature=0,
                detokenize=False,
                extra_args={f"elastic_{k}": v for k, v in knobs.items()},
            )
            stream = engine.generate({"prompt_token_ids": prompt}, params, f"{number}{patience}")
            tokens: list[int] = []
            async for output in stream:
                tokens = list(output.outputs[0].token_ids)
                if patience is not None and len(tokens) >= patience:
                    break
            return tokens

        try:
            whole = [asyncio.create_task(answer(n)) for n in range(6)]
            gone = [asyncio.create_task(answer(n, 1 + n)) for n in range(6)]
            await asyncio.gather(*gone)
            await engine.pause_generation(mode="keep", clear_cache=False)
            await asyncio.sleep(0.2)
            await engine.resume_generation()
            assert await asyncio.gather(*whole) == expected
        finally:
            engine.shutdown()

    asyncio.run(asyncio.wait_for(serve_all(), 120))
