# SPDX-License-Identifier: Apache-2.0
"""iLLaDA and LLaDA-MoE against Transformers' own modules in float32, pass for pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .agreement import agrees
from .conftest import Served, make_engine, poison
from .test_oracle import CONFIGS, ask_oracle, problems
from .transformers_oracle import FAMILIES, TransformersOracle, save_family

pytestmark = pytest.mark.engine

NAMES = ["none", "interval", "dual-cache", "released-high", "block-fine", "block-lazy-topk"]


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
def test_batch_of_16_equals_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    served = serve_family(family)
    assert_equals_oracle(served, list(itertools.product(range(12), NAMES)), grow_by=0)


@pytest.mark.parametrize("family", FAMILIES)
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
def test_growing_answers_equal_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    """Canvases of up to five pieces of 8; at each one the KV blocks begin to be filled anew."""
    served = serve_family(family)
    poison(served.engine)
    assert_equals_oracle(served, list(itertools.product(range(12), NAMES)), grow_by=8)


def test_growth_changes_answers(serve_family: Callable[[str], Served]) -> None:
    """Masks that are not there yet are not attended to; a canvas no larger than a piece is whole."""
    engine: Any = serve_family("illada").engine
    prompt = problems()[5][0]
    request = {"prompt_token_ids": prompt, "max_tokens": 24, "elastic_policy": "none"}
    grown, whole, one = engine.run([request | {"elastic_grow_by": by} for by in (8, 0, 24)])
    assert grown["steps"][0]["rows"] == len(prompt) + 8
    assert whole["steps"][0]["rows"] == len(prompt) + 24
    assert grown["token_ids"] != whole["token_ids"]
    assert one["steps"] == whole["steps"] and one["token_ids"] == whole["token_ids"]


def test_experts_do_not_depend_on_the_batch(serve_family: Callable[[str], Served]) -> None:
    """To the bit: a row's experts are the same, whatever rows they work on beside it."""
    from vllm.forward_context import set_forward_context

    engine: Any = serve_family("llada-moe").engine
    vllm_config = engine.llm.llm_engine.vllm_config
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(), set_forward_context(None, vllm_config):
        for block in engine.runner.model.blocks:
            rows = torch.randn(200, 128, generator=generator)
            whole = block.mlp(rows)
            assert len(whole.unique(dim=0)) == len(rows)
            for count in (1, 8, 40, 120):
                some = torch.randperm(len(rows), generator=generator)[:count]
                assert torch.equal(block.mlp(rows[some]), whole[some])


def test_norm_of_rows_that_are_no_neighbours() -> None:
    """The only KV head of a rank: its rows lie apart, between those of queries and values."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_elastic.models.layers import KernelRMSNorm

    with set_current_vllm_config(VllmConfig()):
        norm = KernelRMSNorm(32, eps=1e-5)
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))[:, 64:96]
    torch.testing.assert_close(norm(rows), torch.nn.functional.rms_norm(rows, (32,), eps=1e-5))
