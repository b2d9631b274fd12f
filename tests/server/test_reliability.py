# SPDX-License-Identifier: Apache-2.0
"""`make soak` and `make fuzz` in short, and the bad requests that the fuzzer found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.reliability import soak as soak_module
from tests.reliability.fuzz import find_problems as find_fuzz_problems
from tests.reliability.fuzz import fuzz
from tests.reliability.soak import find_problems, soak
from tests.reliability.traffic import ask_alone, mixed_asks

from .conftest import MODEL, Client
from .test_refusals import refusal


@pytest.mark.long
def test_soak_in_short(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the KV cache holds, whole, streamed and left: the same answers as alone."""
    # Often: at the first second the clients of a busy machine may not have begun.
    monkeypatch.setattr(soak_module, "SAMPLE_SECONDS", 0.3)
    asks = mixed_asks(16, MODEL)
    right = ask_alone(client.server.address, asks)
    run = soak(client.server, asks, right, seconds=3.0, clients=40)
    assert find_problems(run) == []
    tally = run.tally
    assert tally.is_clean and tally.requests >= 40 and tally.streamed and tally.left
    assert max(sample.waiting for sample in run.samples) > 0


@pytest.mark.slow
def test_fuzz_in_short(client: Client) -> None:
    asks = mixed_asks(6, MODEL)
    right = ask_alone(client.server.address, asks)
    run = fuzz(client.server, asks, right, 200, clients=1)
    assert find_fuzz_problems(run) == [], client.server.log_tail()
    assert run.statuses[400] > 50 and run.statuses[200] > 5 and run.good.requests > 0


@pytest.mark.parametrize(
    "constraints",
    [
        {"allowed_token_ids": [1]},  # the mask token
        {"allowed_token_ids": [0], "min_tokens": 2},  # the end token
        {"allowed_token_ids": [0], "vllm_xargs": {"elastic_canvas": [1, 1, 5, 1]}},
        {"stop_token_ids": list(range(334)), "min_tokens": 1},
    ],
    ids=lambda constraints: ", ".join(constraints),
)
def test_constraints_that_leave_no_token(alive: Client, constraints: dict[str, Any]) -> None:
    message = refusal(alive.post("completions", prompt="2 1", max_tokens=4, **constraints))
    assert "no token is left" in message


@pytest.mark.parametrize(
    "value",
    [
        {"top_k": 2**70},
        {"stream_interval": 2**70},
        {"stop": ["\ud800"]},
        {"bad_words": ["\ud800"]},
        {"request_id": "\ud800"},
        {"vllm_xargs": {"other": "\ud800"}},
    ],
    ids=lambda value: next(iter(value)),
)
def test_values_that_cannot_be_sent_to_the_engine(alive: Client, value: dict[str, Any]) -> None:
    """Stock vLLM: 500."""
    # vLLM itself drops top_k at temperature 0.
    body = {"prompt": "2 1", "max_tokens": 4, "temperature": 1.0, **value}
    message = refusal(alive.post("completions", **body))
    assert "cannot be sent to the engine" in message
