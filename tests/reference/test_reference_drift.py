# SPDX-License-Identifier: Apache-2.0
"""The two similarities, by hand and by their properties."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_elastic.reference.drift import similarity

# Two heads, one tracked position, two keys.
BEFORE = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
AFTER = torch.tensor([[[0.6, 0.4]], [[0.0, 1.0]]])


def test_released_is_across_heads_and_means_over_keys():
    # Key 0: (1, 0) and (0.6, 0); key 1: (0, 1) and (0.4, 1).
    expected = (1.0 + 1 / math.hypot(0.4, 1.0)) / 2
    assert similarity(BEFORE, AFTER, "released") == pytest.approx(expected, abs=1e-6)


def test_paper_is_across_keys_and_means_over_heads():
    # Head 0: (1, 0) and (0.6, 0.4); head 1: equal.
    expected = (0.6 / math.hypot(0.6, 0.4) + 1.0) / 2
    assert similarity(BEFORE, AFTER, "paper") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("statistic", ["released", "paper"])
def test_mean_over_tracked_positions(statistic):
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 3, 5, 7, generator=generator).softmax(dim=-1)
    alone = [similarity(before[:, [r]], after[:, [r]], statistic) for r in range(5)]
    assert similarity(before, after, statistic) == pytest.approx(sum(alone) / 5, abs=1e-6)
    assert similarity(before, before, statistic) == pytest.approx(1, abs=1e-6)


def test_a_key_that_nobody_attends_to_counts_as_drifted_in_released():
    # Both norms fall under the clamp: 1e-9 * 1e-9 / (1e-8 * 1e-8) = 0.01.
    tiny = torch.tensor([[[1.0, 1e-9]]])
    assert similarity(tiny, tiny, "released") == pytest.approx((1 + 0.01) / 2, abs=1e-6)
    assert similarity(tiny, tiny, "paper") == pytest.approx(1, abs=1e-6)
