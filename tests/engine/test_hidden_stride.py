# SPDX-License-Identifier: Apache-2.0
"""Hidden states of every second or third layer only: the oracle's answers, and fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_elastic.reference import LLaDA

from .agreement import agrees
from .conftest import RANDOM_MODELS, Served, make_engine, random_config
from .test_oracle import ask_oracle, problems

pytestmark = pytest.mark.engine

CONFIGS: dict[str, dict[str, Any]] = {
    "released": {"policy": "elastic", "gamma": 0.75},
    "paper": {"policy": "elastic", "gamma": 0.9, "statistic": "paper", "track_num": 2},
    "always": {"policy": "elastic", "gamma": 1.1},
    "next": {"policy": "elastic", "gamma": 0.9, "statistic": "paper", "refresh": "next"},
    "block": {"policy": "elastic-block", "granularity": 8, "block_drift": 0.1, "slack": 0.5},
    "block-replay": {"policy": "elastic-block", "granularity": 8, "refresh": "replay"},
    "block-settled": {"policy": "elastic-block", "granularity": 8, "block_drift": 0.02, "slack": 1},
}


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.slow
def test_equals_oracle(stride: int, tmp_path: Path) -> None:
    oracle = LLaDA.random(random_config(**RANDOM_MODELS["gqa-tied"]), seed=3)
    stores, starts = compare(oracle, tmp_path, stride)
    stored = set(range(0, oracle.config.n_layers, stride))
    assert {0} < starts <= stored, "no refresh started from a stored hidden state"
    assert stores == len(stored) - 1


@pytest.mark.slow
def test_a_model_of_one_layer(tmp_path: Path) -> None:
    """It stores no hidden states at all."""
    shape = {**RANDOM_MODELS["gqa-tied"], "n_layers": 1}
    oracle = LLaDA.random(random_config(**shape), seed=3)
    assert compare(oracle, tmp_path, 1) == (0, {0})


def compare(oracle: LLaDA, tmp_path: Path, stride: int) -> tuple[int, set[int]]:
    """Every configuration in one batch; returns how many layers store, and where passes began."""
    oracle.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, elastic_config={"hidden_stride": stride})
    served = Served("gqa-tied", tmp_path, oracle, engine)
    cases = [(*problem, name) for problem in problems(8) for name in CONFIGS]
    results = engine.run(
        [
            {"prompt_token_ids": prompt, "max_tokens": max_tokens}
            | {f"elastic_{key}": value for key, value in CONFIGS[name].items()}
            for prompt, max_tokens, name in cases
        ]
    )
    equal, starts = [], set()
    for (prompt, max_tokens, name), result in zip(cases, results, strict=True):
        config = {**CONFIGS[name], "hidden_stride": stride}
        expected = ask_oracle(served, prompt, max_tokens, config)
        equal.append(agrees(result, expected, (name, len(prompt), max_tokens)))
        starts |= {entry["start_layer"] for entry in result["steps"]}
    assert equal.count(False) <= len(equal) / 50
    return len(engine.runner.model.hidden_states), starts
