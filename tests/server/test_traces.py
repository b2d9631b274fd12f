# SPDX-License-Identifier: Apache-2.0
"""Spans of a real server at a real receiver: what denoising took, as /metrics has it."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.server.conftest import Client, questions, user
from tests.server_metrics import ServerMetrics, read_metrics
from tests.trace_receiver import TraceReceiver, attributes

CANVAS = 64
OURS = "vllm.elastic."
COUNTED = ("denoising_steps", "row_layers", "full_row_layers")
KINDS = ("first", "full", "window", "refresh", "replay")


def counted(metrics: ServerMetrics, name: str, **labels: str) -> float:
    """One of our counters; they are made when the first request ends."""
    name = f"vllm:elastic_{name}_total"
    return metrics.total(name, **labels) if name in metrics else 0.0


@pytest.mark.parametrize("policy", ["none", "elastic", "elastic-block"])
def test_span_of_a_request(policy: str, client: Client, traces: TraceReceiver) -> None:
    """Every count is what /metrics has grown by."""
    before = read_metrics(client.server)
    knobs = {"elastic_policy": policy}
    status, answer = client.chat(questions(1)[0], max_tokens=CANVAS, vllm_xargs=knobs)
    assert status == 200 and answer["kv_transfer_params"] is None
    (span,) = traces.of(answer["id"])
    after, said = read_metrics(client.server), attributes(span)
    usage = answer["usage"]
    assert said["gen_ai.request.id"] == answer["id"]
    assert said["gen_ai.usage.completion_tokens"] == usage["completion_tokens"]
    assert said[OURS + "policy"] == policy
    assert said[OURS + "canvas"] == usage["prompt_tokens"] + CANVAS
    for name in COUNTED:
        assert said[OURS + name] == counted(after, name) - counted(before, name) > 0
    passes = {
        kind: counted(after, "passes", kind=kind) - counted(before, "passes", kind=kind)
        for kind in KINDS
    }
    assert {kind: said.get(f"{OURS}passes.{kind}", 0) for kind in KINDS} == passes
    assert said[OURS + "passes"] == sum(passes.values())
    assert usage["completion_tokens"] <= said[OURS + "committed_tokens"] <= CANVAS
    assert 0 < said[OURS + "first_commit_seconds"] < said["gen_ai.latency.e2e"]


def test_span_is_a_child_of_the_clients(client: Client, traces: TraceReceiver) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    body = {"messages": user(questions(1)[0]), "max_tokens": CANVAS}
    request = urllib.request.Request(
        f"{client.server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200
        (span,) = traces.of(json.load(answer)["id"])
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, "b7ad6b7169203331")
    assert attributes(span)[OURS + "denoising_steps"] > 0


@pytest.mark.slow
def test_copies_have_spans_of_their_own(client: Client, traces: TraceReceiver) -> None:
    options = {"n": 2, "temperature": 0.7, "seed": 3, "vllm_xargs": {"elastic_tokens_per_step": 1}}
    _, answer = client.chat(questions(1)[0], max_tokens=CANVAS, **options)
    said = [attributes(span) for span in traces.of(answer["id"], count=2)]
    assert len(said) == 2
    for each in said:  # one token a step
        assert each[OURS + "denoising_steps"] == each[OURS + "committed_tokens"]
        assert each[OURS + "committed_tokens"] >= each["gen_ai.usage.completion_tokens"]


def test_an_answer_that_a_stop_string_ends(client: Client, traces: TraceReceiver) -> None:
    """The engine ends it only later; the span is made at once, of what it took to get there."""
    question = questions(1)[0]
    options = {"max_tokens": CANVAS, "vllm_xargs": {"elastic_tokens_per_step": 1}}
    _, whole = client.chat(question, **options)
    words = whole["choices"][0]["message"]["content"].split()
    _, stopped = client.chat(question, stop=[words[len(words) // 2]], **options)
    assert stopped["choices"][0]["stop_reason"] == words[len(words) // 2]
    (first,), (second,) = (traces.of(answer["id"]) for answer in (whole, stopped))
    steps = [attributes(span)[OURS + "denoising_steps"] for span in (first, second)]
    assert 0 < steps[1] < steps[0]


def test_a_streamed_and_watched_answer(client: Client, traces: TraceReceiver) -> None:
    """Three reports share a field of vLLM's outputs."""
    body = {"messages": user(questions(1)[0]), "max_tokens": CANVAS}
    chunks = client.stream("chat/completions", **body, vllm_xargs={"elastic_watch": 1})
    passes = [chunk["elastic"] for chunk in chunks if "elastic" in chunk]
    (span,) = traces.of(chunks[0]["id"])
    said = attributes(span)
    assert said[OURS + "passes"] == len(passes)
    assert said[OURS + "committed_tokens"] == sum(len(made["committed"]) for made in passes)
