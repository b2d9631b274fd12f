# SPDX-License-Identifier: Apache-2.0
"""A refusal names what the client sent, not what vLLM made of it; an echo alone asks for nothing.

Conversion to ``SamplingParams`` notes which of the client's fields stand behind a parameter, and
which knobs it dropped, whatever the model; only admission to an engine that is ours reads the note.

See patches/sent_parameters: vLLM turns ``echo``, ``tool_choice`` and formats into other parameters,
and passes over fields that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from vllm_elastic.config import REQUEST_PREFIX
from vllm_elastic.patches.wrapping import wrap_once

_SENT = "_vllm_elastic_sent"
_MISPLACED = "_vllm_elastic_misplaced"
_PYTHONS = ("extra_body", "extra_args")
"""What has knobs in Python (openai's package, ``SamplingParams``); vLLM knows no such fields."""


def note_what_was_sent() -> None:
    """Wrap the conversions of requests over HTTP, once."""
    for request_class in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap_once(request_class, "to_sampling_params", _noted)


def sent_as(params: Any) -> dict[str, str]:
    """What the client sent, by the vLLM parameter that it became; others have their own name."""
    sent: dict[str, str] = getattr(params, _SENT, {})
    return sent


def misplaced_knobs(params: Any) -> dict[str, str]:
    """Where the client sent knobs that belong in ``vllm_xargs``, by their names."""
    misplaced: dict[str, str] = getattr(params, _MISPLACED, {})
    return misplaced


def forget_echo(params: Any) -> None:
    """Drop the prompt's 0 log probabilities that vLLM makes of a chat's ``echo`` alone."""
    if sent_as(params).get("prompt_logprobs") == "echo" and params.prompt_logprobs == 0:
        params.prompt_logprobs = None


def _noted(to_sampling_params: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        params = to_sampling_params(request, *args, **kwargs)
    except VLLMValidationError as error:
        raise _with_remedy(error, request) from None
    setattr(params, _SENT, _sent(request))
    setattr(params, _MISPLACED, _misplaced(getattr(request, "model_extra", None) or {}))
    return params


def _with_remedy(error: VLLMValidationError, request: Any) -> VLLMValidationError:
    """vLLM's refusal of several greedy answers, to a client that named no temperature at all."""
    several = (getattr(request, "n", None) or 1) > 1
    if not several or request.temperature is not None or "greedy" not in str(error):
        return error
    return VLLMValidationError(
        f"n={request.n}: several answers need a temperature above 0, and this server's is 0 where "
        "a request names none; send a temperature, or n=1.",
        parameter="n",
    )


def _misplaced(unknown: Mapping[str, Any]) -> dict[str, str]:
    """The misplaced knobs among the fields of a body that vLLM does not know."""
    found = dict.fromkeys(_knobs(unknown), "beside vllm_xargs")
    for field in _PYTHONS:
        within = unknown.get(field)
        if isinstance(within, dict):
            found |= dict.fromkeys(_knobs(within), f"in {field}")
            found |= dict.fromkeys(_knobs(within.get("vllm_xargs")), f"in {field}")
    return found


def _knobs(value: Any) -> list[str]:
    return [k for k in value if k.startswith(REQUEST_PREFIX)] if isinstance(value, dict) else []


def _sent(request: Any) -> dict[str, str]:
    sent = {}
    if getattr(request, "echo", False) and request.prompt_logprobs is None:
        wanted = getattr(request, "logprobs", None)
        with_logprobs = wanted is not None and wanted is not False
        sent["prompt_logprobs"] = "echo with logprobs" if with_logprobs else "echo"
    text = getattr(request, "text", None)
    if getattr(request, "tool_choice", None) not in (None, "none", "auto"):
        sent["structured_outputs"] = "tool_choice"
    elif _binds(getattr(request, "response_format", None)):
        sent["structured_outputs"] = "response_format"
    elif _binds(getattr(text, "format", None)):
        sent["structured_outputs"] = "text.format"
    return sent


def _binds(answer_format: Any) -> bool:
    return answer_format is not None and getattr(answer_format, "type", None) != "text"
