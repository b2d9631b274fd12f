# SPDX-License-Identifier: Apache-2.0
"""What the running server says of itself at /metrics."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from vllm_elastic.bench.server import ServerProcess

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USAGE = "vllm:kv_cache_usage_perc"


def read_metrics(server: ServerProcess) -> dict[str, float]:
    """Every metric by its name; samples that differ in their labels only are added up."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    metrics: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            sample, value = line.rsplit(" ", 1)
            name = sample.split("{")[0]
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return metrics


def wait_for(
    server: ServerProcess, wanted: Callable[[dict[str, float]], bool], seconds: float = 60.0
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


def is_idle(metrics: dict[str, float]) -> bool:
    """Nothing runs, nothing waits, no KV block is taken."""
    return metrics[RUNNING] == metrics[WAITING] == metrics[CACHE_USAGE] == 0


def is_running(count: int) -> Callable[[dict[str, float]], bool]:
    return lambda metrics: metrics[RUNNING] == count
