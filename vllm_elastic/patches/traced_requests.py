# SPDX-License-Identifier: Apache-2.0
"""vLLM's span of a request also says what its denoising took: steps, passes, row-layers.

See patches/traced_requests: vLLM makes the span where no other scheduler's counts arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.v1.engine import EngineCoreOutput, output_processor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_elastic.engine.span import Attributes
from vllm_elastic.patches.wrapping import wrap_once

_SPAN = "_vllm_elastic_span"

_beside: ContextVar[Attributes | None] = ContextVar("attributes of this span", default=None)


def trace_denoising() -> None:
    """Wrap the front end's making of spans, once."""
    wrap_once(OutputProcessor, "do_tracing", _trace)
    wrap_once(output_processor, "instrument_manual", _with_attributes)


def _trace(
    do_tracing: Callable[..., None],
    self: OutputProcessor,
    output: EngineCoreOutput,
    state: RequestState,
    *args: Any,
) -> None:
    token = _beside.set(getattr(state, _SPAN, None))
    try:
        do_tracing(self, output, state, *args)
    finally:
        _beside.reset(token)


def _with_attributes(
    instrument_manual: Callable[..., Any],
    *args: Any,
    attributes: Attributes | None = None,
    **kwargs: Any,
) -> Any:
    both = {**(attributes or {}), **(_beside.get() or {})}
    return instrument_manual(*args, attributes=both, **kwargs)


def keep_attributes(state: RequestState, attributes: Attributes, *_: Any) -> None:
    """Keep the newest with the request; a stop string may end it before the engine knows."""
    setattr(state, _SPAN, attributes)
