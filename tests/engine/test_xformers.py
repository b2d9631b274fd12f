# SPDX-License-Identifier: Apache-2.0
"""The engine over the backend on xformers, in place of vLLM's CPU one: the oracle's answers.

Over a stand-in of the operator; and over the operator, in Triton's interpreter, where it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tests import triton_interpreter  # noqa: F401
from tests.attention import xformers_stand_in
from tests.device import ON_CARD
from tests.qwen2_oracle import Qwen2Oracle
from vllm_elastic.attention import xformers_backend
from vllm_elastic.reference import LLaDA

from .agreement import agrees
from .conftest import RANDOM_MODELS, SHIFTED, Served, make_engine, random_config
from .test_oracle import CONFIGS, ask_oracle, problems

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(ON_CARD, reason="xformers' kernel takes no float32 there"),
]

STAND_IN, XFORMERS = "stand-in", "xformers"
PROMPTS = {STAND_IN: (1, 8), XFORMERS: (1, 8)}  # the interpreter takes seconds for one
NAMES = {
    STAND_IN: list(CONFIGS),
    XFORMERS: ["none", "released-high", "block", "next-low"],
}


def oracle_of(model: str) -> LLaDA:
    if model in SHIFTED:
        return Qwen2Oracle(SHIFTED[model], seed=3)
    return LLaDA.random(random_config(**RANDOM_MODELS[model]), seed=3)


@pytest.fixture(params=[STAND_IN, XFORMERS])
def operator(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the backend calls; the backend itself stands where vLLM's CPU platform looks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == STAND_IN:
            monkeypatch.setattr(xformers_backend, "operator", lambda: xformers_stand_in)
        elif (lacking := xformers_backend.missing()) is not None:
            pytest.skip(f"{lacking}; make xformers-test has it")
        # It reads the CPU backend's sizes.
        importlib.import_module("vllm_elastic.engine.engine_config")
        ours = f"{xformers_backend.__name__}.XFormersBackend"
        register_backend(AttentionBackendEnum.CPU_ATTN, ours)
        # vLLM remembers what it chose for an engine before this one, and would for one behind it.
        selector._cached_get_attn_backend.cache_clear()
        yield request.param
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


@pytest.mark.parametrize(
    ("model", "options"),
    [("gqa-tied", {}), pytest.param("dream", {"row_budget": 64}, marks=pytest.mark.long)],
    ids=["whole", "row-chunks"],
)
@pytest.mark.slow
def test_equals_oracle(
    model: str, options: dict[str, Any], operator: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All policies in one batch, rows of a request at several join layers and in several pieces."""
    oracle = oracle_of(model)
    directory = tmp_path_factory.mktemp(model)
    oracle.save_pretrained(directory)
    engine = make_engine(directory, **options)
    served = Served(model, directory, oracle, engine)
    impl = engine.runner.model.attention_layers[0].impl
    assert isinstance(impl, xformers_backend.XFormersImpl)
    assert engine.runner.cache.key_layout.plain
    asked = problems()
    cases = [(*asked[index], name) for index in PROMPTS[operator] for name in NAMES[operator]]
    results = engine.run(
        [
            {"prompt_token_ids": prompt, "max_tokens": max_tokens}
            | {f"elastic_{key}": value for key, value in CONFIGS[name].items()}
            for prompt, max_tokens, name in cases
        ]
    )
    equal = []
    for (prompt, max_tokens, name), result in zip(cases, results, strict=True):
        expected = ask_oracle(served, prompt, max_tokens, CONFIGS[name])
        equal.append(agrees(result, expected, (name, len(prompt))))
    assert equal.count(False) <= max(1, len(cases) / 100), "near ties are rare"
    kinds = {entry["kind"] for result in results for entry in result["steps"]}
    assert kinds >= {"first", "window", "replay", "full", "refresh"}
