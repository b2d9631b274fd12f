# SPDX-License-Identifier: Apache-2.0
"""Over HTTP, ``max_tokens`` reaches admission as the client sent it: it is the canvas.

Beam search, which would ask for canvases of one token, is refused at the same place.

See patches/max_tokens: vLLM's server lowers it to what fits, and to the default.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError

_WRAPPED = "_vllm_elastic_wrapped"
_lengths: dict[str, int | None] = {"default": None, "cap": None}


def keep_requested_canvas(default: int, cap: int | None) -> None:
    """Make this process's server take ``max_tokens`` literally; called only for a LLaDA.

    Args:
        default: canvas, in positions, of a request that names none, on all endpoints.
        cap: the operator's ``--override-generation-config '{"max_new_tokens": N}'``, or None.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    _lengths.update(default=default, cap=cap)
    # vLLM fills in this value where a request has none: 16 otherwise.
    CompletionRequest.model_fields["max_tokens"].default = default
    _wrap(CompletionRequest, "max_tokens")
    _wrap(ChatCompletionRequest, "max_completion_tokens", "max_tokens")
    _wrap(ResponsesRequest, "max_output_tokens")
    for request_class in (ChatCompletionRequest, CompletionRequest):
        request_class.to_beam_search_params = _refuse_beam_search


def _refuse_beam_search(*_: Any, **__: Any) -> Any:
    raise VLLMValidationError(
        "use_beam_search is not supported for LLaDA: beams grow from left to right, one token at a "
        "time; leave it out, or use n with a temperature.",
        parameter="use_beam_search",
    )


def _wrap(request_class: Any, *names: str) -> None:
    to_sampling_params = request_class.to_sampling_params
    if hasattr(to_sampling_params, _WRAPPED):
        return

    @functools.wraps(to_sampling_params)
    def literal(self: Any, max_tokens: int, *args: Any, **kwargs: Any) -> Any:
        params = to_sampling_params(self, max_tokens, *args, **kwargs)
        # vars: reading the deprecated one of two names as an attribute warns.
        sent = [value for name in names if (value := vars(self).get(name)) is not None]
        wanted = sent[0] if sent else _lengths["default"]
        if wanted:  # 0 with echo: vLLM generates one token and drops it
            cap = _lengths["cap"]
            params.max_tokens = wanted if cap is None else min(wanted, cap)
        return params

    setattr(literal, _WRAPPED, True)
    request_class.to_sampling_params = literal
