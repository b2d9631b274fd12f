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
from vllm_elastic.engine.report import PASSES, attach


def made(position: int) -> dict[str, Any]:
    return {"kind": "window", "canvas": {"predicted": [[position, 7, 0.5], [position + 1, 8, 0.5]]}}


def processor_of(*request_ids: str) -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import OutputProcessor

    load_general_plugins()
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    for request_id in request_ids:
        add_request(processor, request_id, output_kind=RequestOutputKind.DELTA)
    return processor


def output(request_id: str, tokens: list[int], passes: list[dict[str, Any]] | None) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    params = None if passes is None else attach({"other": 1}, PASSES, passes)
    return EngineCoreOutput(
        request_id=f"{request_id}-1", new_token_ids=tokens, kv_transfer_params=params
    )


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
        processor = processor_of("a")
        go_on = asyncio.Event()

        async def chunks() -> AsyncIterator[str]:
            processor.process_outputs([output("a", [], [made(3)])], 1.0)
            await go_on.wait()
            yield "first"
            processor.process_outputs([output("a", [5], [made(4), made(9)])], 1.0)
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


def test_an_error_of_the_stream_is_its_own() -> None:
    from vllm_elastic.patches import watched_requests

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
    assert not watched_requests._watchers


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
        assert "a" in watched_requests._watchers
        await stream.aclose()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == [True] and not watched_requests._watchers


def test_other_requests_have_vllms_own_stream() -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    processor_of()
    stream = OpenAIServingChat.chat_completion_stream_generator
    own = stream.__wrapped__
    for xargs, ours in (
        (None, False),
        ({"elastic_window": 4}, False),
        ({"elastic_watch": 1}, True),
    ):
        request = types.SimpleNamespace(vllm_xargs=xargs)
        made = stream(None, request, None, "a", "tiny", [], None, None)
        assert (made.ag_code is not own.__code__) == ours


def test_the_patch_is_needed() -> None:
    """Stock vLLM makes no output of a step without tokens: nothing of ours would get through."""
    import inspect

    from vllm.v1.core.sched.scheduler import Scheduler

    condition = "new_token_ids or pooler_output is not None or stopped"
    assert condition in inspect.getsource(Scheduler.update_from_output), (
        "patch watched_requests can go, or be simpler: see its record"
    )
