# SPDX-License-Identifier: Apache-2.0
"""Servers with several processes that compute: started, compared with the oracle, and broken."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from tests.server.conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, Client, questions, user
from tests.server.metrics import wait_for
from tests.server.test_worker_death import GONE, ask, is_busy, stream
from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.reference import ElasticOptions, LLaDA, elastic_cache

CANVAS = 24
LIMIT = 110.0  # seconds for everything after something died; less than what a client waits
OPTIONS: dict[str, Any] = {"gamma": 0.8, "window": 12, "commit": "threshold"}
LIMITS = ["--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
LIMITS += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--served-model-name", "tiny"]
LIMITS += ["--elastic-config", json.dumps({"policy": "elastic", **OPTIONS})]


def serve(log: Path, options: Sequence[str], env: Mapping[str, str]) -> ServerProcess:
    """``vllm serve`` of the tiny model in float32."""
    return ServerProcess(MODEL, [*LIMITS, *options], log=log, start_seconds=600, env=env)


def a_core_each() -> str:
    """For VLLM_CPU_OMP_THREADS_BIND: a core for each of two; the same where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"


def answers_equal_oracle(server: ServerProcess, count: int) -> int:
    """Ask ``count`` questions at once.

    Returns:
        how many answers are the oracle's, token for token: all of them.
    """
    client = Client(server)

    def answer(question: str) -> tuple[int, dict[str, Any]]:
        return client.post(
            "chat/completions", messages=user(question), max_tokens=CANVAS, return_token_ids=True
        )

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(answer, questions(count)))
    for status, body in answers:
        assert status == 200, body
        assert_equals_oracle(body["prompt_token_ids"], body["choices"][0]["token_ids"])
    return len(answers)


def assert_equals_oracle(prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> None:
    """The tiny model's answer with ``CANVAS`` and ``OPTIONS``."""
    expected = elastic_cache(oracle(), prompt_token_ids, CANVAS, ElasticOptions(**OPTIONS))
    assert list(token_ids) == expected.token_ids
    assert len(expected.token_ids) > 1, "an answer that could tell a difference"


@cache
def oracle() -> LLaDA:
    return LLaDA.from_pretrained(MODEL)


def seconds_until_told_and_ended(
    server: ServerProcess, break_it: Callable[[], None], limit: float
) -> tuple[float, float]:
    """Break the server under load, streams and plain requests.

    Returns:
        the seconds until the last client had its error, and until the server's process had ended.

    Raises:
        AssertionError: a client was not told, or told something else.
        TimeoutError: either took longer than ``limit``.
    """
    client = Client(server)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(kind, client) for kind in (stream, ask, stream, ask)]
        wait_for(server, is_busy)
        assert not any(future.done() for future in asked)
        started = time.monotonic()
        break_it()
        for future in asked:
            error = future.result(limit)
            assert error["code"] == 500 and "EngineCore" in error["message"]
        told = time.monotonic() - started
    while server.is_running():
        assert time.monotonic() - started < limit, server.log_tail()
        try:
            status, _ = client.chat("Sort : 2 1", max_tokens=4)
        except GONE:
            break  # it listens no more
        assert status >= 500
        time.sleep(0.1)
    # vLLM's own way to end: not with an error code.
    assert server.wait(limit) == 0
    return told, time.monotonic() - started
