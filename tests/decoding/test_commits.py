# SPDX-License-Identifier: Apache-2.0
"""Which predictions of a step are committed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import commit_rule, commit_rules
from vllm_elastic.config import COMMIT_RULES, ElasticConfig
from vllm_elastic.decoding import commits
from vllm_elastic.decoding.canvas import Canvas
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.schedule import make_schedule


def commit(
    positions: list[int],
    confidences: list[float],
    entropies: list[float] | None = None,
    **knobs: Any,
) -> list[int]:
    """Indices that a step commits."""
    window = np.array(positions, dtype=np.int32)
    canvas = Canvas([1], positions[-1], 99)
    config = replace(ElasticConfig(), **{"commit": "threshold", **knobs})
    schedule = make_schedule(config, positions[-1])
    of_each = None if entropies is None else np.array(entropies)
    tokens = np.arange(len(window), dtype=np.int32)
    predictions = Predictions(window, tokens, np.array(confidences), of_each)
    return schedule.choose(canvas, predictions, 0).tolist()


def test_rules_are_the_registered_ones() -> None:
    """A rule could not be named, or a name would be a KeyError in the scheduler."""
    assert list(COMMIT_RULES) == list(commits.COMMIT_RULES)


@pytest.mark.parametrize(
    ("confidences", "threshold", "tokens_per_step", "committed"), commit_rule.COMMITS
)
def test_commit_rule_by_hand(
    confidences: list[float], threshold: float, tokens_per_step: int | None, committed: list[int]
) -> None:
    positions = list(range(1, len(confidences) + 1))
    chosen = commit(positions, confidences, threshold=threshold, tokens_per_step=tokens_per_step)
    assert chosen == committed


@pytest.mark.parametrize(("knobs", "positions", "confidences", "committed"), commit_rules.COMMITS)
def test_rules_by_hand(
    knobs: dict[str, Any], positions: list[int], confidences: list[float], committed: list[int]
) -> None:
    assert commit(positions, confidences, **knobs) == committed


@pytest.mark.parametrize(("bound", "confidences", "entropies", "committed"), commit_rules.ENTROPY)
def test_entropy_by_hand(
    bound: float, confidences: list[float], entropies: list[float], committed: list[int]
) -> None:
    positions = list(range(1, len(confidences) + 1))
    chosen = commit(positions, confidences, entropies, commit="entropy", entropy_bound=bound)
    assert chosen == committed


@pytest.mark.parametrize(
    ("commit", "knobs", "steps"),
    [("steady", *case) for case in commit_rules.STEADY]
    + [("credit", *case) for case in commit_rules.CREDIT],
)
def test_rules_that_remember_by_hand(
    commit: str,
    knobs: dict[str, Any],
    steps: list[tuple[list[int], list[int], list[float], list[int]]],
) -> None:
    canvas = Canvas([1], 20, 99)
    schedule = make_schedule(replace(ElasticConfig(), commit=commit, **knobs), 20)
    for number, (positions, tokens, confidences, committed) in enumerate(steps):
        predictions = Predictions(
            np.array(positions, dtype=np.int32),
            np.array(tokens, dtype=np.int32),
            np.array(confidences),
        )
        assert schedule.choose(canvas, predictions, number).tolist() == committed


CONFIDENCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@given(CONFIDENCES, st.floats(0.0, 1.0))
def test_frechet_commits_at_least_what_factor_does(confidences: list[float], margin: float) -> None:
    """Fast-dLLM++, corollary 4.4: of a factor of 1 - margin."""
    positions = list(range(1, len(confidences) + 1))
    by_factor = commit(positions, confidences, commit="factor", factor=1 - margin - 1e-9)
    by_frechet = commit(positions, confidences, commit="frechet", frechet_margin=margin)
    assert set(by_factor) <= set(by_frechet)


@given(CONFIDENCES, st.floats(0.0, 1.0))
def test_frontier_adds_the_first_position_only(confidences: list[float], lower: float) -> None:
    """A rule that is looser elsewhere would commit guesses that wait for what stands before."""
    positions = list(range(1, len(confidences) + 1))
    by_threshold = commit(positions, confidences)
    by_frontier = commit(positions, confidences, commit="frontier", frontier_threshold=lower)
    if max(confidences) >= 0.9:
        assert set(by_frontier) - set(by_threshold) <= {0}
        assert set(by_threshold) <= set(by_frontier)
    elif 0 < confidences[0] >= lower:
        assert by_frontier == [0]
    else:
        assert by_frontier == by_threshold


@given(CONFIDENCES, st.floats(0.0, 1.0), st.integers(0, 12))
def test_local_commits_at_least_what_threshold_does(
    confidences: list[float], relaxed: float, radius: int
) -> None:
    """A threshold that is lower in places would lose what is sure everywhere."""
    positions = list(range(1, len(confidences) + 1))
    knobs = {"relaxed_threshold": relaxed, "anchor_radius": radius}
    by_local = commit(positions, confidences, commit="local", **knobs)
    assert set(commit(positions, confidences)) <= set(by_local)
