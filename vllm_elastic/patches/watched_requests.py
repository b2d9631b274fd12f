# SPDX-License-Identifier: Apache-2.0
"""A streamed chat with ``elastic_watch`` has an event for every pass, between vLLM's chunks.

See patches/watched_requests: a stream shows the finished left end of an answer only.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.v1.engine.output_processor import RequestState

from vllm_elastic.config import REQUEST_PREFIX

_WRAPPED = "_vllm_elastic_watched"

_watchers: dict[str, asyncio.Queue[Any]] = {}
"""Streams that want passes, by the request's id; what arrives for others is dropped."""


def show_passes_of_watched_requests() -> None:
    """Wrap the chat's stream, once."""
    stream_generator = OpenAIServingChat.chat_completion_stream_generator
    if hasattr(stream_generator, _WRAPPED):
        return

    @functools.wraps(stream_generator)
    def stream(
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
        if not (request.vllm_xargs or {}).get(f"{REQUEST_PREFIX}watch"):
            return chunks
        return _with_passes(chunks, request_id, model_name, tokenizer)

    setattr(stream, _WRAPPED, True)
    OpenAIServingChat.chat_completion_stream_generator = stream


def show_passes(state: RequestState, passes: list[dict[str, Any]], *_: Any) -> None:
    """Hand a request's passes to who watches."""
    if state.external_req_id in _watchers:
        for made in passes:
            _watchers[state.external_req_id].put_nowait({"index": state.request_index, **made})


async def _with_passes(
    chunks: AsyncIterator[str], request_id: str, model_name: str, tokenizer: Any
) -> AsyncIterator[str]:
    """vLLM's chunks and the passes, each as soon as it is there."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    _watchers[request_id] = queue
    created, words = int(time.time()), dict[int, str]()

    async def pump() -> None:
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
        del _watchers[request_id]
        task.cancel()
