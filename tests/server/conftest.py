# SPDX-License-Identifier: Apache-2.0
"""One `vllm serve` for the session, and the tiny model's problems."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines_kept import keep_engines
from tests.reliability.fuzz import SERVER_LIMITS
from tests.trace_receiver import EXPORTS, TraceReceiver
from vllm_elastic.bench.server import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_llada" / "checkpoint"
MODEL_LENGTH = 512
KV_CACHE_BYTES = 64 << 20  # 3,800 positions, 7 full canvases


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


class Client:
    """JSON over HTTP. The OpenAI client would hide what the server really answers."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        try:
            with self._open(path, body) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, question: str, **options: Any) -> tuple[int, dict[str, Any]]:
        return self.post("chat/completions", messages=user(question), **options)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer."""
        with self._open(path, {**body, "stream": True}) as answer:
            lines = [line.decode().strip() for line in answer]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.server.url}/v1/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)


def user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def questions(count: int) -> list[str]:
    """Held-out questions, the tasks in turn."""
    folder = str(ROOT / "examples" / "tiny_llada")
    sys.path.insert(0, folder)
    try:
        from tasks import TASKS, problems
    finally:
        sys.path.remove(folder)
    share = -(-count // len(TASKS))
    columns = [problems(task, 7, share) for task in TASKS]
    return [p.question for row in zip(*columns, strict=True) for p in row][:count]


@pytest.fixture(scope="session", autouse=True)
def _engines_are_kept() -> None:
    keep_engines()


@pytest.fixture(scope="session")
def traces() -> Iterator[TraceReceiver]:
    with TraceReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory, traces: TraceReceiver) -> Iterator[Client]:
    """A server of the tiny model in float32."""
    options = ["--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--served-model-name", "tiny"]
    options += ["--elastic-config", json.dumps({"policy": "elastic", "gamma": 0.8, "window": 12})]
    options += ["--otlp-traces-endpoint", traces.url]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(MODEL, options, log=log, env={**SERVER_LIMITS, **EXPORTS}) as server:
        yield Client(server)


@pytest.fixture
def alive(client: Client) -> Iterator[Client]:
    """The client; afterwards the server must still answer."""
    yield client
    status, answer = client.chat("Sort : 2 1", max_tokens=4)
    assert (status, answer["usage"]["completion_tokens"] > 0) == (200, True), (
        client.server.log_tail()
    )
