# SPDX-License-Identifier: Apache-2.0
"""Reading `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reliability import server_state
from tests.server_metrics import (
    CACHE_CONFIG,
    CACHE_USAGE,
    RUNNING,
    WAITING,
    ServerMetrics,
    read_metrics,
)

PASSES = "vllm:elastic_passes_total"
TEXT = f"""\
# HELP {RUNNING} Number of requests in model execution batches.
# TYPE {RUNNING} gauge
{RUNNING}{{engine="0",model_name="a b}} 1"}} 2.0
{RUNNING}{{engine="1",model_name="a b}} 1"}} 3.0
# TYPE {WAITING} gauge
{WAITING}{{engine="0",model_name="tiny"}} 0.0
# TYPE {CACHE_USAGE} gauge
{CACHE_USAGE}{{engine="0",model_name="tiny"}} 0.25
# TYPE {CACHE_CONFIG} gauge
{CACHE_CONFIG}{{block_size="16",num_gpu_blocks="201",num_gpu_blocks_override="None"}} 1.0
# TYPE vllm:elastic_passes counter
{PASSES}{{kind="first",policy="none"}} 1.0
{PASSES}{{kind="full",policy="none"}} 4.0
{PASSES}{{kind="full",policy="elastic"}} 1e+06
# TYPE vllm:latency_seconds histogram
vllm:latency_seconds_bucket{{le="0.5"}} 1.0
vllm:latency_seconds_bucket{{le="+Inf"}} 2.0
vllm:latency_seconds_count 2.0
vllm:latency_seconds_sum 1.5
process_open_fds 27.0
"""


@pytest.fixture
def server() -> Iterator[Any]:
    """All that the reader needs of a server: its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", pid=0)
        http.shutdown()


def test_samples_that_differ_in_labels_are_added_up() -> None:
    metrics = ServerMetrics(TEXT)
    assert metrics[RUNNING] == 5
    assert metrics[PASSES] == 1_000_005
    assert metrics["vllm:latency_seconds_count"] == 2
    assert metrics["process_open_fds"] == 27
    assert {RUNNING, WAITING, CACHE_USAGE} <= set(metrics)


def test_total_of_some_labels() -> None:
    metrics = ServerMetrics(TEXT)
    assert metrics.total(PASSES, policy="none") == 5
    assert metrics.total(PASSES, policy="none", kind="full") == 4
    assert metrics.total(PASSES, policy="interval") == 0  # not counted yet


def test_unknown_metric_is_no_zero() -> None:
    metrics = ServerMetrics(TEXT)
    assert "vllm:renamed" not in metrics
    with pytest.raises(KeyError):
        metrics["vllm:renamed"]
    with pytest.raises(KeyError):
        metrics.total("vllm:renamed", policy="none")
    with pytest.raises(KeyError):
        metrics.label(CACHE_CONFIG, "renamed")


def test_not_metrics() -> None:
    with pytest.raises(ValueError):
        ServerMetrics("<html>no such page</html>")


def test_read(server: Any) -> None:
    assert dict(read_metrics(server)) == dict(ServerMetrics(TEXT))


def test_state(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_state, "_processes", lambda pid: {})
    state = server_state.read_state(server)
    # vLLM's null block is not counted.
    assert (state.running, state.waiting) == (5, 0)
    assert (state.blocks_in_use, state.blocks) == (50, 200)
    assert not state.is_idle
