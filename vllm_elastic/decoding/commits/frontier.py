# SPDX-License-Identifier: Apache-2.0
"""A lower threshold where the decoded text ends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule
from vllm_elastic.decoding.predictions import Predictions


class Frontier(CommitRule):
    """At least ``threshold``, or ``frontier_threshold`` at the first masked position.

    Ours. All that stands before that position, the *frontier*, is decided, so its prediction waits
    for nothing to its left, as one further on does (docs/commit-rules.md has the error rates).
    """

    name = "frontier"

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        probabilities = predictions.probabilities
        accepted = probabilities >= self.config.threshold
        accepted[0] |= probabilities[0] >= self.config.frontier_threshold
        return accepted
