# SPDX-License-Identifier: Apache-2.0
"""Which predictions of a step are committed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_elastic.decoding.commit import choose_commits

PROBABILITIES = st.lists(
    st.sampled_from([0.1, 0.5, 0.9, 1.0]) | st.floats(1e-300, 1.0), min_size=1, max_size=20
)


def chosen(probabilities: list[float], threshold: float, tokens_per_step: int | None) -> list[int]:
    indices = choose_commits(np.array(probabilities), threshold, tokens_per_step)
    return indices.tolist()


@given(PROBABILITIES, st.floats(0.0, 1.0))
def test_threshold_commits_all_that_reach_it_and_the_best(
    probabilities: list[float], threshold: float
) -> None:
    """A step would commit nothing, or a guess below the threshold."""
    bar = min(threshold, max(probabilities))
    expected = [i for i, p in enumerate(probabilities) if p >= bar]
    assert chosen(probabilities, threshold, None) == expected
    assert probabilities.index(max(probabilities)) in expected


@given(PROBABILITIES, st.floats(0.0, 1.0), st.integers(1, 30))
def test_rank_commits_exactly_k_and_ignores_the_threshold(
    probabilities: list[float], threshold: float, k: int
) -> None:
    """The low-confidence baseline would not commit the number of tokens that it promises."""
    ranked = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    assert chosen(probabilities, threshold, k) == sorted(ranked[:k])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, [0, 1, 2, 3]), (0.5, [0, 2, 3]), (0.9, [2]), (0.95, [2]), (1.0, [2])],
)
def test_threshold_table(threshold: float, expected: list[int]) -> None:
    """>= would have become >, or the best prediction would be left out."""
    assert chosen([0.5, 0.3, 0.9, 0.6], threshold, None) == expected


def test_ties_by_rank_go_to_the_smaller_position() -> None:
    """Results would depend on the sort algorithm."""
    assert chosen([0.2, 0.7, 0.7, 0.7], 0.9, 2) == [1, 2]


def test_ties_by_threshold_are_all_committed() -> None:
    """The released code commits every position that has the best probability."""
    assert chosen([0.2, 0.7, 0.7], 0.9, None) == [1, 2]
