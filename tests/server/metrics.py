# SPDX-License-Identifier: Apache-2.0
"""Waiting for what the running server says of itself at /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.server_metrics import (
    CACHE_USAGE,
    RUNNING,
    WAITING,
    ServerMetrics,
    read_metrics,
)
from vllm_elastic.bench.server import ServerProcess

# A reading that the machine held up says nothing of now: it is given up, and one alone is no proof.
READING_SECONDS = 10.0
FEWEST_READINGS = 5


def wait_for(
    server: ServerProcess, wanted: Callable[[ServerMetrics], bool], seconds: float = 60.0
) -> None:
    """Wait until the metrics are as wanted.

    Raises:
        TimeoutError: they are not when the time is up; with what they are, and how long the
            readings took.
    """
    deadline = time.monotonic() + seconds
    took: list[float] = []
    state: dict[str, float | None] | str = {}
    while len(took) < FEWEST_READINGS or time.monotonic() < deadline:
        began = time.monotonic()
        try:
            metrics = read_metrics(server, READING_SECONDS)
        except TimeoutError as error:
            state = f"no answer from /metrics: {error}"
        else:
            if wanted(metrics):
                return
            state = {name: metrics.get(name) for name in (RUNNING, WAITING, CACHE_USAGE)}
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    readings = f"{len(took)} readings, the longest {max(took):.1f} s"
    raise TimeoutError(f"after {seconds:.0f} s, {readings}: {state}\n{server.log_tail()}")


def is_idle(metrics: ServerMetrics) -> bool:
    """Nothing runs, nothing waits, no KV block is taken."""
    return metrics[RUNNING] == metrics[WAITING] == metrics[CACHE_USAGE] == 0


def is_running(count: int) -> Callable[[ServerMetrics], bool]:
    return lambda metrics: metrics[RUNNING] == count
