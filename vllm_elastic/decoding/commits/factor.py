# SPDX-License-Identifier: Apache-2.0
"""The more tokens a step commits, the surer the least sure of them has to be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule, largest_prefix
from vllm_elastic.decoding.predictions import Predictions


class Factor(CommitRule):
    """The n most probable, for the largest n with (n + 1) * (1 - c_n) < ``factor``.

    c_1 >= c_2 >= ... are the probabilities in falling order. Fast-dLLM (arXiv 2505.22618),
    factor-based parallel decoding: if n tokens have at least c_n each and (n + 1) * (1 - c_n) <= 1,
    the most probable tokens of their own are the most probable together, whatever depends on what.
    Fast-dLLM's code has a factor of 1, Fast-dLLM++ (arXiv 2606.02955) compares itself with 0.75.
    """

    name = "factor"

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        probabilities = predictions.probabilities
        falling = -np.sort(-probabilities)
        counts = np.arange(1, len(falling) + 1)
        return largest_prefix(probabilities, (counts + 1) * (1 - falling) < self.config.factor)
