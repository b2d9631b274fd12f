# SPDX-License-Identifier: Apache-2.0
"""Bad requests are a 400 that says what is wrong; the server lives on. Bad flags end the start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.engine.sampling_rules import RULES

from .conftest import MODEL, MODEL_LENGTH, Client, user

MESSAGES = user("Sort : 2 1")

# What a client sends to ask for each parameter that is refused.
ASKED: dict[str, dict[str, Any]] = {
    "presence_penalty": {"presence_penalty": 0.1},
    "frequency_penalty": {"frequency_penalty": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}},
    "thinking_token_budget": {"thinking_token_budget": 3},
}


def refusal(answer: tuple[int, dict[str, Any]]) -> str:
    status, body = answer
    assert status == 400, body
    return str(body["error"]["message"])


@pytest.mark.parametrize("name", ASKED)
def test_restricted_parameter(alive: Client, name: str) -> None:
    assert RULES[name].status == "refused"
    message = refusal(alive.chat("Sort : 2 1", max_tokens=4, **ASKED[name]))
    (sent,) = ASKED[name]
    assert message.startswith(f"{sent} ")
    assert len(message) < 250, "an object was dumped into the message"


def test_tool_choice_without_a_parser(alive: Client) -> None:
    """As in stock vLLM."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    options = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    assert "--tool-call-parser" in refusal(alive.chat("Sort : 2 1", max_tokens=4, **options))


def test_json_of_a_model_without_quotation_marks(alive: Client) -> None:
    """The first thing that one tries with the test model."""
    message = refusal(alive.chat("2", max_tokens=4, response_format={"type": "json_object"}))
    assert message.startswith("response_format: no token of this model has a quotation mark")


def test_a_grammar_that_is_none(alive: Client) -> None:
    assert "regex" in refusal(alive.chat("2", max_tokens=4, structured_outputs={"regex": "("}))


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"min_tokens": 10}, "min_tokens"),
        ({"vllm_xargs": {"elastic_logits_eos_inf": 1}}, "'elastic_logits_eos_inf': 0"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_a_grammar_that_could_not_end(alive: Client, beside: dict[str, Any], named: str) -> None:
    body = {"structured_outputs": {"choice": ["fig", "elf"]}, "max_tokens": 20, **beside}
    message = refusal(alive.chat("Read fig", **body))
    assert message.startswith("structured_outputs: the grammar says where") and named in message


def test_likelihoods_are_named(alive: Client) -> None:
    """What evaluation harnesses ask for multiple choice."""
    body = {"prompt": "2", "echo": True, "logprobs": 1, "max_tokens": 1}
    message = refusal(alive.post("completions", **body))
    assert message.startswith("echo with logprobs is not supported")
    assert "multiple choice) cannot run" in message


def test_echo_of_a_chat(alive: Client) -> None:
    answers = [alive.chat("Sort : 2 1", max_tokens=8, echo=echo) for echo in (True, False)]
    assert [status for status, _ in answers] == [200, 200], answers
    echoed, plain = (answer["choices"][0]["message"]["content"] for _, answer in answers)
    assert echoed == plain, "vLLM echoes a last message of the answer's own role only"


def test_bad_word_of_several_tokens(alive: Client) -> None:
    message = refusal(alive.chat("Sort : 2 1", max_tokens=4, bad_words=["ant bee"]))
    assert "bad_words" in message


def test_mask_in_the_prompt(alive: Client) -> None:
    assert "mask token" in refusal(alive.chat("Sort : <|mdm_mask|> 1", max_tokens=4))


def test_several_answers_need_a_temperature(alive: Client) -> None:
    assert "send a temperature" in refusal(alive.chat("Sort : 2 1", max_tokens=4, n=2))
    message = refusal(alive.chat("Sort : 2 1", max_tokens=4, n=2, temperature=0))
    assert "n must be 1" in message


def test_a_knob_in_the_wrong_place(alive: Client) -> None:
    message = refusal(alive.chat("Sort : 2 1", max_tokens=4, elastic_window=4))
    assert message.startswith("elastic_window stands beside vllm_xargs")


def test_beam_search(alive: Client) -> None:
    message = refusal(alive.chat("Sort : 2 1", max_tokens=4, use_beam_search=True, n=2))
    assert "use_beam_search is not supported" in message
    status, answer = alive.post("completions", prompt="Sort : 2 1", use_beam_search=True)
    assert status == 400, answer


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"elastic_gama": 0.9}, ["'elastic_gama'", "Did you mean 'elastic_gamma'?"]),
        ({"elastic_record": 1}, ["'elastic_record'", "of the engine only", "--elastic-config"]),
        ({"elastic_gamma": 3}, ["'elastic_gamma'", "0 to 2", "got 3"]),
        ({"elastic_gamma": "high"}, ["'elastic_gamma'", "0 to 2", "'high'"]),
        ({"elastic_threshold": -0.1}, ["'elastic_threshold'", "0 to 1", "-0.1"]),
        ({"elastic_window": 0}, ["'elastic_window'", "integer from 1", "got 0"]),
        ({"elastic_window": 1.5}, ["'elastic_window'", "integer from 1", "got 1.5"]),
        ({"elastic_window": 2000}, ["'elastic_window' is 2000", "'max_window' 1024", "raise max"]),
        ({"elastic_preset": "fast"}, ["'elastic_preset'", "'published'", "'fast'"]),
        ({"elastic_policy": "fast"}, ["'elastic_policy'", "'dual-cache'", "'fast'"]),
        ({"elastic_statistic": [1]}, ["'elastic_statistic'", "'paper'"]),
    ],
    ids=str,
)
def test_bad_knob(alive: Client, knobs: dict[str, Any], parts: list[str]) -> None:
    for path, body in (
        ("chat/completions", {"messages": MESSAGES}),
        ("completions", {"prompt": "2"}),
    ):
        message = refusal(alive.post(path, **body, max_tokens=4, vllm_xargs=knobs))
        assert [part for part in parts if part not in message] == [], message


def test_foreign_xargs_are_not_ours(alive: Client) -> None:
    status, _ = alive.chat("Sort : 2 1", max_tokens=4, vllm_xargs={"other": 1})
    assert status == 200


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_canvas_beyond_the_model(alive: Client, path: str) -> None:
    """Stock vLLM would quietly serve a shorter canvas."""
    body, name = {
        "chat/completions": ({"messages": MESSAGES}, "max_tokens"),
        "completions": ({"prompt": [5] * 9}, "max_tokens"),
        "responses": ({"input": "Sort : 2 1"}, "max_output_tokens"),
    }[path]
    message = refusal(alive.post(path, **body, **{name: MODEL_LENGTH - 3}))
    assert f"max_tokens={MODEL_LENGTH - 3}" in message
    assert f"maximum length is {MODEL_LENGTH}" in message


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_default_canvas_beyond_the_model(alive: Client, path: str) -> None:
    prompt = "3 " * (MODEL_LENGTH - 200)
    body = {"messages": user(prompt)} if "chat" in path else {"prompt": prompt}
    message = refusal(alive.post(path, **body))
    assert "max_tokens=256" in message
    assert f"maximum length is {MODEL_LENGTH}" in message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ("{'gamma': 1}", ["--elastic-config"]),
        ("[1]", ["--elastic-config", "JSON object"]),
        ('{"gama": 0.9}', ["'gama'", "Did you mean 'gamma'?"]),
        ('{"window": 0}', ["'window'", "integer from 1"]),
    ],
)
def test_bad_elastic_config_ends_the_start(
    values: str,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM's own main, in this process: its imports alone take ten seconds."""
    from vllm.entrypoints.cli.main import main

    command = ["vllm", "serve", str(MODEL), "--plugin", "elastic", "--elastic-config", values]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # main sets it for good
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.slow
def test_server_that_cannot_start(tmp_path: Path) -> None:
    """A real process, once: it ends, and its log says why."""
    server = ServerProcess(
        MODEL, ["--elastic-config", '{"gama": 0.9}'], log=tmp_path / "server.log"
    )
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 2.*'gama'.*'gamma'"), server:
        pass
    assert not server.is_running()
