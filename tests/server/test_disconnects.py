# SPDX-License-Identifier: Apache-2.0
"""Clients that hang up, at every stage: nothing of theirs stays, and neighbours do not notice."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from tests.server_metrics import RUNNING, WAITING, read_metrics

from .conftest import Client, questions, user
from .metrics import is_idle, wait_for

CANVAS = 400
# Token by token, every pass over the whole canvas: an answer takes seconds.
SLOW: dict[str, Any] = {
    "messages": user("Sort : 2 1"),
    "max_tokens": CANVAS,
    "ignore_eos": True,
    "vllm_xargs": {"elastic_policy": "none", "elastic_tokens_per_step": 1, "elastic_window": 1},
}
GENERATED = "vllm:generation_tokens_total"


def hang_up(
    client: Client, after_events: int, stay_until: Event | None = None, **options: Any
) -> int:
    """Ask, read so many events (0: not even the status line), close the connection.

    With an event to ``stay_until``, not before it has happened.

    Returns:
        the events that there were.
    """
    connection = http.client.HTTPConnection("127.0.0.1", client.server.port, timeout=120)
    body = json.dumps({**SLOW, "stream": True, **options})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    if after_events == 0:
        time.sleep(0.2)
        if stay_until:
            assert stay_until.wait(120)
        connection.close()
        return 0
    response = connection.getresponse()
    assert response.status == 200
    count = 0
    for line in response:
        count += line.startswith(b"data: {")
        if count == after_events:
            break
    if stay_until:
        assert stay_until.wait(120)
    response.close()  # it holds the socket too
    connection.close()
    return count


def answer(client: Client, question: str) -> tuple[str, list[int]]:
    status, body = client.chat(question, max_tokens=48, return_token_ids=True)
    assert status == 200, body
    (choice,) = body["choices"]
    return choice["message"]["content"], choice["token_ids"]


@pytest.fixture
def neighbour(alive: Client) -> Iterator[Client]:
    """The client of somebody whose answers have to be the same before, meanwhile and afterwards."""
    asked = questions(3)
    wait_for(alive.server, is_idle)
    before = [answer(alive, question) for question in asked]
    with ThreadPoolExecutor(3) as pool:
        meanwhile = [pool.submit(answer, alive, question) for question in asked]
        yield alive
        assert [future.result(120) for future in meanwhile] == before
    wait_for(alive.server, is_idle)
    assert [answer(alive, question) for question in asked] == before


@pytest.mark.parametrize(
    ("after_events", "stream"),
    [
        (1, True),
        *(
            pytest.param(*when, marks=pytest.mark.slow)
            for when in [(0, False), (0, True), (10, True)]
        ),
    ],
)
def test_one_hangs_up(neighbour: Client, after_events: int, stream: bool) -> None:
    """Before the first token, at the first event and in mid-stream."""
    assert hang_up(neighbour, after_events, stream=stream) == after_events


def test_request_is_ended_not_finished(client: Client) -> None:
    """What nobody waits for is not computed to its end."""
    wait_for(client.server, is_idle)
    before = read_metrics(client.server)[GENERATED]
    hang_up(client, 5)
    hang_up(client, 0, stream=False)
    wait_for(client.server, is_idle)
    assert read_metrics(client.server)[GENERATED] - before < CANVAS


@pytest.mark.parametrize("missing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_hangs_up_at_the_end(neighbour: Client, missing: int) -> None:
    """With the last event, or the one before it, still unread."""
    short = {"max_tokens": 12, "vllm_xargs": {"elastic_window": 1}}
    total = hang_up(neighbour, -1, **short)  # waits to the end
    # Under load the server may put two steps' text into one event; then this reads to the end.
    assert 0 < hang_up(neighbour, total - missing, **short) <= total - missing


@pytest.mark.slow
def test_many_hang_up_at_once(neighbour: Client) -> None:
    """More canvases than the KV cache holds: some of them never got a place."""
    everyone_asked = Event()
    with ThreadPoolExecutor(24) as pool:
        gone = [
            pool.submit(
                hang_up,
                neighbour,
                (0, 1, 4)[i % 3],
                everyone_asked,
                stream=i % 2 == 0 or i % 3 > 0,
            )
            for i in range(24)
        ]
        try:
            wait_for(neighbour.server, lambda metrics: metrics[RUNNING] > 0 < metrics[WAITING])
        finally:
            everyone_asked.set()
        for future in gone:
            future.result(120)
