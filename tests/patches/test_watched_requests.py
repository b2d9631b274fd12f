# SPDX-License-Identifier: Apache-2.0
"""Passes reach who watches and nobody else, vLLM's own outputs least: patches/watched_requests."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.patches.front_end import add_request
from vllm_elastic.engine.attachments import PASSES, attach


def made(position: int) -> dict[str, Any]:
    return {"kind": "window", "canvas": {"predicted": [[position, 7, 0.5], [position + 1, 8, 0.5]]}}


def processor() -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.output_processor import OutputProcessor

    load_general_plugins()
    return OutputProcessor(tokenizer=None, log_stats=False)


def add(processor: Any, request_id: str, inside: str) -> None:
    """Two requests may have the same id outside."""
    from vllm.sampling_params import RequestOutputKind

    add_request(processor, request_id, inside, output_kind=RequestOutputKind.DELTA)


def output(inside: str, tokens: list[int], passes: list[dict[str, Any]]) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    params = attach(None, PASSES, passes)
    return EngineCoreOutput(request_id=inside, new_token_ids=tokens, kv_transfer_params=params)


class Tokenizer:
    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, token_ids: list[int]) -> str:
        self.decoded += token_ids
        return f"<{token_ids[0]}>"


async def watch(
    chunks: AsyncIterator[str], request_id: str, tokenizer: Tokenizer
) -> AsyncIterator[str]:
    from vllm_elastic.patches.watched_requests import _with_passes

    async for item in _with_passes(chunks, request_id, "tiny", tokenizer):
        yield item


def test_each_pass_arrives_at_once_and_in_its_place() -> None:
    async def run() -> list[Any]:
        front_end = processor()
        go_on = asyncio.Event()

        async def chunks() -> AsyncIterator[str]:
            add(front_end, "a", "a-1")
            front_end.process_outputs([output("a-1", [], [made(3)])], 1.0)
            await go_on.wait()
            yield "first"
            front_end.process_outputs([output("a-1", [5], [made(4), made(9)])], 1.0)
            yield "second"

        tokenizer, seen = Tokenizer(), []
        async for item in watch(chunks(), "a", tokenizer):
            seen.append(item if item in ("first", "second") else json.loads(item[6:]))
            go_on.set()  # only after the first pass was sent
        assert tokenizer.decoded in ([7, 8], [8, 7]), "each token is decoded once"
        return seen

    seen = asyncio.run(asyncio.wait_for(run(), 30))
    kinds = [
        item if isinstance(item, str) else item["elastic"]["canvas"]["predicted"][0][0]
        for item in seen
    ]
    assert kinds == [3, "first", 4, 9, "second"]
    assert seen[0]["choices"] == [] and seen[0]["elastic"]["words"] == {"7": "<7>", "8": "<8>"}
    assert seen[2]["elastic"]["words"] == {} and seen[0]["elastic"]["index"] == 0


def test_two_streams_of_one_id_have_their_own_passes() -> None:
    """A client names its request by X-Request-Id; nobody sees another's answer by its name."""
    front_end = processor()
    both_are_there = asyncio.Barrier(2)

    async def chunks(inside: str, position: int) -> AsyncIterator[str]:
        add(front_end, "a", inside)
        await both_are_there.wait()
        front_end.process_outputs([output(inside, [], [made(position)])], 1.0)
        await both_are_there.wait()
        yield "end"

    async def seen(inside: str, position: int) -> list[Any]:
        items = [item async for item in watch(chunks(inside, position), "a", Tokenizer())]
        assert items.pop() == "end"
        return [json.loads(item[6:])["elastic"]["canvas"]["predicted"][0][0] for item in items]

    async def run() -> list[Any]:
        return await asyncio.gather(seen("a-1", 3), seen("a-2", 4))

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [[3], [4]]


def test_passes_that_nobody_watches_are_dropped() -> None:
    """Of a request that is no stream, though another one was watched before."""
    front_end = processor()

    async def chunks() -> AsyncIterator[str]:
        add(front_end, "a", "a-1")
        yield "end"

    async def run() -> list[Any]:
        items = [item async for item in watch(chunks(), "a", Tokenizer())]
        add(front_end, "b", "b-1")
        front_end.process_outputs([output("b-1", [], [made(3)])], 1.0)
        return items

    assert asyncio.run(run()) == ["end"]


def test_an_error_of_the_stream_is_its_own() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "first"
        raise ValueError("the engine is dead")

    async def run() -> None:
        seen = []
        with pytest.raises(ValueError, match="the engine is dead"):
            async for item in watch(chunks(), "a", Tokenizer()):
                seen.append(item)
        assert seen == ["first"]

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_request() -> None:
    """The engine would decode on for nobody, and the passes pile up."""
    from vllm_elastic.patches import watched_requests

    ended = []

    async def chunks() -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append(True)  # where AsyncLLM.generate aborts the request
            raise

    async def run() -> None:
        stream = watched_requests._with_passes(chunks(), "a", "tiny", Tokenizer())
        assert await anext(stream) == "first"
        await stream.aclose()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == [True]


def test_other_requests_have_vllms_own_stream() -> None:
    """Those of an endpoint that makes events of its own of a chat's chunks among them."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    processor()
    stream = OpenAIServingChat.chat_completion_stream_generator
    own = stream.__wrapped__
    for serving, xargs, ours in (
        (OpenAIServingChat, None, False),
        (OpenAIServingChat, {"elastic_window": 4}, False),
        (OpenAIServingChat, {"elastic_watch": 1}, True),
        (AnthropicServingMessages, {"elastic_watch": 1}, False),
    ):
        request = types.SimpleNamespace(vllm_xargs=xargs)
        made = stream(object.__new__(serving), request, None, "a", "tiny", [], None, None)
        assert (made.ag_code is not own.__code__) == ours


def test_the_patch_is_needed() -> None:
    """Stock vLLM makes no output of a step without tokens: nothing of ours would get through."""
    import inspect

    from vllm.v1.core.sched.scheduler import Scheduler

    condition = "new_token_ids or pooler_output is not None or stopped"
    assert condition in inspect.getsource(Scheduler.update_from_output), (
        "patch watched_requests can go, or be simpler: see its record"
    )
