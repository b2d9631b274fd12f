# SPDX-License-Identifier: Apache-2.0
"""A lower threshold around what is sure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule
from vllm_elastic.decoding.predictions import Predictions


class Local(CommitRule):
    """At least ``threshold``, or ``relaxed_threshold`` within ``anchor_radius`` of such a one.

    LocalLeap (arXiv 2510.07081). Its *anchors* are this step's predictions that reach the
    threshold, not tokens committed before; a neighbour is no anchor for others. The published
    code for LLaDA has 0.9, 0.75 and a radius of 4 positions on either side.
    """

    name = "local"

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        positions, probabilities = predictions.positions, predictions.probabilities
        anchors = probabilities >= self.config.threshold
        distances = np.abs(positions[:, None] - positions[anchors])
        near = (distances <= self.config.anchor_radius).any(axis=1)
        return anchors | (near & (probabilities >= self.config.relaxed_threshold))
