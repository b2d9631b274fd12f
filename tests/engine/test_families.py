# SPDX-License-Identifier: Apache-2.0
"""iLLaDA and LLaDA-MoE against Transformers' own modules in float32, pass for pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device import DEVICE, ON_CARD
from tests.transformers_oracle import TransformersOracle
from vllm_elastic.reference import LowConfidenceOptions, low_confidence

from .agreement import agrees
from .conftest import MASK, Served, make_engine, poison
from .random_families import FAMILIES, save_family
from .test_oracle import CONFIGS, ask_oracle, problems

pytestmark = pytest.mark.engine

NAMES = ["none", "interval", "dual-cache", "released-high", "block-fine", "block-topk"]


@pytest.fixture(scope="module")
def serve_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    loaded: dict[str, Served] = {}

    def load(name: str) -> Served:
        if name not in loaded:
            directory: Path = tmp_path_factory.mktemp(name)
            oracle = save_family(name, directory)
            loaded[name] = Served(name, directory, oracle, make_engine(directory))
        return loaded[name]

    return load


def assert_equals_oracle(
    served: Served, cases: list[tuple[int, str]], own_growth: int = 0, **knobs: Any
) -> None:
    """Everything the records say, against the oracle's; few near ties.

    ``own_growth``: of the model, where the requests do not name it; ``knobs``: of all requests.
    """
    requests = []
    for index, name in cases:
        prompt, max_tokens = problems()[index]
        own = {f"elastic_{key}": value for key, value in (CONFIGS[name] | knobs).items()}
        requests.append({"prompt_token_ids": prompt, "max_tokens": max_tokens, **own})
    results = served.engine.run(requests)  # type: ignore[attr-defined]
    equal = []
    for (index, name), result in zip(cases, results, strict=True):
        expected = ask_oracle(
            served, *problems()[index], CONFIGS[name] | {"grow_by": own_growth} | knobs
        )
        equal.append(agrees(result, expected, (served.name, index, name)))
    assert equal.count(False) <= len(cases) / 50
    kinds = {p["kind"] for result in results for p in result["steps"]}
    assert kinds >= {"first", "window", "replay", "refresh"}


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    oracle: TransformersOracle = save_family(family, tmp_path)
    tokens = torch.arange(3, 45)
    found = oracle.head(oracle.forward(tokens))
    torch.testing.assert_close(found, oracle.whole(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_batch_of_16_equals_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    served = serve_family(family)
    assert_equals_oracle(served, list(itertools.product(range(0, 12, 2), NAMES)), grow_by=0)


@pytest.mark.parametrize("family", ["illada", pytest.param("llada-moe", marks=pytest.mark.slow)])
def test_batch_of_1_equals_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    """Alone in the engine, as the model's authors decode: iLLaDA grows by 32."""
    served = serve_family(family)
    own = {"illada": 32, "llada-moe": 0}[family]
    scheduler = served.engine.scheduler  # type: ignore[attr-defined]
    limit, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 1
    cases = list(itertools.product((3, 8, 13), NAMES))  # canvases of 33
    try:
        assert_equals_oracle(served, cases, own_growth=own)
    finally:
        scheduler.max_num_active_reqs = limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_growing_answers_equal_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    """Canvases of up to five pieces of 8; at each one the KV blocks begin to be filled anew."""
    served = serve_family(family)
    poison(served.engine)
    assert_equals_oracle(served, list(itertools.product(range(0, 12, 2), NAMES)), grow_by=8)
    ahead = {"grow_by": 8, "grow_ahead": 10}
    assert_equals_oracle(served, list(itertools.product(range(1, 12, 2), NAMES)), **ahead)


def test_growth_changes_answers(serve_family: Callable[[str], Served]) -> None:
    """Masks that are not there yet are not attended to; a piece of all is the whole."""
    engine: Any = serve_family("illada").engine
    prompt = problems()[5][0]
    request = {"prompt_token_ids": prompt, "max_tokens": 24, "elastic_policy": "none"}
    grown, whole, one = engine.run([request | {"elastic_grow_by": by} for by in (8, 0, 24)])
    assert grown["steps"][0]["rows"] == len(prompt) + 8
    assert whole["steps"][0]["rows"] == len(prompt) + 24
    assert grown["token_ids"] != whole["token_ids"]
    assert one["steps"] == whole["steps"] and one["token_ids"] == whole["token_ids"]


def test_the_authors_schedule_equals_oracle(serve_family: Callable[[str], Served]) -> None:
    """Fixed steps in each piece that the answer grows by, up to the first end token."""
    served = serve_family("illada")
    prompts = [problems()[index][0] for index in range(6)]
    knobs = {"policy": "none", "steps": 12, "block_length": 8, "grow_by": 8}
    own = {f"elastic_{key}": value for key, value in knobs.items()}
    requests = [{"prompt_token_ids": prompt, "max_tokens": 24, **own} for prompt in prompts]
    results = served.engine.run(requests)  # type: ignore[attr-defined]
    for prompt, result in zip(prompts, results, strict=True):
        options = LowConfidenceOptions(steps=12, block_length=8, grow_by=8)
        expected = low_confidence(served.oracle, prompt, 24, options)
        assert result["token_ids"] == expected.token_ids
        assert result["steps"] == expected.steps[: len(result["steps"])]
    assert any(len(result["steps"]) == 12 for result in results), "grown to the end"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"grow_by": -1}, "'elastic_grow_by' must be an integer from 0 .*, got -1"),
        ({"policy": "dual-cache", "block_length": 48}, "'elastic_grow_by' 32 must be a multiple"),
        ({"grow_by": 12, "steps": 8, "block_length": 8}, "of 'elastic_block_length' 8 where text"),
        ({"grow_by": 8, "canvas": [MASK] * 16}, "'elastic_grow_by' and 'elastic_canvas' do not"),
    ],
)
def test_growth_that_does_not_fit_is_refused(
    serve_family: Callable[[str], Served], knobs: dict[str, Any], message: str
) -> None:
    """At admission, which is HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    own = {f"elastic_{key}": value for key, value in knobs.items()}
    engine: Any = serve_family("illada").engine
    with pytest.raises(VLLMValidationError, match=message):
        engine.run([{"prompt_token_ids": [3, 4], "max_tokens": 16, **own}])


def test_infilling_does_not_grow(serve_family: Callable[[str], Served]) -> None:
    """Also where the model's answers do of their own accord."""
    engine: Any = serve_family("illada").engine
    canvas = [MASK] * 39 + [7]
    request = {"prompt_token_ids": [3, 4], "max_tokens": 40, "elastic_canvas": canvas}
    (result,) = engine.run([request | {"elastic_policy": "none"}])
    assert result["steps"][0]["rows"] == 42 and result["token_ids"][-1] == 7


def test_experts_do_not_depend_on_the_batch(serve_family: Callable[[str], Served]) -> None:
    """To the bit: a row's experts are the same, whatever rows they work on beside it.

    On a card vLLM chooses their tiles by the number of rows, and sums are rounded otherwise.
    """
    from vllm.forward_context import set_forward_context

    engine: Any = serve_family("llada-moe").engine
    vllm_config = engine.llm.llm_engine.vllm_config
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(), set_forward_context(None, vllm_config):
        for block in engine.runner.model.blocks:
            rows = torch.randn(200, 128, generator=generator).to(DEVICE)
            whole = block.mlp(rows)
            assert len(whole.unique(dim=0)) == len(rows)
            for count in (1, 8, 40, 120):
                some = torch.randperm(len(rows), generator=generator)[:count].to(DEVICE)
                found = block.mlp(rows[some])
                assert ON_CARD or torch.equal(found, whole[some])
                torch.testing.assert_close(found, whole[some])


@pytest.mark.parametrize("engines", [1, 2])
def test_engines_with_experts_do_not_wait_for_each_other(engines: int, tmp_path: Path) -> None:
    """vLLM keeps data-parallel engines in step where it knows of experts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    save_family("llada-moe", tmp_path)
    args = EngineArgs(str(tmp_path), skip_tokenizer_init=True, data_parallel_size=engines)
    config = args.create_engine_config()
    assert config.model_config.is_moe == (engines == 1)
    assert config.parallel_config.is_moe_model == (engines == 1)


def test_norm_of_rows_that_are_no_neighbours() -> None:
    """The only KV head of a rank: its rows lie apart, between those of queries and values."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_elastic.models.layers import KernelRMSNorm

    with set_current_vllm_config(VllmConfig()), DEVICE:
        norm = KernelRMSNorm(32, eps=1e-5)
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    rows = rows.to(DEVICE)[:, 64:96]
    torch.testing.assert_close(norm(rows), torch.nn.functional.rms_norm(rows, (32,), eps=1e-5))
