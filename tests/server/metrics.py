# SPDX-License-Identifier: Apache-2.0
"""Waiting for what the running server says of itself at /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.bench.server_metrics import (
    CACHE_USAGE,
    RUNNING,
    WAITING,
    ServerMetrics,
    read_metrics,
)


def wait_for(
    server: ServerProcess, wanted: Callable[[ServerMetrics], bool], seconds: float = 60.0
) -> None:
    """Wait until the metrics are as wanted.

    Raises:
        TimeoutError: they are not when the time is up; with what they are.
    """
    deadline = time.monotonic() + seconds
    while not wanted(metrics := read_metrics(server)):
        if time.monotonic() > deadline:
            state = {name: metrics.get(name) for name in (RUNNING, WAITING, CACHE_USAGE)}
            raise TimeoutError(f"after {seconds:.0f} s: {state}\n{server.log_tail()}")
        time.sleep(0.05)


def is_idle(metrics: ServerMetrics) -> bool:
    """Nothing runs, nothing waits, no KV block is taken."""
    return metrics[RUNNING] == metrics[WAITING] == metrics[CACHE_USAGE] == 0


def is_running(count: int) -> Callable[[ServerMetrics], bool]:
    return lambda metrics: metrics[RUNNING] == count
