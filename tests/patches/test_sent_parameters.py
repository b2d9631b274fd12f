# SPDX-License-Identifier: Apache-2.0
"""Refusals name what the client sent, and a chat's echo is served: patches/sent_parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
MESSAGES = [{"role": "user", "content": "2"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}


@pytest.fixture(scope="module")
def llada() -> Any:
    """What stands before an engine, without one."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    args = EngineArgs(model=str(MODEL), dtype="float32")
    return InputProcessor(args.create_engine_config())


def request_of(kind: str, **body: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    if kind == "chat":
        return ChatCompletionRequest(messages=MESSAGES, **body)
    return (CompletionRequest if kind == "completion" else ResponsesRequest)(
        **{"prompt" if kind == "completion" else "input": "2"}, **body
    )


def admitted(processor: Any, request: Any) -> Any:
    params = request.to_sampling_params(16, {"temperature": 0.0})
    prompt = {"type": "token", "prompt_token_ids": [9] * 4}
    return processor.process_inputs("0", prompt, params, ("generate",)).sampling_params


@pytest.mark.parametrize("options", [{}, {"top_logprobs": 0, "logprobs": True}], ids=str)
def test_echo_of_a_chat_is_served(llada: Any, options: dict[str, Any]) -> None:
    body = {"echo": True, "max_tokens": 4, **options}
    if options:  # asks for log probabilities of the prompt too
        with pytest.raises(Exception, match=r"^echo with logprobs is not supported"):
            admitted(llada, request_of("chat", **body))
    else:
        assert admitted(llada, request_of("chat", **body)).prompt_logprobs is None


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        ("completion", {"echo": True, "logprobs": 1}, "echo with logprobs"),
        ("completion", {"echo": True, "logprobs": 0}, "echo with logprobs"),
        ("chat", {"echo": True, "logprobs": True, "top_logprobs": 2}, "echo with logprobs"),
        ("chat", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("chat", {"prompt_logprobs": 1, "echo": True}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_error_names_what_was_sent(llada: Any, kind: str, body: Any, named: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as error:
        admitted(llada, request_of(kind, **body, **_length(kind)))
    message = str(error.value)
    assert message.startswith(f"{named} is not supported by vllm_elastic: ")
    assert error.value.parameter == named.split()[0]
    assert "multiple choice) cannot run" in message


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("completion", {"response_format": {"type": "json_object"}}, "response_format"),
        ("responses", {"text": {"format": SCHEMA}}, "text.format"),
        (
            "chat",
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            "structured_outputs",
        ),
        ("chat", {"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_a_grammar_has_the_name_that_was_sent(llada: Any, kind: str, body: Any, named: str) -> None:
    """Where it is refused: beside knobs that it does not go together with."""
    from vllm.sampling_params import StructuredOutputsParams

    knobs = {"elastic_steps": 4, "elastic_block_length": 4}
    request = request_of(kind, **body, **_length(kind), vllm_xargs=knobs)
    if named == "tool_choice":  # vLLM's tool parser makes a grammar of it before the conversion
        request.structured_outputs = StructuredOutputsParams(json={"type": "array"})
    with pytest.raises(
        Exception, match=f"^{named} and 'elastic_steps' do not go together"
    ) as error:
        admitted(llada, request)
    assert error.value.parameter == named  # type: ignore[attr-defined]
    request.vllm_xargs = None
    if named == "structured_outputs":
        assert admitted(llada, request).structured_outputs.regex == "a"
    else:  # the test model has no quotation marks
        with pytest.raises(Exception, match=f"^{named}: no token .* cannot write JSON"):
            admitted(llada, request)


@pytest.mark.parametrize("kind", ["chat", "completion", "responses"])
def test_a_knob_beside_vllm_xargs_is_refused(llada: Any, kind: str) -> None:
    """It had no effect, and nobody was told."""
    request = request_of(kind, elastic_window=4, session="mine", **_length(kind))
    with pytest.raises(Exception, match=r'^elastic_window .*"vllm_xargs": .*"elastic_window"'):
        admitted(llada, request)
    assert admitted(llada, request_of(kind, session="mine", **_length(kind)))


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"extra_body": {"vllm_xargs": {"elastic_window": 4}}}, "extra_body"),
        ({"extra_body": {"elastic_window": 4}}, "extra_body"),
        ({"extra_args": {"elastic_window": 4}}, "extra_args"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["chat", "completion", "responses"])
def test_a_knob_where_python_has_it_is_refused(
    llada: Any, kind: str, body: dict[str, Any], place: str
) -> None:
    """Copied from Python into a body of JSON: no effect, and nobody was told."""
    with pytest.raises(Exception, match=f'^elastic_window stands in {place} .*"vllm_xargs": '):
        admitted(llada, request_of(kind, **body, **_length(kind)))


@pytest.mark.parametrize("value", [None, 3, "elastic_window", [4], {"vllm_xargs": 3}, {"a": 1}])
def test_what_holds_no_knob_is_not_ours(llada: Any, value: Any) -> None:
    """Stock vLLM passes over it."""
    assert admitted(llada, request_of("chat", extra_body=value, metadata={"elastic_ip": "1"}))


def test_the_refusal_of_a_knob_can_be_sent() -> None:
    """Any text is a name in JSON; a server that cannot encode its own answer says 500."""
    from vllm_elastic.patches.admission import check_place_of_knobs

    with pytest.raises(Exception, match=r"elastic_.ud800 stands beside") as error:
        check_place_of_knobs({"elastic_\ud800": "beside vllm_xargs"})
    assert str(error.value).encode()


def test_several_answers_without_a_temperature(llada: Any) -> None:
    """vLLM's message speaks of greedy sampling, which the client never asked for."""
    with pytest.raises(Exception, match=r"^n=2: .*send a temperature"):
        admitted(llada, request_of("chat", n=2))
    with pytest.raises(Exception, match="n must be 1 when using greedy sampling"):
        admitted(llada, request_of("chat", n=2, temperature=0.0))
    assert admitted(llada, request_of("chat", n=2, temperature=0.5, max_tokens=4)).n == 2


def test_patch_is_still_needed() -> None:
    echo = request_of("chat", echo=True).to_sampling_params(4, {})
    form = request_of("chat", response_format={"type": "json_object"}).to_sampling_params(4, {})
    unknown = request_of("chat", not_a_field=1)
    reasons = {
        "takes fields that it does not know": unknown.model_extra == {"not_a_field": 1},
        "turns a chat's echo into prompt_logprobs": echo.prompt_logprobs == 0,
        "turns response_format into structured_outputs": form.structured_outputs is not None,
    }
    gone = [reason for reason, holds in reasons.items() if not holds]
    assert not gone, (
        f"patch sent_parameters: a part can go, stock vLLM no longer {' nor '.join(gone)}. Adapt "
        "patches/sent_parameters, vllm_elastic/patches/sent_parameters.py and this test."
    )


def _length(kind: str) -> dict[str, int]:
    return {"max_output_tokens" if kind == "responses" else "max_tokens": 4}
