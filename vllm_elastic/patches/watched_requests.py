# SPDX-License-Identifier: Apache-2.0
"""A streamed chat with ``elastic_watch`` has an event for every pass, between vLLM's chunks.

See patches/watched_requests: a stream shows the finished left end of an answer only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_elastic.config import REQUEST_PREFIX
from vllm_elastic.patches.wrapping import wrap_once

_WATCHER = "_vllm_elastic_watcher"

_watcher: ContextVar[asyncio.Queue[Any] | None] = ContextVar("who watches", default=None)
"""Queue of the stream that is being pulled; vLLM makes a stream's requests at its first pull."""


def show_passes_of_watched_requests() -> None:
    """Wrap the chat's stream, and the making of requests that it leads to, once.

    Clients choose their requests' ids, and two may choose the same: so a request keeps who watches
    it, and no id is asked for.
    """
    wrap_once(OpenAIServingChat, "chat_completion_stream_generator", _stream)
    wrap_once(OutputProcessor, "add_request", _add)


def _stream(
    stream_generator: Callable[..., AsyncIterator[str]],
    self: OpenAIServingChat,
    request: Any,
    result_generator: Any,
    request_id: str,
    model_name: str,
    conversation: Any,
    tokenizer: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[str]:
    chunks = stream_generator(
        self, request, result_generator, request_id, model_name, conversation, tokenizer,
        *args, **kwargs,
    )  # fmt: skip
    watched = (request.vllm_xargs or {}).get(f"{REQUEST_PREFIX}watch")
    # Other endpoints' servings inherit the chat's, and make events of their own of its chunks.
    if not watched or type(self) is not OpenAIServingChat:
        return chunks
    return _with_passes(chunks, request_id, model_name, tokenizer)


def _add(
    add_request: Callable[..., None],
    self: OutputProcessor,
    request: EngineCoreRequest,
    *args: Any,
    **kwargs: Any,
) -> None:
    add_request(self, request, *args, **kwargs)
    setattr(self.request_states[request.request_id], _WATCHER, _watcher.get())


def show_passes(state: RequestState, passes: list[dict[str, Any]], *_: Any) -> None:
    """Hand a request's passes to who watches; nobody, and they are dropped."""
    watcher: asyncio.Queue[Any] | None = getattr(state, _WATCHER, None)
    if watcher is not None:
        for made in passes:
            watcher.put_nowait({"index": state.request_index, **made})


async def _with_passes(
    chunks: AsyncIterator[str], request_id: str, model_name: str, tokenizer: Any
) -> AsyncIterator[str]:
    """vLLM's chunks and the passes, each as soon as it is there."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    created, words = int(time.time()), dict[int, str]()

    async def pump() -> None:
        _watcher.set(queue)  # in this task's own context
        try:
            async for chunk in chunks:
                queue.put_nowait(chunk)
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(pump())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, str):
                yield item
                continue
            new = {token_id for _, token_id, _ in item["canvas"]["predicted"]} - words.keys()
            words |= {token_id: tokenizer.decode([token_id]) for token_id in new}
            event = {
                "id": request_id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": model_name,
                "choices": [],
                "elastic": {**item, "words": {token_id: words[token_id] for token_id in new}},
            }
            yield f"data: {json.dumps(event)}\n\n"
        await task  # an error of the stream itself
    finally:
        task.cancel()
