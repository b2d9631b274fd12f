# SPDX-License-Identifier: Apache-2.0
"""Answers over HTTP: streamed, unstreamed, and from the `LLM` API, token for token."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server_metrics import read_metrics

from .conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, ROOT, Client, questions, user

CANVAS = 40
KNOBS: list[dict[str, Any]] = [
    {},
    {"elastic_policy": "none"},
    {"elastic_policy": "dual-cache", "elastic_block_length": 8},
    {"elastic_gamma": 1.1, "elastic_window": 5},
    {"elastic_statistic": "paper", "elastic_tokens_per_step": 2},
]


def joined(events: list[dict[str, Any]]) -> tuple[str, list[int], str]:
    """Text, token ids and finish reason of a streamed answer."""
    choices = [event["choices"][0] for event in events if event["choices"]]
    text = "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)
    token_ids = [token for c in choices for token in c.get("token_ids") or []]
    (reason,) = [c["finish_reason"] for c in choices if c["finish_reason"]]
    return text, token_ids, reason


@pytest.mark.parametrize("knobs", KNOBS, ids=json.dumps)
def test_streamed_chat_equals_unstreamed(client: Client, knobs: dict[str, Any]) -> None:
    for question in questions(2):
        body = {"messages": user(question), "max_tokens": CANVAS, "return_token_ids": True}
        body |= {"vllm_xargs": knobs} if knobs else {}
        events = client.stream("chat/completions", **body)
        status, whole = client.post("chat/completions", **body)
        (choice,) = whole["choices"]
        assert status == 200
        expected = (choice["message"]["content"], choice["token_ids"], choice["finish_reason"])
        assert joined(events) == expected


@pytest.mark.parametrize("window", [1, 12])
def test_streamed_completion_equals_unstreamed(client: Client, window: int) -> None:
    for question in questions(3):
        body = {"prompt": question, "max_tokens": 24, "return_token_ids": True}
        # An answer that fills the canvas; with a window of 1 token by token from the left.
        body |= {"ignore_eos": True, "vllm_xargs": {"elastic_window": window}}
        events = client.stream("completions", **body)
        status, whole = client.post("completions", **body)
        (choice,) = whole["choices"]
        assert status == 200
        assert joined(events) == (choice["text"], choice["token_ids"], "length")
        assert len(choice["token_ids"]) == 24
        # A front end that is held up sends several tokens at once; never all of them.
        assert len(events) > (2 if window == 1 else 0), "not streamed"


def test_server_and_llm_give_the_same_tokens(client: Client) -> None:
    """All requests at once over HTTP, so that they share batches; one batch in `LLM`."""
    from vllm import LLM, SamplingParams

    cases = [(question, KNOBS[i % len(KNOBS)]) for i, question in enumerate(questions(10))]

    def ask(case: tuple[str, dict[str, Any]]) -> list[int]:
        question, knobs = case
        options = {"vllm_xargs": knobs} if knobs else {}
        status, answer = client.chat(question, max_tokens=CANVAS, return_token_ids=True, **options)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(cases)) as pool:
        over_http = list(pool.map(ask, cases))
    llm = LLM(
        model=str(MODEL),
        dtype="float32",
        max_model_len=MODEL_LENGTH,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        additional_config={"elastic": {"policy": "elastic", "gamma": 0.8, "window": 12}},
    )
    params = [
        SamplingParams(temperature=0.0, max_tokens=CANVAS, extra_args=knobs or None)
        for _, knobs in cases
    ]
    outputs = llm.chat([user(question) for question, _ in cases], params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == over_http


FEW_STEPS = {"elastic_tokens_per_step": 16}
"""A long canvas that takes no half a minute."""


def test_canvas_longer_than_the_default(client: Client) -> None:
    """The default of 256 is no cap."""
    options = {"max_tokens": 300, "ignore_eos": True, "vllm_xargs": FEW_STEPS}
    _, answer = client.chat("Sort : 2 1", **options)
    assert answer["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": user("Sort : 2 1")}),
        ("completions", {"prompt": "Sort : 2 1"}),
        ("completions", {"prompt": "Sort : 2 1", "max_tokens": None}),
    ],
)
def test_default_canvas_is_256(client: Client, path: str, body: dict[str, Any]) -> None:
    status, answer = client.post(path, **body, ignore_eos=True, vllm_xargs=FEW_STEPS)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 256)


def test_example_stream(client: Client) -> None:
    question = questions(4)[3]
    command = [sys.executable, str(ROOT / "examples" / "stream.py"), f"{client.server.url}/v1"]
    done = subprocess.run(
        [*command, "--prompt", question], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    options = {"max_tokens": 256, "vllm_xargs": {"elastic_preset": "block"}}
    _, answer = client.chat(question, **options)
    assert done.stdout == (answer["choices"][0]["message"]["content"] or "") + "\n"


def test_example_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["offline.py", "--model", str(MODEL)])
    runpy.run_path(str(ROOT / "examples" / "offline.py"), run_name="__main__")
    assert capsys.readouterr().out.count("\n-> ") == 3


def test_usage_counts_the_answer_alone(client: Client) -> None:
    """Neither the end token nor what is masked behind it; streamed and not."""
    for question in questions(4):
        body = {"messages": user(question), "max_tokens": 200, "return_token_ids": True}
        _, answer = client.post("chat/completions", **body)
        (choice,) = answer["choices"]
        if choice["finish_reason"] != "stop":
            continue
        words = len(choice["message"]["content"].split())  # a token is a word here
        prompt = len(answer["prompt_token_ids"])
        usage = {"prompt_tokens": prompt, "completion_tokens": words}
        assert {key: answer["usage"][key] for key in usage} == usage
        options = {"stream_options": {"include_usage": True}}
        *_, last = client.stream("chat/completions", **body, **options)
        assert {key: last["usage"][key] for key in usage} == usage
        return
    raise AssertionError("no answer ended")


def test_elastic_metrics(client: Client) -> None:
    """Counters grow by what a request cost."""
    counters = ("denoising_steps", "row_layers", "full_row_layers", "requests", "passes")
    client.chat("Sort : 2 1", max_tokens=8)  # counters are there from the first request on

    def read() -> dict[str, float]:
        metrics = read_metrics(client.server)
        return {n: metrics.total(f"vllm:elastic_{n}_total", policy="none") for n in counters}

    before = read()
    knobs = {"elastic_policy": "none", "elastic_steps": 6, "elastic_block_length": 6}
    status, answer = client.chat("Sort : 2 1", max_tokens=12, ignore_eos=True, vllm_xargs=knobs)
    assert status == 200, answer
    canvas = answer["usage"]["prompt_tokens"] + 12
    layers = json.loads((MODEL / "config.json").read_text())["n_layers"]
    grown = {name: value - before[name] for name, value in read().items()}
    work = canvas * layers * 6
    assert grown == dict(zip(counters, (6, work, work, 1, 6), strict=True))


def test_an_answer_follows_a_grammar(client: Client) -> None:
    """Streamed or not; what the model would say of its own accord is something else."""
    question = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
    for wanted, right in [
        ({"choice": ["cow", "fig", "elf"]}, "fig"),
        ({"regex": "jet[0-9]+pin[0-9]+"}, "jet 40 pin 62"),
    ]:
        body = {"messages": user(question), "max_tokens": 20, "structured_outputs": wanted}
        body["return_token_ids"] = True
        text, token_ids, reason = joined(client.stream("chat/completions", **body))
        status, whole = client.post("chat/completions", **body)
        (choice,) = whole["choices"]
        assert status == 200
        assert (choice["message"]["content"], choice["token_ids"]) == (text, token_ids)
        assert (text.strip(), reason) == (right, "stop")
