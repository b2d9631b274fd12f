# SPDX-License-Identifier: Apache-2.0
"""Over HTTP, ``max_tokens`` reaches admission as the client sent it: it is the canvas.

Conversion to ``SamplingParams`` notes what was asked for, whatever the model; only an engine that
is ours takes the note. Beam search, which would ask for canvases of one token, is refused.

See patches/max_tokens: vLLM's server lowers max_tokens to what fits, and to the default.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from vllm_elastic.engine.engine_config import is_served_by_us
from vllm_elastic.engine.request_defaults import max_tokens_ceiling
from vllm_elastic.patches.wrapping import wrap_once

_ASKED = "_vllm_elastic_max_tokens"
_LOWERED = "_vllm_elastic_lowered_max_tokens"


def take_max_tokens_literally() -> None:
    """Wrap what lies between a client's request and admission, once."""
    _note_max_tokens(CompletionRequest, "max_tokens")
    _note_max_tokens(ChatCompletionRequest, "max_completion_tokens", "max_tokens")
    _note_max_tokens(ResponsesRequest, "max_output_tokens")
    _refuse_beam_search(BeamSearchOnlineMixin, "engine_client")
    _refuse_beam_search(BeamSearchOfflineMixin, "llm_engine")
    wrap_once(OpenAIServingCompletion, "create_completion", _with_default_canvas)


def take_note(params: Any, vllm_config: VllmConfig) -> None:
    """Set the canvas that the client asked for, or the engine's default; over HTTP only.

    Raises:
        VLLMValidationError: ``min_tokens`` is more than it.
    """
    asked, lowered = getattr(params, _ASKED, None), getattr(params, _LOWERED, None)
    if not is_served_by_us(vllm_config):
        if lowered is not None:
            params.max_tokens = lowered
            params._verify_args()
    elif asked:  # 0 with echo: vLLM generates one token and drops it
        ceiling = max_tokens_ceiling(vllm_config)
        params.max_tokens = asked if ceiling is None else min(asked, ceiling)
        params._verify_args()


def _note_max_tokens(request_class: Any, *names: str) -> None:
    def noted(
        to_sampling_params: Callable[..., Any],
        self: Any,
        max_tokens: int,
        default_sampling_params: dict[str, Any] | None = None,
    ) -> Any:
        # vars: reading the deprecated one of two names as an attribute warns.
        sent = [value for name in names if (value := vars(self).get(name)) is not None]
        asked = sent[0] if sent else (default_sampling_params or {}).get("max_tokens")
        # vLLM holds min_tokens against what it has lowered; admission holds it against the canvas.
        enough = max(max_tokens, min(vars(self).get("min_tokens") or 0, asked or 0))
        params = to_sampling_params(self, enough, default_sampling_params)
        setattr(params, _ASKED, asked)
        if enough > max_tokens:
            setattr(params, _LOWERED, max_tokens)
        return params

    wrap_once(request_class, "to_sampling_params", noted)


async def _with_default_canvas(
    create_completion: Callable[..., Awaitable[Any]],
    self: OpenAIServingCompletion,
    request: CompletionRequest,
    raw_request: Any = None,
) -> Any:
    """vLLM fills in 16 where a completion has no max_tokens; only the body still tells."""
    if raw_request is not None and is_served_by_us(self.engine_client.vllm_config):
        body = await raw_request.json()  # read already, and kept
        if body.get("max_tokens") is None:
            request.max_tokens = self.default_sampling_params["max_tokens"]
    return await create_completion(self, request, raw_request)


def _refuse_beam_search(mixin: Any, engine: str) -> None:
    def refused_for_llada(
        beam_search: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if is_served_by_us(getattr(self, engine).vllm_config):
            raise VLLMValidationError(
                "use_beam_search is not supported by vllm_elastic: beams grow from left to right, "
                "one token at a time; leave it out, or use n with a temperature.",
                parameter="use_beam_search",
            )
        return beam_search(self, *args, **kwargs)

    wrap_once(mixin, "beam_search", refused_for_llada)
