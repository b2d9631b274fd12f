# SPDX-License-Identifier: Apache-2.0
"""The engine against the oracle in float32: tokens, passes, start layers, commits, similarities."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_elastic.reference import (
    DecodingOptions,
    DualCacheOptions,
    ElasticBlockOptions,
    ElasticOptions,
    IntervalOptions,
    LowConfidenceOptions,
    decode,
    dual_cache,
    elastic_block,
    elastic_cache,
    interval,
    low_confidence,
)

from .agreement import agrees
from .conftest import EOS, MASK, RANDOM_MODELS, SHIFTED, Served

pytestmark = pytest.mark.engine

BLOCK = {"policy": "elastic-block", "granularity": 8, "probes": 1, "measure_every": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "none-topk": {"policy": "none", "tokens_per_step": 3},
    "never": {"policy": "elastic", "gamma": 0.0},
    "reach": {"policy": "elastic", "gamma": 0.75, "reach": 3},
    "released-low": {"policy": "elastic", "gamma": 0.75},
    "released-high": {"policy": "elastic", "gamma": 0.9, "track_num": 3},
    "paper-low": {"policy": "elastic", "gamma": 0.8, "statistic": "paper"},
    "paper-high": {"policy": "elastic", "gamma": 0.97, "statistic": "paper", "window": 5},
    "always": {"policy": "elastic", "gamma": 1.1},
    "always-topk": {"policy": "elastic", "gamma": 1.1, "statistic": "paper", "tokens_per_step": 2},
    "wide": {"policy": "elastic", "gamma": 0.8, "window": 200, "threshold": 0.05},
    "next-low": {"policy": "elastic", "gamma": 0.75, "refresh": "next"},
    "next-high": {"policy": "elastic", "gamma": 0.9, "refresh": "next", "statistic": "paper"},
    "interval": {"policy": "interval", "interval": 3},
    "block": {
        "policy": "elastic-block",
        "granularity": 8,
        "probes": 4,
        "block_drift": 0.1,
        "reach": 0,
        "attention_stride": 1,
        "measure_every": 1,
    },
    "block-fine": {
        "policy": "elastic-block",
        "granularity": 3,
        "block_drift": 0.023,
        "reach": 4,
        "probes": 2,
        "attention_stride": 3,
    },
    "block-kv": {
        "policy": "elastic-block",
        "granularity": None,
        "block_drift": 0.2,
        "slack": 0.5,
        "probes": 1,
        "reach": 3,
        "measure_every": 3,
    },
    "block-replay": {
        "policy": "elastic-block",
        "refresh": "replay",
        "granularity": 8,
        "probes": 4,
        "reach": 2,
        "block_drift": 0.03,
        "threshold": 0.1,
    },
    "block-sure": {**BLOCK, "block_drift": 0.02, "threshold": 0.2, "reach": 2},
    "block-topk": {
        **BLOCK,
        "block_drift": 0.05,
        "threshold": 0.08,
        "tokens_per_step": 2,
        "reach": 1,
    },
    "block-spare": {**BLOCK, "block_drift": 0.1, "reach": 1, "rows_per_pass": 24},
    "block-spare-replay": {
        **BLOCK,
        "granularity": 3,
        "block_drift": 0.03,
        "reach": 2,
        "probes": 3,
        "refresh": "replay",
        "rows_per_pass": 31,
    },
    "block-spare-all": {**BLOCK, "rows_per_pass": 1000, "tokens_per_step": 2, "window": 5},
    "block-spare-all-replay": {
        **BLOCK,
        "granularity": 3,
        "probes": 2,
        "block_drift": 0.005,
        "reach": 1,
        "window": 1,
        "refresh": "replay",
        "rows_per_pass": 1000,
    },
    "dual-cache": {"policy": "dual-cache", "block_length": 8},
}
ENDS: dict[str, dict[str, Any]] = {
    "as-predicted": {"policy": "none"},
    "never": {"policy": "none", "logits_eos_inf": True},
    "never-elastic": {"policy": "elastic", "gamma": 0.9, "logits_eos_inf": True},
    "last": {"policy": "none", "confidence_eos_eot_inf": True},
    "last-dual-cache": {"policy": "dual-cache", "confidence_eos_eot_inf": True},
    "last-elastic": {"policy": "elastic", "gamma": 0.9, "confidence_eos_eot_inf": True},
    "block": {**BLOCK, "block_drift": 0.03, "reach": 2, "granularity": 4},
    "block-spare": {**BLOCK, "block_drift": 0.1, "reach": 3, "rows_per_pass": 30},
    "block-replay": {**BLOCK, "refresh": "replay", "block_drift": 0.02, "measure_every": 1},
}
# Each at the settings its paper has, and over every policy.
RULES: dict[str, dict[str, Any]] = {
    "threshold": {"policy": "none"},
    "frontier": {"policy": "none", "commit": "frontier"},
    "steady": {"policy": "none", "commit": "steady", "steady_threshold": 0.1},
    "credit": {"policy": "none", "commit": "credit", "threshold": 0.2},
    "factor": {"policy": "none", "commit": "factor"},
    "frechet": {"policy": "none", "commit": "frechet"},
    "local": {"policy": "none", "commit": "local"},
    "entropy": {"policy": "none", "commit": "entropy"},
    "factor-elastic": {"policy": "elastic", "commit": "factor", "factor": 1.0, "gamma": 0.8},
    "factor-block": {**BLOCK, "commit": "factor", "factor": 0.5, "reach": 2},
    "frechet-interval": {"policy": "interval", "commit": "frechet", "frechet_margin": 0.5},
    "frechet-block": {**BLOCK, "commit": "frechet", "frechet_margin": 0.1, "reach": 1},
    "frechet-block-topk": {**BLOCK, "commit": "frechet", "reach": 1, "tokens_per_step": 3},
    "entropy-block": {**BLOCK, "commit": "entropy", "entropy_bound": 0.5, "reach": 2},
    "entropy-ends": {"policy": "elastic", "commit": "entropy", "confidence_eos_eot_inf": True},
    "frontier-block": {**BLOCK, "commit": "frontier", "frontier_threshold": 0.3, "reach": 2},
    "frontier-dual-cache": {"policy": "dual-cache", "commit": "frontier", "block_length": 8},
    "frontier-ends": {"policy": "elastic", "commit": "frontier", "confidence_eos_eot_inf": True},
    "steady-block": {**BLOCK, "commit": "steady", "steady_threshold": 0.05, "reach": 2},
    "steady-elastic": {"policy": "elastic", "commit": "steady", "steady_threshold": 0.2},
    "steady-dual-cache": {
        "policy": "dual-cache",
        "commit": "steady",
        "steady_threshold": 0.1,
        "block_length": 8,
    },
    "credit-block": {**BLOCK, "commit": "credit", "threshold": 0.1, "reach": 2},
    "credit-elastic": {
        "policy": "elastic",
        "commit": "credit",
        "threshold": 0.2,
        "credit_decay": 1.0,
        "credit_weight": 1.5,
    },
    "credit-ends": {"policy": "none", "commit": "credit", "confidence_eos_eot_inf": True},
    "local-dual-cache": {"policy": "dual-cache", "commit": "local", "block_length": 8},
    "local-block": {
        **BLOCK,
        "commit": "local",
        "threshold": 0.8,
        "relaxed_threshold": 0.6,
        "anchor_radius": 2,
        "reach": 2,
    },
    "local-replay": {
        "policy": "elastic-block",
        "commit": "local",
        "granularity": 8,
        "refresh": "replay",
        "relaxed_threshold": 0.5,
    },
}
LENGTHS = [1, 7, 16, 33, 20]
MODELS = [*RANDOM_MODELS, *SHIFTED]


def problems(count: int = 32) -> list[tuple[list[int], int]]:
    """Prompts of 1 to 90 tokens and canvases of 1 to 33.

    With this seed two tokens of one case are equally likely to 1.3e-6, and float32 rounding
    decides one way in the oracle and another in the engine, or not: ``agreement`` sees it.
    """
    generator = torch.Generator().manual_seed(5)
    result = []
    for index in range(count):
        size = 1 + (index * 37) % 90
        prompt = torch.randint(0, MASK, (size,), generator=generator).tolist()
        result.append((prompt, LENGTHS[index % len(LENGTHS)]))
    return result


def ask_oracle(served: Served, prompt: list[int], max_tokens: int, config: dict[str, Any]) -> Any:
    options = dict(config)
    policy = options.pop("policy")
    if options.pop("logits_eos_inf", False):
        options["never"] = (EOS,)
    if options.pop("confidence_eos_eot_inf", False):
        options["unconfident"] = (EOS,)
    if policy == "none":
        return decode(served.oracle, prompt, max_tokens, DecodingOptions(**options))
    if policy == "dual-cache":
        return dual_cache(served.oracle, prompt, max_tokens, DualCacheOptions(**options))
    if policy == "interval":
        return interval(served.oracle, prompt, max_tokens, IntervalOptions(**options))
    if policy == "elastic-block":
        if "granularity" in options and options["granularity"] is None:
            options["granularity"] = 32  # the KV block
        return elastic_block(served.oracle, prompt, max_tokens, ElasticBlockOptions(**options))
    return elastic_cache(served.oracle, prompt, max_tokens, ElasticOptions(**options))


_answers: dict[tuple[str, int, str], Any] = {}


def expected_of(served: Served, index: int, name: str) -> Any:
    key = (served.name, index, name)
    if key not in _answers:
        _answers[key] = ask_oracle(served, *problems()[index], CONFIGS[name])
    return _answers[key]


def compare(served: Served, cases: list[tuple[int, str]], results: list[dict[str, Any]]) -> None:
    """Everything the records say, against the oracle's; few near ties."""
    equal = [
        agrees(result, expected_of(served, *case), (served.name, *case))
        for case, result in zip(cases, results, strict=True)
    ]
    assert equal.count(False) <= len(cases) / 100


def request(index: int, name: str) -> dict[str, Any]:
    prompt, max_tokens = problems()[index]
    knobs = {f"elastic_{key}": value for key, value in CONFIGS[name].items()}
    return {"id": (index, name), "prompt_token_ids": prompt, "max_tokens": max_tokens, **knobs}


def one_in(count: int) -> list[tuple[int, str]]:
    """One in ``count`` pairs of prompt and configuration; each of both is in several."""
    return [(i, name) for i in range(32) for j, name in enumerate(CONFIGS) if (i + j) % count == 0]


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # The models differ in layers and heads, not in how they are decoded.
        *((model, 16) for model in MODELS),
        pytest.param(MODELS[0], 4, marks=pytest.mark.slow),
        *(pytest.param(model, 1, marks=pytest.mark.long) for model in MODELS),
    ],
)
def test_batch_of_16_equals_oracle(model: str, count: int, serve: Callable[[str], Served]) -> None:
    """All configurations mixed in one batch, joining and leaving as they come and finish."""
    served = serve(model)
    cases = one_in(count)
    results = served.engine.run([request(*case) for case in cases])  # type: ignore[attr-defined]
    compare(served, cases, results)
    kinds = {p["kind"] for result in results for p in result["steps"]}
    assert kinds == {"first", "window", "replay", "full", "refresh"}


@pytest.mark.parametrize(
    ("model", "count"),
    [
        *((model, 20) for model in MODELS),
        *(pytest.param(model, 8, marks=pytest.mark.long) for model in MODELS),
    ],
)
@pytest.mark.slow
def test_batch_of_1_equals_oracle(model: str, count: int, serve: Callable[[str], Served]) -> None:
    """Some of the same requests alone in the engine."""
    served = serve(model)
    cases = one_in(count)
    scheduler = served.engine.scheduler  # type: ignore[attr-defined]
    limit, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 1
    try:
        results = served.engine.run([request(*c) for c in cases])  # type: ignore[attr-defined]
    finally:
        scheduler.max_num_active_reqs = limit
    compare(served, cases, results)


@pytest.mark.slow
def test_end_options_equal_oracle(serve: Callable[[str], Served]) -> None:
    """With a model that likes to end; each option has to change some answer."""
    served = serve("eager")
    prompts = problems(12)
    cases = list(itertools.product(range(len(prompts)), ENDS))
    results = served.engine.run(  # type: ignore[attr-defined]
        [
            {"prompt_token_ids": prompts[index][0], "max_tokens": prompts[index][1]}
            | {f"elastic_{key}": value for key, value in ENDS[name].items()}
            for index, name in cases
        ]
    )
    answers: dict[str, list[Any]] = {name: [] for name in ENDS}
    for (index, name), result in zip(cases, results, strict=True):
        prompt, max_tokens = prompts[index]
        expected = ask_oracle(served, prompt, max_tokens, ENDS[name])
        assert agrees(result, expected, (index, name))
        answers[name].append(result["token_ids"])
    assert answers["as-predicted"] != answers["never"]
    assert answers["as-predicted"] != answers["last"]
    assert all(len(a) == p[1] for a, p in zip(answers["never"], prompts, strict=True))


@pytest.mark.slow
def test_commit_rules_equal_oracle(serve: Callable[[str], Served]) -> None:
    """All rules in one batch, with a model that is sure of much; each has to commit several tokens
    at a step, and others than by threshold."""
    served = serve("sure")
    prompts = problems(16)
    cases = list(itertools.product(range(len(prompts)), RULES))
    results = served.engine.run(  # type: ignore[attr-defined]
        [
            {"prompt_token_ids": prompts[index][0], "max_tokens": prompts[index][1]}
            | {f"elastic_{key}": value for key, value in RULES[name].items()}
            for index, name in cases
        ]
    )
    equal = []
    commits: dict[str, list[list[int]]] = {name: [] for name in RULES}
    for (index, name), result in zip(cases, results, strict=True):
        prompt, max_tokens = prompts[index]
        expected = ask_oracle(served, prompt, max_tokens, RULES[name])
        equal.append(agrees(result, expected, (index, name)))
        commits[name] += [entry["committed"] for entry in result["steps"]]
    assert equal.count(False) <= len(cases) / 100
    assert {p["kind"] for r in results for p in r["steps"]} >= {"replay", "refresh"}
    for name in RULES:
        assert sum(len(committed) > 1 for committed in commits[name]) > len(prompts), name
    assert commits["threshold"] not in [
        commits[name]
        for name in ("frontier", "steady", "credit", "factor", "frechet", "local", "entropy")
    ]


@pytest.mark.parametrize("model", MODELS)
def test_lladas_own_schedule_equals_oracle(model: str, serve: Callable[[str], Served]) -> None:
    """Fixed steps over text blocks, up to the first end token, where vLLM stops."""
    served = serve(model)
    shapes = [(24, 12, 8), (24, 24, 24), (16, 6, 8), (30, 3, 30)]
    prompts = [problems()[index][0] for index in range(8)]
    cases = [(prompt, shapes[i % 4]) for i, prompt in enumerate(prompts)]
    results = served.engine.run(  # type: ignore[attr-defined]
        [
            {
                "prompt_token_ids": prompt,
                "max_tokens": tokens,
                "elastic_policy": "none",
                "elastic_steps": steps,
                "elastic_block_length": length,
            }
            for prompt, (tokens, steps, length) in cases
        ]
    )
    for (prompt, (tokens, steps, length)), result in zip(cases, results, strict=True):
        options = LowConfidenceOptions(steps=steps, block_length=length)
        expected = low_confidence(served.oracle, prompt, tokens, options)
        assert result["token_ids"] == expected.token_ids
        assert result["steps"] == expected.steps[: len(result["steps"])]
        assert len(result["token_ids"]) < tokens or len(result["steps"]) == steps
