# SPDX-License-Identifier: Apache-2.0
"""What `soak` and `fuzz` count: they must notice what they look for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.reliability.exchange import Answer, Ask, Choice
from tests.reliability.fuzz import FuzzRun
from tests.reliability.fuzz import find_problems as find_fuzz_problems
from tests.reliability.server_state import ServerState
from tests.reliability.soak import SoakRun, find_problems, table
from tests.reliability.traffic import Tally, mixed_asks
from vllm_elastic.decoding.policies import POLICIES

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
ASK = Ask("/v1/completions", {"prompt": "2"})
IDLE = ServerState({"API server": 600.0, "worker": 700.0}, {"worker": 9}, 0, 0, 0, 58)


def answer(token_ids: list[int], *, left: bool = False, reason: str = "length") -> Answer:
    text = "".join(f" {token}" for token in token_ids)
    return Answer(200, {0: Choice(text, list(token_ids), None if left else reason)}, left=left)


RIGHT = answer([5, 6, 7, 8])


@pytest.mark.parametrize(
    ("got", "lost", "added", "wrong"),
    [
        (RIGHT, 0, 0, 0),
        (answer([5, 6, 7]), 1, 0, 1),
        (answer([5, 6, 6, 7, 8]), 0, 1, 1),
        (answer([5, 6, 9, 8]), 1, 1, 1),
        (answer([]), 4, 0, 1),
        (Answer(200), 4, 0, 1),
        (answer([5, 6, 7, 8], reason="stop"), 0, 0, 1),
        (answer([5, 6], left=True), 0, 0, 0),
        (answer([], left=True), 0, 0, 0),
        (answer([6, 7], left=True), 1, 1, 1),
        (answer([5, 6, 7, 8, 8], left=True), 0, 1, 1),
    ],
)
def test_lost_and_added_tokens(got: Answer, lost: int, added: int, wrong: int) -> None:
    tally = Tally()
    tally.count(ASK, got, RIGHT)
    assert (tally.lost, tally.added, tally.wrong, tally.failures) == (lost, added, wrong, 0)
    assert tally.is_clean == (not wrong) and len(tally.examples) == wrong


@pytest.mark.parametrize("status", [0, 400, 500])
def test_failed_request(status: int) -> None:
    tally = Tally()
    tally.count(ASK, Answer(status, error="why"), RIGHT)
    assert tally.failures == 1 and not tally.is_clean and "why" in tally.examples[0]


def test_answer_from_events() -> None:
    got = Answer(200)
    for event in (
        {"choices": [{"index": 1, "text": " a", "token_ids": [3], "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 1, "text": " b", "token_ids": [4], "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ):
        got.add(event)
    assert got.choices[1] == Choice(" a b", [3, 4], "stop")
    assert got.status == 200 and not got.error
    got.add({"error": {"message": "", "code": 500}})  # inside a stream that began with 200
    assert got.status == 500


def test_soak_notices_what_is_left() -> None:
    run = SoakRun(60.0, IDLE, IDLE, [], Tally())
    assert find_problems(run, 0.0) == []
    left = replace(run, end=replace(IDLE, blocks_in_use=2))
    assert find_problems(left) == ["left in the server: 0 running, 0 waiting, 2 KV blocks in use"]
    grown = replace(run, end=replace(IDLE, memory={"API server": 600.0, "worker": 740.0}))
    assert find_problems(grown) == []
    assert find_problems(grown, 32.0) == ["worker: memory grew by 40 MiB"]
    assert "| KV blocks in use at the end | 2 of 58 |" in table(left)


def test_fuzz_notices_5xx_and_silence() -> None:
    run = FuzzRun(IDLE, end=IDLE, is_up=True)
    for status in (200, 400, 404, 422, 501):
        run.count(ASK, Answer(status, error="The model does not support it"))
    assert find_fuzz_problems(run) == [] and sum(run.stock.values()) == 1
    run.count(ASK, Answer(500, error="EngineDeadError"))
    run.count(Ask("/v1/completions", b"\xff"), Answer(0, error="no answer in time"))
    assert len(find_fuzz_problems(run)) == 2
    run.is_up = False
    assert "the server ended" in find_fuzz_problems(run)


def test_fuzz_tells_grammars_that_go_nowhere_from_those_that_cannot_end() -> None:
    """Of stock vLLM is what the model cannot write; what forbids its end is ours to refuse."""
    answer = Answer(500, error="Internal server error")
    for beside, known in (
        ({}, True),
        ({"min_tokens": 0, "vllm_xargs": {"elastic_window": 3}, "bad_words": ["2"]}, True),
        ({"allowed_token_ids": [0, 5]}, True),
        ({"allowed_token_ids": [5]}, False),
        ({"min_tokens": 1}, False),
        ({"vllm_xargs": {"elastic_logits_eos_inf": 1}}, False),
    ):
        run = FuzzRun(IDLE, end=IDLE, is_up=True)
        body = {"prompt": "2", "structured_outputs": {"choice": ["a"]}, **beside}
        run.count(Ask("/v1/completions", body), answer)
        assert (find_fuzz_problems(run) == []) == known, beside


def test_mixed_asks_are_reproducible_and_mixed() -> None:
    asks = mixed_asks(200, MODEL)
    assert asks == mixed_asks(200, MODEL) and asks != mixed_asks(200, MODEL, seed=1)
    assert {ask.path for ask in asks} == {"/v1/completions", "/v1/chat/completions"}
    knobs = [ask.body.get("vllm_xargs", {}) for ask in asks]
    assert {k.get("elastic_policy") for k in knobs} == {None, *POLICIES}
    assert {"elastic_canvas", "elastic_steps", "elastic_gamma"} <= {n for k in knobs for n in k}
    assert all("seed" in ask.body for ask in asks)
