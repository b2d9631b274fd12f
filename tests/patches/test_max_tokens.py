# SPDX-License-Identifier: Apache-2.0
"""Over HTTP max_tokens is taken literally, by a LLaDA's engine alone: patches/max_tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
MESSAGES = [{"role": "user", "content": "2"}]
LEFT = 10  # what vLLM would lower every canvas to


def processor_of(model: Path, **options: Any) -> Any:
    """What stands before a model's engine, without one."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    args = EngineArgs(
        model=str(model), dtype="float32", max_model_len=512, skip_tokenizer_init=True, **options
    )
    return InputProcessor(args.create_engine_config())


@pytest.fixture(scope="module")
def llada() -> Any:
    return processor_of(MODEL, additional_config={"elastic": {"default_max_tokens": 200}})


@pytest.fixture(scope="module")
def ceiling() -> Any:
    """An operator's."""
    return processor_of(MODEL, override_generation_config={"max_new_tokens": 100})


@pytest.fixture(scope="module")
def stock(llada: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama's, made in the same process after a LLaDA's."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=160,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    config.save_pretrained(directory)
    return processor_of(directory)


def admitted(processor: Any, request: Any) -> int:
    """The canvas of a request as the engine gets it."""
    defaults = processor.model_config.get_diff_sampling_param()
    params = request.to_sampling_params(LEFT, {"temperature": 0.0, **defaults})
    prompt = {"type": "token", "prompt_token_ids": [9] * 4}
    core = processor.process_inputs("0", prompt, params, ("generate",))
    return int(core.sampling_params.max_tokens)


def requests_of() -> list[tuple[Callable[..., Any], str]]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return [
        (lambda **kw: ChatCompletionRequest(messages=MESSAGES, **kw), "max_completion_tokens"),
        (lambda **kw: ChatCompletionRequest(messages=MESSAGES, **kw), "max_tokens"),
        (lambda **kw: ResponsesRequest(input="2", **kw), "max_output_tokens"),
        (lambda **kw: CompletionRequest(prompt="2", **kw), "max_tokens"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_canvas_as_sent(case: int, llada: Any, ceiling: Any) -> None:
    make, name = requests_of()[case]
    assert admitted(llada, make(**{name: 300})) == 300
    assert admitted(ceiling, make(**{name: 300})) == 100
    assert admitted(ceiling, make(**{name: 30})) == 30


@pytest.mark.parametrize("case", range(3))
def test_default_canvas(case: int, llada: Any, ceiling: Any) -> None:
    make, _ = requests_of()[case]
    assert admitted(llada, make()) == 200
    assert admitted(ceiling, make()) == 100


@pytest.mark.parametrize("case", range(4))
def test_stock_model_is_left_alone(case: int, stock: Any) -> None:
    """Though a LLaDA was configured in this process before."""
    make, name = requests_of()[case]
    for request in (make(), make(**{name: 300})):
        assert admitted(stock, request) == LEFT


@pytest.mark.parametrize("case", [0, 1, 3])
def test_min_tokens_is_held_against_the_canvas(
    case: int, llada: Any, ceiling: Any, stock: Any
) -> None:
    """Not against what vLLM has lowered it to; for other models it is, and in the same words."""
    make, name = requests_of()[case]
    asked = {name: 300, "min_tokens": 250}
    assert admitted(llada, make(**asked)) == 300
    for processor, most in ((ceiling, 100), (stock, LEFT)):
        with pytest.raises(
            VLLMValidationError, match=f"less than or equal to max_tokens={most}, got 250"
        ):
            admitted(processor, make(**asked))
    with pytest.raises(VLLMValidationError, match="less than or equal to max_tokens=300, got 301"):
        admitted(llada, make(**{name: 300, "min_tokens": 301}))
    if case < 3:  # a completion's default is not known here
        with pytest.raises(VLLMValidationError, match="equal to max_tokens=200, got 250"):
            admitted(llada, make(min_tokens=250))


class Stop(Exception):
    """Ends a server's handling of a request once it is known what it was asked."""


def handled(processor: Any, body: dict[str, Any]) -> Any:
    """A completion request as the server's handler goes on with it."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    class Handler(OpenAIServingCompletion):
        has_kv_connector = False

        def __init__(self) -> None:
            self.engine_client = SimpleNamespace(vllm_config=processor.vllm_config)
            self.default_sampling_params = processor.model_config.get_diff_sampling_param()

        async def render_completion_request(self, request: Any) -> Any:
            raise Stop

    async def json() -> dict[str, Any]:
        return body

    request = CompletionRequest(**body)
    raw_request = SimpleNamespace(json=json, headers={}, state=SimpleNamespace())
    with pytest.raises(Stop):
        asyncio.run(Handler().create_completion(request, raw_request))
    return request


@pytest.mark.parametrize("sent", [{}, {"max_tokens": None}], ids=str)
def test_default_canvas_of_completions(sent: Any, llada: Any, ceiling: Any, stock: Any) -> None:
    body = {"prompt": "2", **sent}
    assert admitted(llada, handled(llada, body)) == 200
    assert admitted(ceiling, handled(ceiling, body)) == 100
    assert handled(stock, body).max_tokens == 16


def test_completion_of_sixteen(llada: Any) -> None:
    """Which is what vLLM fills in."""
    assert admitted(llada, handled(llada, {"prompt": "2", "max_tokens": 16})) == 16


def test_echo_alone_decodes_one_token(llada: Any) -> None:
    assert admitted(llada, handled(llada, {"prompt": "2", "echo": True, "max_tokens": 0})) == 1


@pytest.mark.parametrize("kind", ["online", "offline"])
def test_beam_search_is_refused_for_llada_alone(kind: str, llada: Any, stock: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm_elastic.patches import max_tokens

    mixin = {
        "online": max_tokens.BeamSearchOnlineMixin,
        "offline": max_tokens.BeamSearchOfflineMixin,
    }[kind]

    class Server(mixin):  # type: ignore[misc, valid-type]
        def __init__(self, processor: Any) -> None:
            self.engine_client = self.llm_engine = SimpleNamespace(
                vllm_config=processor.vllm_config, input_processor=processor
            )

    with pytest.raises(VLLMValidationError, match="use_beam_search is not supported"):
        Server(llada).beam_search([], None, None)
    with pytest.raises((AttributeError, TypeError)):  # vLLM's own, which misses a lot
        found = Server(stock).beam_search([], None, None)
        asyncio.run(anext(found))


def test_patch_is_still_needed() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

    reasons = {
        "lowers a canvas that does not fit": get_max_tokens(100, 90, 50, {}) == 50,
        "takes the override's default for a ceiling": get_max_tokens(999, 300, 5, {}, 256) == 256,
        "gives a completion without max_tokens 16": CompletionRequest(prompt="2").max_tokens == 16,
    }
    gone = [reason for reason, holds in reasons.items() if not holds]
    assert not gone, (
        f"patch max_tokens: a part can go, stock vLLM no longer {' nor '.join(gone)}. Adapt "
        "patches/max_tokens, vllm_elastic/patches/max_tokens.py and this test."
    )
