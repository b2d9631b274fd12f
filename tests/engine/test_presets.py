# SPDX-License-Identifier: Apache-2.0
"""A preset decodes as its name says, whatever the engine was given beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_elastic.presets import PRESETS

from .agreement import agrees
from .conftest import Served, make_engine
from .test_oracle import ask_oracle, problems

pytestmark = pytest.mark.engine

ORACLES: dict[str, dict[str, Any]] = {
    "block": {"policy": "elastic-block", "window": 16, "commit": "frontier"},
    "published": {"policy": "elastic", "window": 16, "gamma": 0.9, "statistic": "released"},
    "paper": {"policy": "elastic", "window": 16, "gamma": 0.9, "statistic": "paper"},
    "exact": {"policy": "none", "window": 16, "commit": "frontier"},
}
SPOILT = {
    **{"policy": "interval", "window": 3, "threshold": 0.2, "track_num": 3, "reach": 5},
    **{
        "refresh": "next",
        "commit": "factor",
        "tokens_per_step": 2,
        "block_drift": 1.0,
        "gamma": 0.0,
    },
}


@pytest.mark.slow
def test_presets_equal_the_oracle(serve: Callable[[str], Served]) -> None:
    """All presets mixed in a batch, on an engine whose own knobs are others."""
    assert list(ORACLES) == list(PRESETS)
    served = serve("gqa-tied")
    engine = make_engine(served.directory, elastic_config=SPOILT)
    cases = [(problem, name) for problem in problems(6) for name in ORACLES]
    results = engine.run(
        [
            {"prompt_token_ids": prompt, "max_tokens": length, "elastic_preset": name}
            for (prompt, length), name in cases
        ]
    )
    equal = []
    for ((prompt, length), name), result in zip(cases, results, strict=True):
        assert result["policy"] == ORACLES[name]["policy"]
        expected = ask_oracle(served, prompt, length, ORACLES[name])
        equal.append(agrees(result, expected, (name, len(prompt), length)))
    assert equal.count(False) <= 1
