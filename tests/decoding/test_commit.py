# SPDX-License-Identifier: Apache-2.0
"""Which predictions of a step are committed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden.commit_rule import COMMITS
from vllm_elastic.decoding.commit import choose_commits


@pytest.mark.parametrize(("confidences", "threshold", "tokens_per_step", "committed"), COMMITS)
def test_commit_rule_by_hand(
    confidences: list[float], threshold: float, tokens_per_step: int | None, committed: list[int]
) -> None:
    chosen = choose_commits(np.array(confidences), threshold, tokens_per_step)
    assert chosen.tolist() == committed
