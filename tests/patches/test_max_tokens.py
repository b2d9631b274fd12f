# SPDX-License-Identifier: Apache-2.0
"""Over HTTP max_tokens is taken literally: patches/max_tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "2"}]
LEFT = 10  # what vLLM would lower every canvas to


def canvas(request: Any) -> int:
    return int(request.to_sampling_params(LEFT, {"temperature": 0.0}).max_tokens)


def requests_of() -> list[tuple[Callable[..., Any], str]]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return [
        (lambda **kw: ChatCompletionRequest(messages=MESSAGES, **kw), "max_completion_tokens"),
        (lambda **kw: ChatCompletionRequest(messages=MESSAGES, **kw), "max_tokens"),
        (lambda **kw: CompletionRequest(prompt="2", **kw), "max_tokens"),
        (lambda **kw: ResponsesRequest(input="2", **kw), "max_output_tokens"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_canvas_as_sent_or_the_default(case: int) -> None:
    from vllm_elastic.patches.max_tokens import keep_requested_canvas

    make, name = requests_of()[case]
    keep_requested_canvas(200, None)
    assert canvas(make(**{name: 300})) == 300
    assert canvas(make()) == 200
    keep_requested_canvas(100, 100)  # an operator's ceiling
    assert canvas(make(**{name: 300})) == 100
    assert canvas(make(**{name: 30})) == 30
    assert canvas(make()) == 100


def test_echo_alone_decodes_one_token() -> None:
    from vllm_elastic.patches.max_tokens import keep_requested_canvas

    keep_requested_canvas(200, None)
    make, _ = requests_of()[2]
    assert canvas(make(echo=True, max_tokens=0)) == 1


def test_patch_is_still_needed() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

    # Not the class's field: that may have our default by now.
    fields = inspect.getsource(CompletionRequest)
    reasons = {
        "lowers a canvas that does not fit": get_max_tokens(100, 90, 50, {}) == 50,
        "takes the override's default for a ceiling": get_max_tokens(999, 300, 5, {}, 256) == 256,
        "gives a completion without max_tokens 16": "max_tokens: int | None = 16\n" in fields,
    }
    gone = [reason for reason, holds in reasons.items() if not holds]
    assert not gone, (
        f"patch max_tokens: a part can go, stock vLLM no longer {' nor '.join(gone)}. Adapt "
        "patches/max_tokens, vllm_elastic/patches/max_tokens.py and this test."
    )
