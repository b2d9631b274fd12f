# SPDX-License-Identifier: Apache-2.0
"""An engine's record of a request against the oracle's, near ties told from errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_elastic.reference import DecodingResult

TIE = 2e-5
"""Margin of a decision that float32 rounding may turn; see ``vllm_elastic.reference.margin``."""


def steps_of(passes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Passes by denoising step, without similarities."""
    steps: list[list[dict[str, Any]]] = []
    for entry in passes:
        if entry["denoising_step"] == len(steps):
            steps.append([])
        steps[-1].append({k: v for k, v in entry.items() if k != "similarities"})
    return steps


def similarities_of(result: dict[str, Any]) -> dict[int, list[float]]:
    """Every step's measured similarities, if they were recorded."""
    return {
        entry["denoising_step"]: entry["similarities"]
        for entry in result["steps"]
        if "similarities" in entry
    }


def parting_step(result: dict[str, Any], expected: DecodingResult) -> int | None:
    """The first denoising step in which anything recorded differs."""
    ours, theirs = steps_of(result["steps"]), steps_of([dict(entry) for entry in expected.steps])
    measured = similarities_of(result)
    for step in range(max(len(ours), len(theirs))):
        if ours[step : step + 1] != theirs[step : step + 1]:
            return step
        wanted = expected.similarities[step]
        found = measured.get(step, wanted)
        # A record has None where a layer was not tested, the oracle NaN.
        found = [math.nan if value is None else value for value in found[: len(wanted)]]
        if found != pytest.approx(wanted, abs=2e-4, nan_ok=True):
            return step
    return None


def agrees(result: dict[str, Any], expected: DecodingResult, case: Any) -> bool:
    """Whether everything is equal; False where a near tie fell the other way.

    Passes are compared with their kinds, start layers, rows and commits, similarities within
    2e-4, then the tokens and the work.

    Raises:
        AssertionError: they part, and no decision up to there was near a tie.
    """
    step = parting_step(result, expected)
    if step is None:
        assert result["token_ids"] == expected.token_ids, f"{case}: tokens differ"
        assert result["denoising_steps"] == expected.denoising_steps, case
        assert result["passes"] == expected.passes, case
        assert result["row_layers"] == expected.row_layers, case
        assert result["full_row_layers"] == expected.full_row_layers, case
        return True
    margin = min(expected.margins[: step + 1])
    assert margin < TIE, f"{case}: parts at step {step}, closest decision until then {margin:.1e}"
    return False
