# SPDX-License-Identifier: Apache-2.0
"""Every prediction for itself: commit what is probable enough."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule
from vllm_elastic.decoding.predictions import Predictions


class Threshold(CommitRule):
    """At least ``threshold`` (Elastic-Cache's epsilon, arXiv 2510.14973; Fast-dLLM's tau,
    arXiv 2505.22618: 0.9 in both)."""

    name = "threshold"

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        return predictions.probabilities >= self.config.threshold
