# SPDX-License-Identifier: Apache-2.0
"""The trained LLaDA in float32 against the oracle: real answers, short prompts and long ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_elastic.reference import (
    DecodingOptions,
    ElasticBlockOptions,
    ElasticOptions,
    LLaDA,
    decode,
    elastic_block,
    elastic_cache,
)

from .agreement import agrees
from .conftest import ORACLES_DEFAULTS, poison

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada"
sys.path.insert(0, str(TINY))

pytestmark = pytest.mark.engine

CONFIGS: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "released": {"policy": "elastic", "gamma": 0.9},
    "paper": {"policy": "elastic", "gamma": 0.9, "statistic": "paper"},
    "block": {"policy": "elastic-block"},
    "one-a-step": {"policy": "elastic", "gamma": 0.7, "tokens_per_step": 1},
}
CANVAS = 64
"""Shorter than the model card's 256, to keep the oracle's part short: 128 took three minutes."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple[Any, LLaDA]]:
    from vllm_elastic.bench.engine import BenchEngine

    checkpoint = TINY / "checkpoint"
    engine = BenchEngine(
        checkpoint,
        batch_size=16,
        max_model_len=1200,
        kv_cache_memory_bytes=400 << 20,
        elastic_config=ORACLES_DEFAULTS,
    )
    poison(engine)
    yield engine, LLaDA.from_pretrained(checkpoint)


def suite(num_short: int, num_long: int) -> list[tuple[list[int], str]]:
    """(prompt, configuration): short prompts, and some of about 900 tokens."""
    from heldout import suite as held_out
    from tokenizer import build

    tokenizer = build()
    problems = held_out(11, num_short, None) + held_out(11, num_long, 900)
    names = list(CONFIGS)
    cases = []
    for index, problem in enumerate(problems):
        prompt = tokenizer.apply_chat_template(problem.messages(), add_generation_prompt=True)
        prompt = prompt if isinstance(prompt, list) else prompt["input_ids"]
        # each short prompt with two configurations, a long one with one of the cheap ones
        of_long = index - num_short
        chosen = (index, index + 1) if of_long < 0 else (1 + 2 * of_long,)
        cases += [(prompt, names[i % len(names)]) for i in chosen]
    return cases


@pytest.mark.parametrize(
    ("num_short", "num_long"), [(4, 1), pytest.param(8, 2, marks=pytest.mark.long)]
)
@pytest.mark.slow
def test_equals_oracle_at_batch_16_and_1(
    num_short: int, num_long: int, tiny: tuple[Any, LLaDA]
) -> None:
    engine, oracle = tiny
    cases = suite(num_short, num_long)
    requests = [
        {
            "prompt_token_ids": prompt,
            "max_tokens": CANVAS,
            **{f"elastic_{key}": value for key, value in CONFIGS[name].items()},
        }
        for prompt, name in cases
    ]
    together = engine.run(requests)
    seats, engine.scheduler.max_num_active_reqs = engine.scheduler.max_num_active_reqs, 1
    try:
        alone = engine.run(requests)
    finally:
        engine.scheduler.max_num_active_reqs = seats
    lengths, equal = [], []
    for (prompt, name), batched, single in zip(cases, together, alone, strict=True):
        options = {key: value for key, value in CONFIGS[name].items() if key != "policy"}
        if name == "none":
            expected = decode(oracle, prompt, CANVAS, DecodingOptions(**options))
        elif name == "block":
            expected = elastic_block(oracle, prompt, CANVAS, ElasticBlockOptions(**options))
        else:
            expected = elastic_cache(oracle, prompt, CANVAS, ElasticOptions(**options))
        for result in (batched, single):
            equal.append(agrees(result, expected, (name, len(prompt))))
        lengths.append(len(expected.token_ids))
    # Prompts that repeat themselves have tokens that are attended to equally: ties are likelier.
    assert equal.count(False) <= len(equal) / 8
    assert max(lengths) > 30, "the model answers nothing: this test shows little"
