# SPDX-License-Identifier: Apache-2.0
"""Pausing, and sleep and wake, with requests in flight: no token is lost and none comes twice.

vLLM pauses its scheduler in one of three modes: requests in flight are aborted, waited for, or kept
where they are. Clearing the cache, which every sleep does, takes their KV blocks away as well, and
their canvases start again from what is committed.

What a GPU worker does to its memory in between (it is unmapped, and comes back with whatever is in
it) is played here by filling all KV blocks with NaN, and the weights with zeros.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from .conftest import EOS, Served, poison
from .driver import Driver, assert_nothing_left, prompt_of

pytestmark = pytest.mark.engine

REQUESTS: list[tuple[list[int], int, dict[str, Any], dict[str, Any]]] = [
    (prompt_of(20, 1), 24, {"policy": "none"}, {}),
    (prompt_of(33, 2), 30, {"policy": "none"}, {"temperature": 0.9, "seed": 4}),
    (prompt_of(9, 3), 24, {"policy": "elastic", "gamma": 0.9}, {}),
    (prompt_of(50, 4), 24, {"policy": "dual-cache", "block_length": 8}, {}),
]
LATE = (prompt_of(12, 5), 16, {"policy": "elastic", "gamma": 0.9}, {})


@pytest.fixture
def driver(serve: Callable[[str], Served]) -> Iterator[Driver]:
    driver = Driver(serve("gqa-tied"))
    yield driver
    # After a failure too: the engine is the session's.
    driver.engine.llm.wake_up()
    driver.llm_engine.abort_request(list(driver.tokens))


@pytest.fixture(scope="module")
def expected(serve: Callable[[str], Served]) -> list[list[int]]:
    """The answers of undisturbed requests, the late one's last."""
    driver = Driver(serve("gqa-tied"))
    names = []
    for prompt, size, knobs, sampling in [*REQUESTS, LATE]:
        names.append(driver.add(prompt, size, sampling, **knobs))
        driver.run()
    assert_nothing_left(driver)
    return [driver.tokens[name] for name in names]


def assert_complete(driver: Driver, name: str, size: int) -> None:
    tokens = driver.tokens[name]
    assert driver.finished[name] in ("length", "stop")
    assert len(tokens) == size or driver.finished[name] == "stop"
    assert EOS not in tokens[:-1]


def start(driver: Driver, steps: int) -> list[str]:
    names = [driver.add(p, size, s, **knobs) for p, size, knobs, s in REQUESTS]
    for _ in range(steps):
        driver.step()
    return names


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("what", ["pause", "pause and clear", "sleep 1", "sleep 2"])
def test_kept_requests_go_on(
    what: str, steps: int, driver: Driver, expected: list[list[int]]
) -> None:
    core: Any = driver.engine.llm.llm_engine.engine_core.engine_core
    names = start(driver, steps)
    if what.startswith("sleep"):
        level = int(what[-1])
        driver.engine.llm.sleep(level, mode="keep")
        poison(driver.engine)  # what was in the KV blocks is gone
        if level == 2:
            core.collective_rpc("reset_weights")  # and the weights too
    else:
        core.pause_scheduler("keep", clear_cache="clear" in what)
    names.append(driver.add(*LATE[:2], LATE[3], **LATE[2]))
    shown = {name: list(driver.tokens[name]) for name in names}
    for _ in range(3):
        driver.step()
    assert shown == {name: driver.tokens[name] for name in names}, "went on while paused"
    if what == "sleep 2":
        driver.engine.llm.collective_rpc("reload_weights")
    if what.startswith("sleep"):
        assert driver.engine.llm.wake_up()
    else:
        core.resume_scheduler()
    driver.run()
    for index, name in enumerate(names):
        assert_complete(driver, name, [*REQUESTS, LATE][index][1])
        # A cached policy's answer may change where its canvas started again.
        if what == "pause" or steps == 0 or index in (0, 1, 4):
            assert driver.tokens[name] == expected[index]
    assert_nothing_left(driver)


def test_pause_that_aborts(driver: Driver, expected: list[list[int]]) -> None:
    """LLM.sleep's default: nothing of the aborted requests stays."""
    names = start(driver, 3)
    driver.engine.llm.sleep(1)
    driver.llm_engine.abort_request(names)  # in this process vLLM's front end is not told
    poison(driver.engine)
    scheduler = driver.engine.scheduler
    assert not scheduler.requests and not scheduler._denoising
    assert scheduler.kv_cache_manager.usage == 0
    for name, answer in zip(names, expected[:-1], strict=True):
        assert driver.tokens[name] == answer[: len(driver.tokens[name])]
    late = driver.add(*LATE[:2], LATE[3], **LATE[2])
    driver.engine.llm.wake_up()
    driver.run()
    assert driver.tokens[late] == expected[-1]
    assert_nothing_left(driver)


def test_weights_are_reloaded(driver: Driver, expected: list[list[int]]) -> None:
    """What a GPU needs after a sleep of level 2; without it the weights are anything."""

    def answer() -> list[int]:
        name = driver.add(*LATE[:2], LATE[3], **LATE[2])
        driver.run()
        return driver.tokens[name]

    driver.engine.llm.collective_rpc("reset_weights")
    assert answer() != expected[-1]
    driver.engine.llm.collective_rpc("reload_weights")
    assert answer() == expected[-1]
    assert_nothing_left(driver)


def test_sleep_mode_is_refused_on_cpu(serve: Callable[[str], Served]) -> None:
    """By vLLM: a CPU has no memory to give back. `sleep` without it pauses, and warns."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported"):
        EngineArgs(
            model=str(serve("gqa-tied").directory), enable_sleep_mode=True, skip_tokenizer_init=True
        ).create_engine_config()


@dataclass
class Stream:
    """A request to an engine in a process of its own, and what came of it so far."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    task: asyncio.Task[None] | None = None

    async def read(self, engine: Any, name: str, request: tuple[Any, ...]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt, size, knobs, sampling = request
        params = SamplingParams(
            max_tokens=size,
            detokenize=False,
            extra_args={f"elastic_{k}": v for k, v in knobs.items()},
            output_kind=RequestOutputKind.DELTA,
            **{"temperature": 0, "stop_token_ids": [EOS], **sampling},
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
            self.tokens += output.outputs[0].token_ids
            self.reason = output.outputs[0].finish_reason


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(serve: Callable[[str], Served], runner: asyncio.Runner) -> Iterator[Any]:
    """vLLM's asynchronous engine, as under its server: the core is a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=str(serve("gqa-tied").directory),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
        skip_tokenizer_init=True,
    )

    async def make() -> Any:
        return AsyncLLM.from_engine_args(args)

    engine = runner.run(make())
    yield engine
    engine.shutdown()


# Token by token, so that they are in flight when the pause comes.
SLOW = {"tokens_per_step": 1, "window": 1}
SLOW_REQUESTS = [(prompt, 100, {**knobs, **SLOW}, s) for prompt, _, knobs, s in REQUESTS]


def ask(engine: Any, request: tuple[Any, ...]) -> Stream:
    stream = Stream()
    stream.task = asyncio.create_task(stream.read(engine, f"request{id(stream)}", request))
    return stream


async def finish(*streams: Stream) -> None:
    await asyncio.wait_for(asyncio.gather(*(s.task for s in streams if s.task)), 60)


@pytest.fixture(scope="module")
def undisturbed(engine: Any, runner: asyncio.Runner) -> list[Stream]:
    async def one_by_one() -> list[Stream]:
        streams = []
        for request in [*SLOW_REQUESTS, LATE]:
            streams.append(ask(engine, request))
            await finish(streams[-1])
        return streams

    return runner.run(one_by_one())


@pytest.mark.parametrize("how", ["pause", "sleep"])
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@pytest.mark.slow
def test_pause_under_load(
    mode: str, how: str, engine: Any, runner: asyncio.Runner, undisturbed: list[Stream]
) -> None:
    """``sleep`` also takes all KV blocks away; on a CPU no memory is given back."""
    import vllm
    from vllm.exceptions import RetryableRequestError

    # vLLM 0.33 turns new requests away in these pauses; 0.32 lets them wait.
    is_queued = mode == "keep" or how == "sleep" or vllm.__version__.startswith("0.32.")

    async def pause_and_resume() -> None:
        streams = [ask(engine, request) for request in SLOW_REQUESTS]
        while not all(stream.tokens for stream in streams):
            await asyncio.sleep(0.002)
        if how == "pause":
            await asyncio.wait_for(engine.pause_generation(mode=mode, clear_cache=False), 60)
        else:
            await asyncio.wait_for(engine.sleep(1, mode), 60)
        assert await engine.is_paused() and await engine.is_sleeping()
        late = ask(engine, LATE)
        if mode != "keep":
            await finish(*streams)
        paused = [list(stream.tokens) for stream in streams]
        await asyncio.sleep(0.3)
        assert paused == [stream.tokens for stream in streams] and not late.tokens, "not paused"
        if how == "pause":
            await engine.resume_generation()
        else:
            assert await engine.wake_up()
        if not is_queued:
            with pytest.raises(RetryableRequestError):
                await finish(late)
            late = ask(engine, LATE)
        await finish(*streams, late)
        assert not await engine.is_paused()

        *expected, expected_late = undisturbed
        assert late.tokens == expected_late.tokens
        for index, (stream, alone) in enumerate(zip(streams, expected, strict=True)):
            if mode == "abort":
                assert stream.reason == "abort"
                assert stream.tokens == alone.tokens[: len(stream.tokens)]
            elif mode == "keep" and how == "sleep" and index > 1:  # cached, and started again
                assert len(stream.tokens) == 100 or stream.reason == "stop"
            else:
                assert (stream.tokens, stream.reason) == (alone.tokens, alone.reason)

    runner.run(pause_and_resume())
