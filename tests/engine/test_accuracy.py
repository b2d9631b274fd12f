# SPDX-License-Identifier: Apache-2.0
"""The trained LLaDA in bfloat16: as many held-out problems solved as the README says."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device import ON_CARD
from vllm_elastic.attention import xformers_backend
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.problems import accuracy_of

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada"
sys.path.insert(0, str(TINY))

pytestmark = pytest.mark.engine

DOCUMENTED = 0.98
"""Of 200 such problems, by the default policy."""


def by_xformers() -> Any:
    lacking = "it is for cards" if not ON_CARD else xformers_backend.missing()
    return pytest.param(
        "CUSTOM", marks=pytest.mark.skipif(lacking is not None, reason=f"xformers: {lacking}")
    )


@pytest.mark.parametrize("backend", [None, by_xformers()], ids=["vllms-choice", "xformers"])
@pytest.mark.parametrize("count", [24, pytest.param(80, marks=pytest.mark.long)])
@pytest.mark.slow
def test_held_out_problems_in_bfloat16(count: int, backend: str | None) -> None:
    """No more than three standard errors below."""
    from heldout import HELD_OUT_SEED, records

    options = {} if backend is None else {"attention_backend": backend}
    engine = BenchEngine(
        TINY / "checkpoint",
        dtype="bfloat16",
        batch_size=16,
        max_model_len=640,
        kv_cache_memory_bytes=200 << 20,
        **options,
    )
    problems = list(records(HELD_OUT_SEED, count, None))
    least = DOCUMENTED - 3 * math.sqrt(DOCUMENTED * (1 - DOCUMENTED) / count)
    accuracy = accuracy_of(problems, engine.run(problems))
    assert accuracy is not None and accuracy >= least
