# SPDX-License-Identifier: Apache-2.0
"""A worker that dies under load: its clients are told, and the server ends, as vLLM's does.

vLLM does not restart an engine. Whoever waits gets an error, /health turns 503, and the server's
process ends by itself, so that what started it can start it again.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server_metrics import RUNNING, ServerMetrics
from vllm_elastic.bench.server import ServerProcess

from .conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, Client, user
from .metrics import wait_for

SECONDS = 60.0  # vLLM notices within about a second, and looks every 5 s whether to end
# Token by token, with hundreds of full passes: no danger that it ends before the engine does.
KNOBS = {"elastic_policy": "none", "elastic_tokens_per_step": 1, "elastic_window": 1}
LONG: dict[str, Any] = {
    # Its answer begins with text, not with end tokens.
    "messages": user("Running total modulo 10 : pin 3 elf 1 fig 2 jet 0"),
    "max_tokens": 400,
    "ignore_eos": True,
    "vllm_xargs": KNOBS,
}
GONE = (urllib.error.URLError, http.client.HTTPException, OSError)


def stream(client: Client) -> dict[str, Any]:
    """The error that a streamed answer ended with, after some text."""
    *events, last = client.stream("chat/completions", **LONG)
    assert any(event["choices"][0]["delta"].get("content") for event in events)
    return last["error"]


def ask(client: Client) -> dict[str, Any]:
    status, answer = client.post("chat/completions", **LONG)
    assert status == 500
    return answer["error"]


def is_busy(metrics: ServerMetrics) -> bool:
    return metrics[RUNNING] == 4 and metrics["vllm:generation_tokens_total"] > 20


@pytest.mark.parametrize(
    "title", [pytest.param("VLLM::Worker", marks=pytest.mark.long), "VLLM::EngineCore"]
)
@pytest.mark.slow
def test_clients_are_told_and_the_server_ends(title: str, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    with (
        ServerProcess(MODEL, options, log=tmp_path / "server.log") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        client = Client(server)
        asked = [pool.submit(kind, client) for kind in (stream, ask, stream, ask)]
        wait_for(server, is_busy)
        assert not any(future.done() for future in asked)
        children = psutil.Process(server.pid).children(recursive=True)
        (victim,) = [child for child in children if child.name() == title]
        started = time.monotonic()
        victim.kill()
        for future in asked:
            error = future.result(SECONDS)
            assert error["code"] == 500 and "EngineCore" in error["message"]
        while server.is_running():
            assert time.monotonic() - started < SECONDS, server.log_tail()
            try:
                status, _ = client.chat("Sort : 2 1", max_tokens=4)
            except GONE:
                break  # the server listens no more
            assert status >= 500
        # vLLM's own way to end: not with an error code, and nobody stays behind.
        assert server.wait(SECONDS) == 0
        _, alive = psutil.wait_procs(children, SECONDS)
        assert not alive
