# SPDX-License-Identifier: Apache-2.0
"""Commit by what all of the tokens say, where ``factor`` asks only the least sure one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule, largest_prefix
from vllm_elastic.decoding.predictions import Predictions


class Frechet(CommitRule):
    """The n most probable, for the largest n whose margin exceeds ``frechet_margin``.

    Fast-dLLM++ (arXiv 2606.02955, algorithm 1). With the probabilities c_1 >= c_2 >= ... the n are
    right together at least with the Frechet bound c_1 + ... + c_n - (n - 1), and any other
    choice of tokens at most with 1 - c_n; the margin is the difference. (The paper's bound is
    0 where this one is negative, which no margin from 0 on can tell.) Where all c are equal it is
    ``factor`` with 1 - ``frechet_margin``; where they differ it commits at least as many. The
    paper's own margin is 0.25.
    """

    name = "frechet"

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        probabilities = predictions.probabilities
        falling = -np.sort(-probabilities)
        # c_1 + ... + c_n - (n - 1), written so that probabilities near 1 do not lose their digits.
        together = 1 - np.cumsum(1 - falling)
        margins = together - (1 - falling)
        return largest_prefix(probabilities, margins > self.config.frechet_margin)
