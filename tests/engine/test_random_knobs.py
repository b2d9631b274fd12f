# SPDX-License-Identifier: Apache-2.0
"""Knobs at random, of every policy and commit rule at once, against the oracle.

Combinations that nobody thought of: rules with rows to spare, replays of passes over everything,
canvases that grow and end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from vllm_elastic.decoding.commits import COMMIT_RULES

from .agreement import agrees
from .conftest import Served
from .test_oracle import ask_oracle, problems

pytestmark = pytest.mark.engine

COMMON: dict[str, list[Any]] = {
    "commit": list(COMMIT_RULES),
    "threshold": [0.02, 0.1, 0.3, 0.9],
    "frontier_threshold": [0.05, 0.3, 0.5],
    "steady_threshold": [0.05, 0.2, 0.8],
    "relaxed_threshold": [0.05, 0.3],
    "credit_weight": [0.7, 1.5],
    "factor": [0.5, 1.0, 4.0],
    "frechet_margin": [0.1, 0.5],
    "entropy_bound": [0.5, 3.0],
    "anchor_radius": [1, 4],
    "tokens_per_step": [None, None, None, None, 1, 3],
    "logits_eos_inf": [False, False, False, True],
    "confidence_eos_eot_inf": [False, False, False, True],
}
WINDOWS: dict[str, list[Any]] = {
    "window": [1, 3, 8, 16, 64],
    "grow_by": [0, 0, 0, 5, 12],
    "grow_ahead": [0, 0, 7, 40],
}
POLICIES: dict[str, dict[str, list[Any]]] = {
    "none": WINDOWS,
    "interval": WINDOWS | {"interval": [1, 2, 5]},
    "dual-cache": {"block_length": [1, 3, 8, 40]},
    "elastic": WINDOWS
    | {
        "gamma": [0.0, 0.75, 0.9, 1.1],
        "track_num": [1, 3],
        "statistic": ["released", "paper"],
        "refresh": ["next", "replay"],
        "reach": [0, 0, 2],
    },
    "elastic-block": WINDOWS
    | {
        "granularity": [1, 3, 8, 16, 33],
        "probes": [1, 2, 8],
        "measure_every": [1, 2, 4],
        "reach": [0, 1, 4, 9],
        "block_drift": [0.005, 0.02, 0.05, 0.3],
        "slack": [0.0, 0.1, 0.5],
        "attention_stride": [1, 2, 4],
        "refresh": ["next", "replay"],
        "rows_per_pass": [0, 0, 20, 40, 1000],
    },
}


def knobs(rng: random.Random) -> dict[str, Any]:
    """Of one request; the policies that have most to get wrong come most often."""
    policy = rng.choice([*POLICIES, "elastic", "elastic-block", "elastic-block", "elastic-block"])
    chosen = {name: rng.choice(values) for name, values in (COMMON | POLICIES[policy]).items()}
    return {"policy": policy, **chosen}


@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 24), *(pytest.param(seed, 400, marks=pytest.mark.long) for seed in range(1, 9))],
)
@pytest.mark.parametrize("model", ["eager", pytest.param("dream", marks=pytest.mark.long)])
def test_random_knobs_equal_oracle(
    model: str, seed: int, count: int, serve: Callable[[str], Served]
) -> None:
    """A model that likes to end, and one whose logits are shifted."""
    served = serve(model)
    rng = random.Random(seed)
    prompts = problems()
    cases = [(rng.randrange(len(prompts)), knobs(rng)) for _ in range(count)]
    results = served.engine.run(  # type: ignore[attr-defined]
        [
            {"prompt_token_ids": prompts[index][0], "max_tokens": prompts[index][1]}
            | {f"elastic_{name}": value for name, value in chosen.items()}
            for index, chosen in cases
        ]
    )
    equal = [
        agrees(result, ask_oracle(served, *prompts[index], chosen), (index, chosen))
        for (index, chosen), result in zip(cases, results, strict=True)
    ]
    assert equal.count(False) <= len(cases) / 50
    ended = [len(r["token_ids"]) < prompts[i][1] for (i, _), r in zip(cases, results, strict=True)]
    assert not all(ended) and (any(ended) or model == "dream")
