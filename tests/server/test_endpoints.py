# SPDX-License-Identifier: Apache-2.0
"""The endpoints beside the completions: tokenizer, models, health, metrics."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from tests.server_metrics import CACHE_USAGE, RUNNING, WAITING, read_metrics

from .conftest import MODEL_LENGTH, Client, questions, user
from .metrics import is_idle, wait_for


def call(client: Client, path: str, **body: Any) -> Any:
    """GET, or POST where there is a body; the answer's JSON, None where it is empty."""
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{client.server.url}/{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        content = answer.read()
    return json.loads(content) if content else None


def test_tokenize_and_back(client: Client) -> None:
    (text,) = questions(1)
    found = call(client, "tokenize", model="tiny", prompt=text)
    assert found["count"] == len(found["tokens"]) > 0
    assert found["max_model_len"] == MODEL_LENGTH
    assert call(client, "detokenize", model="tiny", tokens=found["tokens"]) == {"prompt": text}


def test_tokenized_chat_is_the_prompt(client: Client) -> None:
    """The chat template's tokens are those that the model gets; the answer's make its text."""
    (question,) = questions(1)
    found = call(client, "tokenize", model="tiny", messages=user(question))
    _, answer = client.chat(question, max_tokens=24, return_token_ids=True)
    assert answer["usage"]["prompt_tokens"] == found["count"]
    assert answer["prompt_token_ids"] == found["tokens"]
    (choice,) = answer["choices"]
    text = call(client, "detokenize", model="tiny", tokens=choice["token_ids"])["prompt"]
    # An answer leaves out the first word's space, and the end token, which has a text too.
    assert text.strip().startswith(choice["message"]["content"].strip())


def test_health_and_models(client: Client) -> None:
    assert call(client, "health") is None
    (model,) = call(client, "v1/models")["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", MODEL_LENGTH)


def test_metrics_count_requests_and_tokens(client: Client) -> None:
    wait_for(client.server, is_idle)
    before = read_metrics(client.server)
    _, answer = client.chat("Sort : 2 1", max_tokens=20, ignore_eos=True)
    wait_for(client.server, is_idle)
    after = read_metrics(client.server)
    counted = {
        "vllm:prompt_tokens_total": answer["usage"]["prompt_tokens"],
        "vllm:generation_tokens_total": 20,
        "vllm:request_success_total": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:time_to_first_token_seconds_count": 1,
    }
    assert {name: after[name] - before[name] for name in counted} == counted
    assert {RUNNING, WAITING, CACHE_USAGE} <= set(after)


def test_metrics_count_what_a_stop_string_leaves(client: Client) -> None:
    """Not the rest of the tokens that were shown with it."""
    question = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
    knobs = {"elastic_policy": "none", "elastic_steps": 2, "elastic_block_length": 32}
    wait_for(client.server, is_idle)
    before = read_metrics(client.server)
    body = {"max_tokens": 32, "stop": ["91"], "vllm_xargs": knobs}
    _, answer = client.chat(question, **body, return_token_ids=True)
    wait_for(client.server, is_idle)
    after = read_metrics(client.server)
    (choice,) = answer["choices"]
    assert choice["stop_reason"] == "91" and len(choice["token_ids"]) == 2
    assert answer["usage"]["completion_tokens"] == 2
    for name in ("vllm:generation_tokens_total", "vllm:request_generation_tokens_sum"):
        assert after[name] - before[name] == 2, name


def test_metrics_count_answers_that_stop_strings_end(client: Client) -> None:
    """vLLM's front end cuts these answers and tells the engine; no other request ends meanwhile."""
    ended = "vllm:elastic_requests_total"
    client.chat("Sort : 2 1", max_tokens=4)  # there is no such metric before
    wait_for(client.server, lambda now: ended in now and is_idle(now))
    before = read_metrics(client.server).total(ended, policy="none")
    for question in questions(3):
        body = {"max_tokens": 40, "stop": [" "], "vllm_xargs": {"elastic_policy": "none"}}
        _, answer = client.chat(question, **body)
        (choice,) = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " ")
    wait_for(client.server, lambda now: now.total(ended, policy="none") == before + 3, 10.0)
